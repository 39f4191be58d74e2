"""From a checkpoint to ONNX and on to an engine: `export`, then `build_engine`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmexport.export.progress import Progress, silent

if TYPE_CHECKING:
    from llmexport.export.engine_record import Engine
    from llmexport.export.exported import Export

__all__ = ["build_engine", "export"]
# What each function needs is imported when it is called: a command pays for what it does.


def export(
    checkpoint: str | os.PathLike[str] | None,
    output: str | os.PathLike[str],
    *,
    arch: str | None = None,
    dtype: str = "float32",
    block: str | None = None,
    weights: str = "auto",
    target: str = "portable",
    digest: bool = False,
    cache: str = "dynamic",
    max_tokens: int | None = None,
    logits: str = "all",
    part: str | None = None,
    runtimes: Sequence[str] = (),
    quantize: str | None = None,
    group_size: int | None = None,
    quantize_head: bool = False,
    window_slots: str = "auto",
    force: bool = False,
    progress: Progress = silent,
) -> Export:
    """Exports a checkpoint to the new folder `output`, which appears whole or not at all.

    checkpoint: a folder with config.json and safetensors; None for the tiny random one of `arch`. block: one by its
    name, None for the whole model. runtimes: as `--for`. The other arguments are the options of `llmexport onnx`.
    Raises UserError (llmexport.plugins.errors), with one line that says what to do.
    """
    from llmexport.export import onnx_file
    from llmexport.export.folder import folder_path
    from llmexport.export.source import chosen, open_source

    folder = folder_path(output)
    part, source = chosen(part, checkpoint), None if checkpoint is None else folder_path(checkpoint)
    with open_source(arch, source, folder, part) as (named, found):
        request = onnx_file.Request(
            *(named, found, dtype, block, weights, target, digest, cache, max_tokens),
            runtimes=tuple(runtimes),
            logits=logits,
            part=part,
            quantize=quantize,
            group_size=group_size,
            quantize_head=quantize_head,
            window_slots=window_slots,
        )
        return onnx_file.write(request, folder, force=force, progress=progress)


def build_engine(
    folder: str | os.PathLike[str],
    *,
    backend: str = "tensorrt-rtx",
    profile: str | None = None,
    plugins: bool = True,
    weights: str = "inside",
    timeout: float | None = None,
    verify: bool = False,
    progress: Progress = silent,
) -> Engine:
    """Builds a TensorRT engine of each graph of the export in `folder`, and writes them there.

    The arguments are the options of `llmexport engine`: `profile` is as in "batch=1:1:4,sequence=1:64:512". Raises
    UserError (llmexport.plugins.errors), with one line that says what to do.
    """
    from llmexport.export import engine
    from llmexport.export.folder import folder_path
    from llmexport.export.profile import parse_profile
    from llmexport.plugins import library

    return engine.build(
        folder_path(folder),
        backend=backend,
        profile=None if profile is None else parse_profile(profile),
        plugins=library.find() if plugins else None,
        weights=weights,
        timeout=timeout,
        verify=verify,
        progress=progress,
    )
