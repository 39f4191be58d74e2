"""Runs the same tokens through transformers, our PyTorch and ONNX Runtime, and compares: `validate`."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from llmexport.export.errors import ExportError
from llmexport.export.progress import Progress, silent

if TYPE_CHECKING:
    from llmexport.validate.report import Report

__all__ = ["validate"]


def validate(
    folder: str | os.PathLike[str],
    *,
    rungs: Collection[str] | None = None,
    tokens: int | None = None,
    seed: int = 0,
    save_results: Path | None = None,
    verify: bool = False,
    bisect: bool = False,
    reference: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
) -> Report:
    """The report on the export in `folder`, also written there.

    The arguments are the options of `llmexport validate`. The first validation that passes adds digests of all bytes
    of the weights to the manifest. Raises UserError (llmexport.plugins.errors), with one line that says what to do.
    """
    # What takes long to import is imported when it is needed.
    import dataclasses
    import functools

    from llmexport.export import graph_file, manifest
    from llmexport.export.folder import folder_path
    from llmexport.validate import ladder, results
    from llmexport.validate.page import write

    for name, value, least in (("tokens", tokens, 2), ("seed", seed, 0)):
        if value is not None and value < least:
            raise ExportError(f"{name} is {value}: make it {least} or more")
    ladder.check_rungs(rungs)
    folder = folder_path(folder)
    export = manifest.read(folder)
    if not os.access(folder, os.W_OK):
        raise ExportError(f"{folder} cannot be written to, and the report belongs there: copy the export elsewhere")
    check_memory(tokens or 0)
    graph_file.check_files(export)
    results.check(save_results)
    if save_results and export.block is not None:
        raise ExportError(f"{folder} is one block: results are saved of a whole model")
    first = not manifest.has_digests(export)
    if first or verify:
        progress("read the weights", 0, 1)
        export = manifest.digested(export) if first else manifest.verified(export)
    keep = functools.partial(results.save, save_results) if save_results else None
    wide = folder_path(reference) if reference else None
    climb = functools.partial(ladder.climb, rungs=rungs, tokens=tokens, seed=seed, bisect=bisect, reference=wide)
    report = climb(export, keep=keep, progress=progress)
    export.check_untouched()
    # Where a rung failed, nothing is recorded that later runs would trust.
    report.weights = (export if report.passed else dataclasses.replace(export, digested=False)).checked
    write(export, report)
    if report.passed and (first or verify):
        manifest.rewrite(manifest.restamp(export))
    return report


def check_memory(tokens: int) -> None:
    """Raise ExportError on a prompt that would take the whole machine down before any error."""
    # Two rows, a score in fp32 of each token for each: less than one layer takes.
    least, there = 8 * tokens**2, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if least > there:
        raise ExportError(
            f"--tokens {tokens}: their attention takes {least / 1e9:.3g} GB or more, this machine has "
            f"{there / 1e9:.3g} GB: name fewer"
        )
