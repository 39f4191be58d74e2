"""The TensorRT builder, as a process of its own: the only module that imports it to build.

`python -m llmexport.export.engine_build FOLDER` reads `job.json` there (see `engine.py`) and writes the plan. Each
line of its stdout is an event, a JSON list: ["log", severity, text], ["parsed", facts], ["refused", text],
["disk", errno] or ["built"].
"""

from __future__ import annotations

import collections
import importlib
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

Tell = Callable[..., None]
LONGEST = 2000  # characters of one message that are passed on


def main(folder: Path) -> None:
    tell = _events()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = json.loads((folder / "job.json").read_bytes())
    trt = importlib.import_module(job["module"])
    plan = _build(trt, job, (folder / "model.onnx").read_bytes(), tell)
    if plan is None:
        return
    try:
        with open(folder / "model.plan", "xb") as file:
            file.write(plan)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        tell("disk", error.errno)
    else:
        tell("built")


def _build(trt: Any, job: dict[str, Any], model: bytes, tell: Tell) -> Any:
    """The plan, as a buffer; None if TensorRT refused, and then it has been told why."""
    logger = _logger(trt, tell)
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model, job["model"]):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        found = (f"node {e.node_name()} ({e.node_operator()}): {' '.join(e.desc().split())}" for e in errors[:5])
        tell("refused", "TensorRT cannot read the model: " + ("; ".join(found) or "it does not say why"))
        return None
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for name, sizes in job["profile"].items():
        profile.set_shape(name, *sizes)
    config.add_optimization_profile(profile)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    for layer in layers:
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            # What has no fused kernel (all of fp32) is then built of several; the rest keeps its kernel.
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True
    tell("parsed", {"version": trt.__version__, **_facts(network, layers)})
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        tell("refused", "TensorRT cannot build the model")
    return plan


def _facts(network: Any, layers: list[Any]) -> dict[str, Any]:
    ports = {
        "inputs": [network.get_input(i) for i in range(network.num_inputs)],
        "outputs": [network.get_output(i) for i in range(network.num_outputs)],
    }
    found = {k: [[t.name, t.dtype.name, list(t.shape)] for t in tensors] for k, tensors in ports.items()}
    return {**found, "layers": dict(collections.Counter(x.type.name for x in layers).most_common())}


def _network_flags(trt: Any) -> int:
    # From TensorRT 11 on, and in RTX, networks have no other typing.
    typed = trt.__name__ == "tensorrt" and int(trt.__version__.split(".")[0]) < 11
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if typed else 0


def _logger(trt: Any, tell: Tell) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.WARNING:
                tell("log", severity.name, text[:LONGEST])

    return Logger()


def _events() -> Tell:
    # Libraries print to stdout too: theirs becomes stderr.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    lock = threading.Lock()

    def tell(*event: Any) -> None:
        with lock:
            print(json.dumps(event), file=channel, flush=True)

    return tell


def _end_with_parent() -> None:
    # The parent holds the other end of stdin and never writes.
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
