"""Exports of quantised checkpoints, and what they compute."""

from pathlib import Path
from typing import Any

import numpy as np
from first_feed import first_feed

from llmexport.export import archs, evaluation, graph_file
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.exported import Export
from llmexport.export.onnx_file import Request
from llmexport.export.onnx_file import write as export_to
from llmexport.validate import stages
from llmexport.validate.runtime import open_session

# Forms of quantised_checkpoints.py of which nothing is packed anew, but for those that end so.
IN_PLACE = ("w4a16", "w8a16", "w8a8", "fp8", "fbgemm", "nvfp4", "mxfp4")
ANEW = ("asymmetric", "act-order", "w4a16-modelopt")


def exported(folder: Path, name: str, **kind: Any) -> Export:
    checkpoint = open_checkpoint(folder / name)
    return export_to(Request(archs.choose(None, checkpoint.config), checkpoint, **kind), folder / f"out-{name}")


def logits(export: Export, **how: Any) -> np.ndarray:
    graph = export.graphs[-1]
    session = open_session(graph_file.load(export, graph), export.folder, **how)
    made: np.ndarray = session.run(["logits"], first_feed(graph, stages.prompt(export), export.dtype))[0]
    return made


def by_tensorrt(export: Export, work: Path) -> np.ndarray:
    """The logits by the network that TensorRT's parser makes, in the new folder `work`."""
    work.mkdir()
    graph = export.graphs[-1]
    with evaluation.evaluator(export, graph, work) as network:
        made: np.ndarray = network.run(first_feed(graph, stages.prompt(export), export.dtype))["logits"]
    return made
