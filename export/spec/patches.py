"""A vision tower over packed patches: pictures of any size one after the other, in one row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmexport.export.errors import ExportError
from llmexport.export.spec.axis import FEATURES, IMAGES
from llmexport.export.spec.block import Block, Dim, Port, hidden
from llmexport.export.spec.mixer import Norm
from llmexport.export.spec.splice import features

# The row of all patches.
ROWS = 1


def pixels(axis: Dim, numbers: int) -> Port:
    """The colours of patches, as the processor makes them."""
    return Port("pixel_values", (axis, numbers), "float32", "pixels")


@dataclass(frozen=True)
class PatchEmbedding(Block):
    """Patches to hidden states: a convolution in time, height and width whose stride is its kernel, so that it sees one
    patch at a time (modeling_qwen3_5.py, Qwen3_5VisionPatchEmbed)."""

    channels: int
    frames: int
    patch: int
    hidden: int
    axis: str

    @property
    def kernel(self) -> tuple[int, int, int]:
        return (self.frames, self.patch, self.patch)

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (pixels(self.axis, self.channels * self.frames * self.patch**2),)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (hidden("embedded", self.hidden, (ROWS, self.axis)),)


@dataclass(frozen=True)
class PatchPlaces(Block):
    """Where each patch is: its row and column, how many of them its picture has, and its frame.

    Patches come picture by picture and frame by frame, `merge` x `merge` neighbours after each other (vision_utils.py,
    get_vision_position_ids). A grid for fewer patches than there are: a run fails in PyTorch and in ONNX Runtime.
    """

    merge: int
    numbers: int
    axis: str

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (pixels(self.axis, self.numbers), Port("grid_thw", (IMAGES, 3), "int64", "grid"))

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (
            places(self.axis),
            Port("extents", (2, self.axis), "int64", "extents"),
            Port("segments", (self.axis,), "int64", "segments"),
        )


def places(axis: str) -> Port:
    return Port("places", (2, axis), "int64", "places")


@dataclass(frozen=True)
class PatchPositions(Block):
    """Adds a learned table of `side` x `side` positions, resampled to the size of each picture: bilinear, corners on
    corners (vision_utils.py, get_vision_interpolation_indices_and_weights)."""

    side: int
    hidden: int
    axis: str

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (
            hidden("hidden", self.hidden, (ROWS, self.axis)),
            places(self.axis),
            Port("extents", (2, self.axis), "int64", "extents"),
        )

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (hidden("placed", self.hidden, (ROWS, self.axis)),)


@dataclass(frozen=True)
class PatchRotary(Block):
    """cos and sin of RoPE in two dimensions: the first half of the angles turns by the row, the second by the column
    (modeling_qwen3_5.py, Qwen3_5VisionRotaryEmbedding). `size` dimensions turn; fp32 inside.

    Both are rounded to the model's dtype, as those of a text are, where transformers keeps fp32: in 16 bits attention
    is off by 0.7 roundoffs of the rms in place of 0.6, by 2.4 in place of 1.9 where its logits are 9 times as large
    (heads of 72, 28 x 28 patches).
    """

    size: int
    theta: float
    axis: str

    def __post_init__(self) -> None:
        if self.size % 4 or not self.size:
            raise ExportError(f"vision_config: RoPE needs a head size that 4 divides, config.json makes it {self.size}")

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (places(self.axis),)

    @property
    def outputs(self) -> tuple[Port, ...]:
        shape = (ROWS, self.axis, self.size // 2)
        return (Port("cos", shape, use="cos"), Port("sin", shape, use="sin"))


@dataclass(frozen=True)
class SegmentMask(Block):
    """A patch sees all patches of its own frame."""

    axis: str

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (Port("segments", (self.axis,), "int64", "segments"),)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (Port("mask", (ROWS, 1, self.axis, self.axis), "bool", "mask"),)


@dataclass(frozen=True)
class PatchMerger(Block):
    """`merge` x `merge` patches, normed one by one, to one feature of `out` numbers: down(gelu(up(x))), erf GELU
    (modeling_qwen3_5.py, Qwen3_5VisionPatchMerger)."""

    norm: Norm
    merge: int
    out: int
    axis: str

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (hidden("hidden", self.norm.size, (ROWS, self.axis)),)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (features(FEATURES, self.out),)

    @property
    def parts(self) -> Mapping[str, tuple[Block, str]]:
        return {"norm": (self.norm, "norm.")}
