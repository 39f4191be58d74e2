"""Models of two graphs, made of an architecture that has one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from llmexport.export import archs, onnx_file
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.config import Config
from llmexport.export.spec import BATCH, Attention, Graph, Layer, Model, Port, Temperature
from llmexport.export.wiring import Wiring

TEMPERATURE = Temperature(interval=1, scale=0.5)


def rebuilt(arch: str, checkpoint: Path, change: Callable[[Model], Model]) -> onnx_file.Request:
    """The request to export a checkpoint with another model than its architecture builds."""
    named = archs.load(arch)

    def build(config: Config) -> Model:
        return change(named.build(config))

    changed = dataclasses.replace(named, build=build)
    return onnx_file.Request(changed, open_checkpoint(checkpoint))


def in_two(model: Model) -> Model:
    """The same model: its embedding in a graph of its own, and the rest."""
    [whole] = model.graphs
    embedding, *others = whole.assembly.steps
    table, rest = Wiring("embed"), whole.assembly
    table.take(*embedding.block.inputs)
    table.place("embedding", embedding.block, embedding.outputs)
    [port] = (dataclasses.replace(p, name=n) for p, n in zip(embedding.block.outputs, embedding.outputs, strict=True))
    table.give(port)
    read = {n for s in others for n in s.inputs}
    inputs = (port, *(p for p in rest.inputs if p.name in read))
    decoder = Graph("decoder", dataclasses.replace(rest, inputs=inputs, steps=tuple(others)), whole.carried)
    return Model((table.done(), decoder), model.ties)


def with_source(model: Model) -> Model:
    """A decoder whose attention has a temperature for each row, which a graph before it makes of a source text.

    Axes of the source are its own: none of its inputs are tokens of a step.
    """
    [whole] = model.graphs
    source, decoder = Wiring("source"), Wiring("decoder")
    temperature = dataclasses.replace(TEMPERATURE.outputs[0], shape=(BATCH, 1))
    source.take(Port("source_mask", (BATCH, "elsewhere"), "int64", "padding"))
    source.take(Port("last_id", (BATCH, 1), "int64", "tokens"))
    source.place("temperature", TEMPERATURE, attention_mask="source_mask", input_ids="last_id")
    source.give(temperature)
    decoder.take(*(p for p in whole.assembly.inputs if p.name not in whole.carried), temperature)
    embedding, *others, head = [s.block for s in whole.assembly.steps]
    (hidden,) = decoder.place("embedding", embedding, ["hidden.0"])
    context = [b for b in others if not isinstance(b, Layer)]
    decoder.share(context)
    for i, layer in enumerate(b for b in others if isinstance(b, Layer)):
        mixer, mlp = layer.sublayers
        assert isinstance(mixer.block, Attention)
        mixer = dataclasses.replace(mixer, block=dataclasses.replace(mixer.block, temperature=True))
        warm = dataclasses.replace(layer, sublayers=(mixer, mlp))
        (hidden,) = decoder.place(
            f"layers.{i}", warm, [f"hidden.{i + 1}"], state=f"{i}", context=context, hidden=hidden
        )
    decoder.place("head", head, hidden=hidden)
    decoder.give(*head.outputs)
    return Model((source.done(), decoder.done()), model.ties)
