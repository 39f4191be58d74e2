"""A golden pack is what an export is fed and must give: it is replayed on ONNX Runtime, and finds what is wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from arch_cases import FIRST, Case, others_slow

from llmexport.export import graph_file, manifest
from llmexport.export.exported import Export
from llmexport.validate import golden, pack, replay
from llmexport.validate.pack import Arrays
from llmexport.validate.replay import Replay
from llmexport.validate.runners import onnx_runner

pytestmark = pytest.mark.model

PACKED = [(c, d) for d in ("float32", "float16") for c in FIRST]
Change = Callable[[str, Arrays], None]


def make(export: Export, path: Path, **options: int) -> Path:
    golden.make(export, path, tokens=options.get("tokens"), seed=options.get("seed", 0), force=False)
    return path


@contextlib.contextmanager
def onnx_runtime(export: Export) -> Iterator[replay.Run]:
    with contextlib.ExitStack() as stack:
        runners = {
            g.name: stack.enter_context(onnx_runner(graph_file.load(export, g), export.folder)) for g in export.graphs
        }
        yield lambda graph, feed: {n: np.copy(a) for n, a in runners[graph].infer(feed, check_inputs=False).items()}


def replayed(export: Export, path: Path, change: Change = lambda graph, outputs: None) -> Replay:
    """The pack on ONNX Runtime, whose outputs are changed."""
    with pack.read(path) as opened, onnx_runtime(export) as run:
        replay.check_same(opened, golden.graphs(export), "the export")

        def changed(graph: str, feed: Arrays) -> Arrays:
            outputs = run(graph, feed)
            change(graph, outputs)
            return outputs

        return replay.replay(opened, "ONNX Runtime / golden pack", changed)


@pytest.mark.parametrize(
    ("case", "dtype"),
    others_slow(PACKED, [(c, d) for c, d in PACKED if c.arch == "gemma" or (c.arch, d) == ("bert", "float32")]),
    ids=str,
)
def test_onnx_runtime_gives_what_the_pack_says(case: Case, dtype: str, exported, tmp_path: Path) -> None:
    export = manifest.read(exported(case, dtype))
    path = make(export, tmp_path / "pack.npz")
    found = replayed(export, path)
    assert (found.rung.status, found.rung.note) == ("pass", "")
    with pack.read(path) as opened:
        names = [s.name for s in opened.header.stages]
    assert len(found.rung.details) >= len(names)
    assert {d["step"] for d in found.rung.details} == set(names)
