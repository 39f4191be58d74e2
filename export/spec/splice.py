"""Where pictures enter a text."""

from __future__ import annotations

from dataclasses import dataclass

from llmexport.export.errors import ExportError
from llmexport.export.spec.axis import SPLICED
from llmexport.export.spec.block import INPUT_IDS, PICTURES, Block, Port, hidden


@dataclass(frozen=True)
class Splice(Block):
    """The embeddings of a step, but of its tokens that stand for pictures, which are of these ids: the k-th of them,
    row by row, takes row k of the features (masked_scatter in transformers' multimodal models).

    Where a step has no features it has no pictures, and every token keeps its own embedding. Else more such tokens than
    features: a run fails in PyTorch and in ONNX Runtime; TensorRT does not tell. `numbered`: it also gives the
    number of each token's picture. Tokens that follow each other are of one.
    """

    tokens: tuple[int, ...]
    hidden: int
    numbered: bool = False

    def __post_init__(self) -> None:
        if len({*self.tokens}) < len(self.tokens):
            raise ExportError(f"config.json: pictures and videos have one token, {self.tokens[0]}: make them differ")

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (INPUT_IDS, hidden("hidden", self.hidden), features(SPLICED, self.hidden))

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (hidden("spliced", self.hidden), *(PICTURES,) * self.numbered)


def features(axis: str, width: int) -> Port:
    """What a vision tower gives, and a decoder takes."""
    return Port("image_features", (axis, width), use="features")
