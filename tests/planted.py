"""A builder's process in which a network is altered between the parser and what computes it, or a model before it."""

from __future__ import annotations

import sys
import textwrap

CODE = """
import os, sys, time
from pathlib import Path
import numpy as np
import onnx
from llmexport.export import engine_build
from llmexport.export.network import layers as kinds, program, serve

folder = Path(sys.argv[1])
original = serve.serve

def altered(trt, network, model, job, tell):
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    for layer in layers:
        kinds.of(trt, layer)
    of = lambda kind: [layer for layer in layers if layer.type.name == kind]
{network}
    original(trt, network, model, job, tell)

serve.serve = altered
model = onnx.ModelProto.FromString((folder / engine_build.MODEL).read_bytes())
{model}
(folder / engine_build.MODEL).write_bytes(model.SerializeToString())
engine_build.main(folder)
"""


def builder(network: str = "", model: str = "") -> tuple[str, ...]:
    """Its command. network: what is done to the parsed `network`, whose `layers` have the classes of their kinds and
    are found by kind, as `of("SLICE")`. model: what is done to the `model` before it is parsed."""
    code = CODE.format(network=textwrap.indent(network, "    "), model=model)
    return (sys.executable, "-c", code)
