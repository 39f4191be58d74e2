"""A vision tower over tiles: pieces of one size that pictures are cut into, a row each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmexport.export.errors import ExportError
from llmexport.export.spec.axis import FEATURES, TILES
from llmexport.export.spec.block import Block, Port, hidden
from llmexport.export.spec.mixer import Norm
from llmexport.export.spec.splice import features


def tiles(channels: int, size: int) -> Port:
    """The colours of tiles, as the processor makes them."""
    return Port("pixel_values", (TILES, channels, size, size), "float32", "pixels")


@dataclass(frozen=True)
class TileEmbedding(Block):
    """`side` x `side` patches of a tile to hidden states, by a convolution that sees one at a time; then a class token,
    and a learned position for each (modeling_llama4.py, Llama4VisionModel). Where the weight is a `kernel`
    [hidden, channels, patch, patch] there is a bias, and no class token (modeling_siglip.py, SiglipVisionEmbeddings).
    """

    channels: int
    side: int
    patch: int
    hidden: int
    kernel: bool = False

    @property
    def places(self) -> int:
        """How many hidden states a tile makes."""
        return self.side**2 + (not self.kernel)

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (tiles(self.channels, self.side * self.patch),)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (hidden("embedded", self.hidden, (TILES, self.places)),)


@dataclass(frozen=True)
class TileRotary(Block):
    """cos and sin of RoPE in two dimensions for the patches of a tile and its class token, which does not turn: the
    first half of the angles is of the column, the second of the row, both counted from 1 (modeling_llama4.py,
    Llama4VisionRotaryEmbedding). `size` dimensions turn.

    Both are rounded as those of PatchRotary, at the same cost (heads of 88, 24 x 24 patches).
    """

    channels: int
    side: int
    patch: int
    size: int
    theta: float

    def __post_init__(self) -> None:
        if self.size % 4 or not self.size:
            raise ExportError(f"vision_config: RoPE needs a head size that 4 divides, config.json makes it {self.size}")

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (tiles(self.channels, self.side * self.patch),)

    @property
    def outputs(self) -> tuple[Port, ...]:
        shape = (TILES, self.side**2 + 1, self.size // 2)
        return (Port("cos", shape, use="cos"), Port("sin", shape, use="sin"))


@dataclass(frozen=True)
class PixelShuffle(Block):
    """`merge` x `merge` patches of a tile to one row of `out` numbers, without the class token, by
    gelu(down(gelu(up(x)))) with the erf GELU and no bias (modeling_llama4.py, Llama4VisionPixelShuffleMLP)."""

    side: int
    merge: int
    hidden: int
    out: int

    def __post_init__(self) -> None:
        if self.side % self.merge:
            raise ExportError(f"config.json: a tile has {self.side} patches a side, which {self.merge} must divide")

    @property
    def tokens(self) -> int:
        """How many rows a tile makes."""
        return (self.side // self.merge) ** 2

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (hidden("hidden", self.hidden, (TILES, self.side**2 + 1)),)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (hidden("shuffled", self.out, (TILES, self.tokens)),)


@dataclass(frozen=True)
class Projector(Block):
    """Rows of tiles to features that are as wide as the text model (modeling_llama4.py, Llama4MultiModalProjector)."""

    tokens: int
    hidden: int
    out: int

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (hidden("hidden", self.hidden, (TILES, self.tokens)),)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (features(FEATURES, self.out),)


@dataclass(frozen=True)
class PooledProjector(Block):
    """The mean of `merge` x `merge` patches of `side` x `side` of a tile, normed, times a matrix [in, out]: features as
    wide as the text model (modeling_gemma3.py, Gemma3MultiModalProjector)."""

    side: int
    merge: int
    norm: Norm
    out: int

    @property
    def tokens(self) -> int:
        """How many features a tile makes."""
        return (self.side // self.merge) ** 2

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (hidden("hidden", self.norm.size, (TILES, self.side**2)),)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (features(FEATURES, self.out),)

    @property
    def parts(self) -> Mapping[str, tuple[Block, str]]:
        return {"norm": (self.norm, "norm.")}
