"""The architectures' tiny configs, changed and read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import transformers
from layouts import WHOLE

from llmexport.export import archs
from llmexport.export.errors import ExportError
from llmexport.export.onnx_file import read_model
from llmexport.export.spec import Attention, Block, Layer, Mask, Model, Rotary


def read(arch: str, **changes: Any) -> Model:
    """The architecture's tiny config, changed."""
    return read_model(archs.load(arch), archs.load(arch).tiny | changes)


def read_whole(kind: str, beside: dict[str, Any] | None = None, **changes: Any) -> Model:
    """The same as the text model of a multimodal config of this type, with the keys `beside` it."""
    named = archs.load(WHOLE[kind])
    outer = {"model_type": kind, "vision_config": {}, **(beside or {})}
    return read_model(named, {**outer, "text_config": named.tiny | changes})


def config_class(config: dict[str, Any]) -> Any:
    """The class of transformers for a config; that of the architecture, where transformers knows no such type."""
    kind = config["model_type"]
    known = kind in transformers.CONFIG_MAPPING
    return transformers.CONFIG_MAPPING[kind if known else archs.choose(None, config).model_types[0]]


def refusal(arch: str, **changes: Any) -> str:
    """The one line that says why a changed config is refused."""
    with pytest.raises(ExportError) as error:
        read(arch, **changes)
    return one_line(error.value)


def refusal_of_whole(kind: str, beside: dict[str, Any] | None = None, **changes: Any) -> str:
    with pytest.raises(ExportError) as error:
        read_whole(kind, beside, **changes)
    return one_line(error.value)


def one_line(error: ExportError) -> str:
    line = str(error)
    assert len(line.splitlines()) == 1
    return line


def everywhere(arch: str, rope: dict[str, Any]) -> dict[str, Any]:
    """RoPE of all layers, as rope_parameters say it."""
    kinds = ("gemma3_text", "gemma4_text", "olmo3")
    return {"sliding_attention": rope, "full_attention": dict(rope)} if arch in kinds else rope


@dataclass(frozen=True)
class Placed:
    """What a decoder layer at its place holds, and the context blocks whose outputs it reads."""

    mixer: Any
    mlp: Any
    reads: tuple[Block, ...]


def placed_layers(model: Model) -> list[Placed]:
    makers = {value: s.block for s in model.steps for value in s.outputs if not isinstance(s.block, Layer)}
    found = []
    for step in model.steps:
        if isinstance(step.block, Layer):
            mixer, *others = step.block.sublayers
            mlp = next((s for s in others if s.name == "mlp"), others[-1])
            reads = dict.fromkeys(makers[v] for v in step.inputs[1:] if v in makers)
            found.append(Placed(mixer.block, mlp.block, tuple(reads)))
    return found


def rotary(model: Model) -> Rotary:
    """The RoPE that all layers share."""
    [found] = {b for layer in placed_layers(model) for b in layer.reads if isinstance(b, Rotary)}
    return found


def windows(model: Model) -> list[int | None]:
    """How far each layer's attention looks back."""
    return [_window(x.mixer, next((b for b in x.reads if isinstance(b, Mask)), None)) for x in placed_layers(model)]


def _window(mixer: Attention, mask: Mask | None) -> int | None:
    return mixer.window or None if mask is None else mask.window
