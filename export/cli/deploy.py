"""llmexport deploy"""

from __future__ import annotations

from pathlib import Path

import click

from llmexport.export.cli import engine as engine_command
from llmexport.export.cli import onnx as onnx_command
from llmexport.export.cli import source
from llmexport.export.cli import validate as validate_command
from llmexport.export.cli.console import Console, size, talkative
from llmexport.export.cli.folder import FOLDER


@click.command("deploy")
@source.options
@source.caching
@source.quantizing
@click.option("-o", "--output", type=FOLDER, help="The folder to make; default: ARCH-deploy.")
@engine_command.options
@talkative
def command(
    arch: str | None,
    checkpoint: Path | None,
    dtype: str,
    weights: str,
    force: bool,
    cache: str,
    max_tokens: int | None,
    window_slots: str,
    logits: str,
    part: str | None,
    quantize: str | None,
    group_size: int | None,
    quantize_head: bool,
    output: Path | None,
    backend: str,
    profile: str | None,
    plugins: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Export to ONNX, build an engine, compare with PyTorch: the three commands in one go.

    Exit code 1 if a rung of the comparison fails.
    """
    from llmexport.export import engine, engine_backend, manifest, onnx_file
    from llmexport.export.placing import openings
    from llmexport.export.profile import parse_profile
    from llmexport.export.source import chosen, open_source
    from llmexport.plugins import library
    from llmexport.validate import validate

    console = Console(quiet, as_json)
    engine_backend.check_backend(backend)
    sizes = None if profile is None else parse_profile(profile)
    kernels = library.find() if plugins else None
    part = chosen(part, checkpoint)
    with open_source(arch, checkpoint, output or Path("deploy"), part) as (named, found):
        request = onnx_file.Request(
            *(named, found, dtype, None, weights),
            cache=cache,
            max_tokens=max_tokens,
            logits=logits,
            part=part,
            quantize=quantize,
            group_size=group_size,
            quantize_head=quantize_head,
            window_slots=window_slots,
        )
        target = output or Path(f"{named.name}-deploy")
        # The three steps fill one new folder, which appears when all are done.
        with onnx_file.new_export(request, target, force=force) as folder:
            onnx_file.fill(request, folder, console.progress)
            built = engine.build(folder, backend=backend, profile=sizes, plugins=kernels, progress=console.progress)
            report = validate(folder, progress=console.progress)
            # With the digests that a first validation records.
            export = manifest.read(folder)
    files = {p.name: p.stat().st_size for p in sorted(target.iterdir()) if p.suffix != ".safetensors"}
    rows = [
        *onnx_command.summary(export, target),
        *engine_command.summary(built),
        ("files", ", ".join(f"{n} {size(b)}" for n, b in files.items())),
        *validate_command.summary(report),
    ]
    # Two steps may have read the same of the weights.
    console.table(f"{named.name} in {target}", (), list(dict.fromkeys(rows)))
    console.notes(export.notes)
    console.lines(openings([target]))
    console.result({"manifest": manifest.as_data(export), "engine": built.as_data(), "report": report.as_data()})
    return 0 if report.passed else 1
