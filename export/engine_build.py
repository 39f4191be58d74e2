"""The TensorRT builder, as a process of its own: the only module of the export that imports TensorRT.

`python -m llmexport.export.engine_build FOLDER` does the job that `engine.py` left in the folder, or `evaluation.py`,
whose job names a `channel`: what was parsed is then computed on this CPU, and not built. Each line of stdout is an
event, a JSON list: ["log", text], ["parsed", inputs, outputs, plugin layers, facts], ["unreadable", reasons],
["unbuildable"], ["kernels", [name, kind, nodes] each], ["unwritable", errno], ["built"]; ["unknown", reason] or
["ready"].
"""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import importlib
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmexport.export import engine_kernels, engine_weights
from llmexport.export.packed.given import Given
from llmexport.export.typed import typed
from llmexport.plugins import library

JOB, MODEL, PLAN = "job.json", "model.onnx", "model.plan"  # in the folder of a job
Tell = Callable[..., None]
PR_SET_PDEATHSIG = 1
LONGEST = 1000  # characters of a message that are passed on
# Said of every integer tensor, and no reason to worry.
CHATTER = re.compile(r"Make sure (input|output) .* has Int64 binding")


def main(folder: Path) -> None:
    tell = _events()
    # Both: only Linux has the first, and the second waits while TensorRT holds the interpreter.
    die_with_parent()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = json.loads((folder / JOB).read_bytes())
    trt = importlib.import_module(job["module"])
    plan = _build(trt, job, (folder / MODEL).read_bytes(), tell)
    if plan is None:
        return
    try:
        with open(folder / PLAN, "xb") as file:
            file.write(plan)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        tell("unwritable", error.errno)
    else:
        tell("built")


def _build(trt: Any, job: dict[str, Any], model: bytes, tell: Tell) -> Any:
    """The plan, as a buffer; None if TensorRT refused, which has been told, or if none was wanted."""
    logger = _logger(trt, tell)
    if "library" in job:
        library.load(trt, Path(job["library"]))
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    folder = Path(job["model"]).parent
    # The network has them where they lie here.
    given = [(g.name, g.read(folder)) for g in typed(tuple[Given, ...], job.get("given", []))]
    if not _parse(parser, model, job["model"], given):
        errors = [parser.get_error(i) for i in range(min(parser.num_errors, 5))]
        tell("unreadable", [f"{e.node_operator()} {e.node_name()}: {' '.join(e.desc().split())}" for e in errors])
        return None
    # Inputs, where the weights are beside the plan.
    weights = job.get("weights", ())
    engine_weights.read_swapped(trt, network, weights)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    for layer in layers:
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            # Where no fused kernel fits, as in fp32, it may take several instead of failing.
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True
    inputs = [_port(network.get_input(i)) for i in range(network.num_inputs)]
    outputs = [_port(network.get_output(i)) for i in range(network.num_outputs)]
    plugins = [layer.name for layer in layers if layer.type == trt.LayerType.PLUGIN_V3]
    kinds = collections.Counter(layer.type.name for layer in layers)
    facts = {"version": trt.__version__, "layers": dict(kinds.most_common())}
    facts["computed"] = engine_weights.computed(trt, network, weights, job["large"]) if weights else []
    tell("parsed", inputs, outputs, plugins, facts)
    if "channel" in job:
        from llmexport.export.network.serve import serve

        serve(trt, network, model, job, tell)
        return None
    config = builder.create_builder_config()
    # TensorRT would round the factors of a product to 11 bits on its own, and fp32 would be no reference any more.
    config.clear_flag(trt.BuilderFlag.TF32)
    if job.get("aliased"):
        # An output of a plugin that may have an input's memory is an error without it.
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    profile = builder.create_optimization_profile()
    for name, shapes in job["profile"].items():
        profile.set_shape(name, *shapes)
    config.add_optimization_profile(profile)
    # For the list of kernels; with less it has each part of the network that TensorRT compiles as one layer.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        tell("unbuildable")
    elif (kernels := engine_kernels.listed(logger.lists)) is not None:
        tell("kernels", [dataclasses.astuple(k)[:3] for k in kernels])
    return plan


def _parse(parser: Any, model: bytes, path: str, given: list[tuple[str, Any]]) -> bool:
    """Reads a model whose external data lies beside `path`, but for what is `given` by name."""
    if not given:
        return bool(parser.parse(model, path))
    return bool(
        parser.load_model_proto(model, path)
        and all(parser.load_initializer(name, array.ctypes.data, array.nbytes) for name, array in given)
        and parser.parse_model_proto()
    )


def _port(tensor: Any) -> list[Any]:
    return [tensor.name, tensor.dtype.name, list(tensor.shape)]


def _network_flags(trt: Any) -> int:
    # TensorRT 11 and RTX have no other typing.
    typed = trt.__name__ == "tensorrt" and int(trt.__version__.split(".")[0]) < 11
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if typed else 0


def _logger(trt: Any, tell: Tell) -> Any:
    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lists: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.WARNING and not CHATTER.search(text):
                tell("log", f"{severity.name}: {text[:LONGEST]}")
            elif text.startswith(engine_kernels.HEADING):
                self.lists.append(text)

    return Logger()


def _events() -> Tell:
    channel = os.fdopen(os.dup(1), "w")
    # What libraries print to stdout is no event: it goes to stderr.
    os.dup2(2, 1)
    lock = threading.Lock()

    def tell(*event: Any) -> None:
        with lock:
            print(json.dumps(event), file=channel, flush=True)

    return tell


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent has ended, however that ends."""
    call = getattr(ctypes.CDLL(None), "prctl", None)
    if call is not None:
        call(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_with_parent() -> None:
    # The parent holds the other end of stdin and writes nothing.
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
