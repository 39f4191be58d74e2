"""Exports of quantised checkpoints, and what they compute."""

from pathlib import Path
from typing import Any

import numpy as np
from first_feed import first_feed

from llmexport.export import archs, evaluation, graph_file
from llmexport.export.assembly import parts
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.exported import Export
from llmexport.export.onnx_file import Request
from llmexport.export.onnx_file import write as export_to
from llmexport.export.packed.repack import FILE
from llmexport.export.spec import Experts
from llmexport.validate import stages
from llmexport.validate.compare import compare
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


def storages(export: Export) -> set[Any]:
    """How experts are stored."""
    every = [p.block for s in export.steps for p in parts(s)]
    return {b.storage for b in every if isinstance(b, Experts)}


def check_meaning(form: str, ours: Export, plain: Export) -> None:
    """That an export computes with what the numbers of its form mean, and packs anew what this form wants."""
    expected = logits(plain)
    assert np.abs(expected).max() > 0.5
    difference = compare(expected, logits(ours))
    assert difference.max_abs <= 1e-5
    assert difference.rms_ratio <= 1e-6
    in_place = form.startswith(IN_PLACE) and not form.endswith(ANEW)
    assert (FILE in [w.file for w in ours.weights]) is not in_place
