"""Where pictures enter a text."""

from __future__ import annotations

from dataclasses import dataclass

from llmexport.export.spec.axis import SPLICED
from llmexport.export.spec.block import INPUT_IDS, Block, Port, hidden


@dataclass(frozen=True)
class Splice(Block):
    """The embeddings of a step, but of its tokens that stand for pictures, which are of these ids: the k-th of them,
    row by row, takes row k of the features (masked_scatter in transformers' multimodal models).

    More such tokens than features: a run fails in PyTorch and in ONNX Runtime; TensorRT does not tell.
    """

    tokens: tuple[int, ...]
    hidden: int

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (INPUT_IDS, hidden("hidden", self.hidden), features(SPLICED, self.hidden))

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (hidden("spliced", self.hidden),)


def features(axis: str, width: int) -> Port:
    """What a vision tower gives, and a decoder takes."""
    return Port("image_features", (axis, width), use="features")
