"""Outputs as Polygraphy's RunResults, which `polygraphy inspect data` and `polygraphy run --load-outputs` read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from llmexport.export.output import check_new_file, new_file
from llmexport.plugins.regular import open_regular

MARK = b'"polygraphy_class": "RunResults"'
TAIL = 200  # bytes at the end of a file that hold the mark


def check(path: Path | None) -> None:
    """Raise ExportError, before the work, if results cannot be written there."""
    if path is not None:
        check_new_file(path, force=True, ours=is_results)


def save(path: Path, runs: Mapping[str, Sequence[Mapping[str, np.ndarray]]]) -> None:
    """Writes the outputs of each stage, by the name of the runner; earlier results are replaced, nothing else is."""
    from polygraphy.comparator import IterationResult, RunResults

    results = RunResults()
    for name, stages in runs.items():
        wide = [{n: _plain(a) for n, a in outputs.items()} for outputs in stages]
        results.append((name, [IterationResult(outputs=o, runner_name=name) for o in wide]))
    with new_file(path, force=True, ours=is_results) as file:
        file.write(results.to_json().encode())


def is_results(path: Path) -> bool:
    """Whether a file has such results."""
    with open_regular(path) as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        return MARK in file.read()


def _plain(array: np.ndarray) -> np.ndarray:
    """An array of a type that numpy has without ml_dtypes."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array
