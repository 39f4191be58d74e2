"""Engines on a GPU, as a process of its own: its crash is an error and not ours.

`python -m llmexport.validate.engine_run FOLDER` reads the job that `engine.py` left in the folder. It says its version,
then waits to be told to load the plans, and answers each feed with outputs (`wire`). It ends with its parent.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llmexport.export import binding
from llmexport.export.engine_build import die_with_parent
from llmexport.export.engine_record import Plan, read_plan
from llmexport.export.errors import EngineError
from llmexport.export.identity import WeightFile
from llmexport.export.typed import typed
from llmexport.plugins import library
from llmexport.plugins.errors import UserError
from llmexport.validate.engine_api import check_io, context, refusal
from llmexport.validate.pack import BITS, bits
from llmexport.validate.wire import Arrays, receive, send

JOB = "job.json"
Runner = Any  # Polygraphy's TrtRunner, or what stands for it


def main(folder: Path) -> None:
    # What libraries print to stdout is no message: it goes to stderr.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    die_with_parent()
    job = json.loads((folder / JOB).read_bytes())
    trt = importlib.import_module(job["module"])
    from polygraphy.backend.trt import TrtRunner

    serve(trt, TrtRunner, on_gpu, job, sys.stdin.buffer, answers)


def serve(
    trt: Any,
    make: Callable[[Any], Runner],
    place: Callable[[np.ndarray], Any],
    job: dict[str, Any],
    asked: BinaryIO,
    answers: BinaryIO,
) -> None:
    """Answers until nobody asks any more. A user's mistake is an answer, and the last one.

    place: where a weight that is an input goes, once, before the first call.
    """
    send(answers, {"version": trt.__version__})
    runners: dict[str, Runner] = {}
    plans: dict[str, Plan] = {}
    weights: dict[str, dict[str, Any]] = {}
    folder, files = Path(job["folder"]), typed(tuple[WeightFile, ...], job["weights"])
    # TensorRT calls a logger that Python has forgotten.
    logger = trt.Logger(trt.Logger.WARNING)
    while received := receive(asked):
        message, feed = received
        try:
            if "graph" in message:
                graph = message["graph"]
                outputs = _outputs(runners[graph], plans[graph], feed | weights[graph])
                send(answers, {"seconds": runners[graph].last_inference_time()}, outputs)
                continue
            for path in job["libraries"]:
                library.load(trt, Path(path))
            for graph, data in job["plans"].items():
                plans[graph] = typed(Plan, data)
                runners[graph] = make(_loaded(trt, logger, folder, plans[graph]))
                runners[graph].activate()
                weights[graph] = {n: place(a) for n, a in binding.weights(plans[graph].bindings, files, folder)}
            send(answers, {"loaded": sorted(runners)})
        except UserError as error:
            send(answers, {"refused": str(error)})
            return


def _loaded(trt: Any, logger: Any, folder: Path, plan: Plan) -> Any:
    """The execution context of a plan. Its bytes are held against the record before TensorRT gets them."""
    data, path = read_plan(folder / plan.file, plan), folder / plan.file
    # A plan may not bring code of its own: engine_host_code_allowed stays as it is, false.
    runtime = trt.Runtime(logger)
    if reason := refusal(trt, runtime, data):
        raise EngineError(f"TensorRT does not take {path}: {reason}")
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise EngineError(f"TensorRT does not take {path}: build it again, with this version, for this GPU")
    check_io(trt, engine, plan)
    made = context(trt, engine)
    if made is None:
        needs = engine.device_memory_size_v2
        raise EngineError(f"{path} needs {needs / 1e9:.2f} GB beside its weights: build with a smaller --profile")
    return made


def on_gpu(array: np.ndarray) -> Any:
    """The array as Polygraphy's runner takes it without another copy."""
    from polygraphy.common import FormattedArray
    from polygraphy.cuda import DeviceArray

    data = np.asarray(bits(array))
    raw = data.reshape(-1).view(np.uint8)
    return FormattedArray(DeviceArray.raw(raw.shape).copy_from(raw), data.shape)


def _outputs(runner: Runner, plan: Plan, feed: dict[str, Any]) -> Arrays:
    """What a graph makes of a feed; bfloat16 goes in and comes out as its bits, as numpy has none."""
    # Raw buffers, as Polygraphy has no numpy type for bfloat16. An empty past gets an address from it, which may not
    # be null.
    made = runner.infer(feed, check_inputs=False, return_raw_buffers=True)
    found = Arrays()
    for port in plan.outputs:
        raw, shape = made[port.name].array, tuple(made[port.name].shape)
        found[port.name] = raw.reshape(-1).view(np.dtype(BITS.get(port.dtype, port.dtype))).reshape(shape)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
