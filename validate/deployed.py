"""Replays a golden pack on what is deployed: an engine on this machine's GPU, or the ONNX files in ONNX Runtime."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmexport.export.progress import Progress, silent
from llmexport.validate import pack, results
from llmexport.validate.compare import Mismatch
from llmexport.validate.pack import Arrays, Graph, Pack
from llmexport.validate.replay import Replay, Run, check_same, outside, replay
from llmexport.validate.report import Report

if TYPE_CHECKING:
    from llmexport.export.exported import Export


def on_engine(folder: Path, golden: Path, *, save: Path | None = None, progress: Progress = silent) -> Report:
    """The report on the engine in a folder, which needs neither torch nor a checkpoint, nor ONNX.

    Raises EngineError if it cannot run here, Mismatch if the pack is of another export. `save`: see `results`.
    """
    from llmexport.validate import engine

    results.check(save)
    with pack.read(golden) as opened:
        record = engine.engine_record.read(folder)
        graphs = {n: Graph(p.model_sha256, p.inputs, p.outputs, p.carried) for n, p in record.graphs.items()}
        check_same(opened, graphs, f"the engine in {folder}")
        progress("check the engine", 0, 2)
        record, note = engine.check(folder)

        def fits(graph: str, feed: Arrays) -> str:
            return outside(record.graphs[graph].inputs, record.profile, feed)

        progress("engine", 1, 2)
        with engine.started(folder, record) as session:
            done = replay(opened, "engine / golden pack", session.run, fits, keep=save is not None)
        progress("engine", 2, 2)
        return _report(opened, done, "engine", save, note)


def on_onnx_runtime(folder: Path, golden: Path, *, save: Path | None = None, progress: Progress = silent) -> Report:
    """The report on the ONNX files of the export in a folder, which needs no checkpoint's own modelling code."""
    from llmexport.export import manifest
    from llmexport.validate import golden as maker
    from llmexport.validate.runners import not_runnable

    results.check(save)
    export = manifest.read(folder)
    with pack.read(golden) as opened:
        check_same(opened, maker.graphs(export), f"the export in {folder}")
        if reason := not_runnable(export.dtype):
            raise Mismatch(reason)
        progress("ONNX Runtime", 0, 1)
        with _onnx_runtime(export) as run:
            done = replay(opened, "ONNX Runtime / golden pack", run, keep=save is not None)
        progress("ONNX Runtime", 1, 1)
        return _report(opened, done, "onnxruntime", save, "")


@contextlib.contextmanager
def _onnx_runtime(export: Export) -> Iterator[Run]:
    from llmexport.export import graph_file
    from llmexport.validate.runners import onnx_runner

    with contextlib.ExitStack() as stack:
        runners = {
            g.name: stack.enter_context(onnx_runner(graph_file.load(export, g), export.folder)) for g in export.graphs
        }

        def run(graph: str, feed: Arrays) -> Arrays:
            # A runner may write its next outputs into the same memory.
            return {n: np.copy(a) for n, a in runners[graph].infer(feed, check_inputs=False).items()}

        yield run


def _report(opened: Pack, done: Replay, key: str, save: Path | None, note: str) -> Report:
    rung = done.rung
    rung.key = key
    rung.note = "; ".join(filter(None, [rung.note, note, f"the pack: {opened.header.reference}"]))
    if save is not None:
        results.save(save, {"golden pack": done.expected, rung.name.partition(" / ")[0]: done.found})
    return Report([rung], {}, {}, weights="not read", asked=(key,))
