"""llmexport onnx"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from llmexport.export import onnx_file
from llmexport.export.cli import source
from llmexport.export.cli.console import Console, size, talkative
from llmexport.export.placing import openings


@click.command("onnx")
@source.options
@click.option(
    "--target",
    type=click.Choice(["portable", "tensorrt"]),
    default="portable",
    show_default=True,
    help="portable runs everywhere; tensorrt is for trtexec with our plugins: no function bodies.",
)
@click.option("--block", help="Export one block alone by its name, or `all`: each in a folder of its own.")
@click.option("--digest", is_flag=True, help="Read every byte of the weights and record digests, for --verify.")
@click.option("-o", "--output", type=source.FOLDER, required=True, help="The folder to make.")
@talkative
def command(
    arch: str | None,
    checkpoint: Path | None,
    dtype: str,
    weights: str,
    force: bool,
    target: str,
    block: str | None,
    digest: bool,
    output: Path,
    quiet: bool,
    as_json: bool,
) -> None:
    """Export a checkpoint to ONNX: the whole model, or one of its blocks."""
    console = Console(quiet, as_json)
    with source.open_source(arch, checkpoint, output) as (named, found):
        request = onnx_file.Request(named, found, dtype, None if block == "all" else block, weights, target, digest)
        if block == "all":
            records = onnx_file.write_blocks(request, output, force=force, progress=console.progress)
            console.table(
                f"{named.name}: {len(records)} blocks in {output}",
                ("block", "inputs", "outputs", "custom ops"),
                [(n, names(r["inputs"]), names(r["outputs"]), counts(r["ops"])) for n, r in records.items()],
            )
            console.lines(openings(output / name for name in records))
            console.result(records)
            return
        record = onnx_file.write(request, output, force=force, progress=console.progress)
    console.table(f"{named.name} in {output}", (), summary(record, output))
    console.lines(openings([output]))
    console.result(record)


def summary(record: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Rows of what was exported: blocks, ops, fusions, files."""
    kinds = [record["blocks"][s["block"]]["is"] for s in record["steps"]]
    blocks = ", ".join(f"{kinds.count(k)} {k}" for k in dict.fromkeys(kinds))
    fusions = record["fusions"]
    refused: dict[str, list[str]] = {}
    for name, reason in (r for f in fusions.values() for r in f["refused"]):
        refused.setdefault(reason, []).append(name)
    shared = {f["file"] for f in record["weights"]["files"] if f["placed"] == "reflink"}
    new = [p for p in folder.rglob("*") if p.is_file() and p.stat().st_nlink == 1 and p.name not in shared]
    held = sum(f["bytes"] for f in record["weights"]["files"])
    return [
        ("blocks", f"{blocks} ({len(record['blocks'])} distinct, each traced once)"),
        ("custom ops", counts(record["ops"])),
        ("fused", counts({n.removeprefix("fuse_"): f["count"] for n, f in fusions.items()})),
        ("left unfused", "; ".join(f"{few(names)}: {why}" for why, names in refused.items()) or "nothing"),
        ("dtype", record["dtype"]),
        ("weights", f"{len(record['weights']['files'])} files, {size(held)}, {record['weights']['placed']}"),
        ("beside them", ", ".join(record["companions"]) or "nothing"),
        ("new bytes on disk", size(sum(p.stat().st_size for p in new))),
    ]


def counts(numbers: dict[str, int]) -> str:
    return ", ".join(f"{n} {what}" for what, n in numbers.items()) or "none"


def few(found: list[str]) -> str:
    """A list of names, cut."""
    return ", ".join(found[:2]) + (f" and {len(found) - 2} more" if len(found) > 2 else "")


def names(ports: list[dict[str, Any]]) -> str:
    return ", ".join(p["name"] for p in ports)
