"""llmexport onnx"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmexport.export.cli import source
from llmexport.export.cli.choice import ChoiceOf
from llmexport.export.cli.console import Console, size, talkative
from llmexport.export.cli.folder import FOLDER

if TYPE_CHECKING:
    from llmexport.export.exported import Export
    from llmexport.export.spec import Port


@click.command("onnx")
@source.options
@click.option(
    "--target",
    type=ChoiceOf("llmexport.export.onnx_file", "TARGETS"),
    default="portable",
    show_default=True,
    help="portable runs everywhere; tensorrt is for trtexec with our plugins: no function bodies.",
)
@source.caching
@click.option(
    "--block",
    help="Export one block alone by its name, or `all`: each in a folder of its own; without "
    "--arch and --checkpoint, a known block of no model, as deep_norm or gqa.",
)
@click.option(
    "--for",
    "runtimes",
    type=ChoiceOf("llmexport.export.handover", "RUNTIMES"),
    multiple=True,
    help="Write what another runtime wants in the folder too: onnxruntime-genai, or optimum's ORTModelForCausalLM.",
)
@source.quantizing
@click.option("--digest", is_flag=True, help="Read every byte of the weights and record digests, for --verify.")
@click.option("-o", "--output", type=FOLDER, required=True, help="The folder to make.")
@talkative
def command(
    arch: str | None,
    checkpoint: Path | None,
    dtype: str,
    weights: str,
    force: bool,
    target: str,
    cache: str,
    max_tokens: int | None,
    window_slots: str,
    logits: str,
    part: str | None,
    block: str | None,
    runtimes: tuple[str, ...],
    quantize: str | None,
    group_size: int | None,
    quantize_head: bool,
    digest: bool,
    output: Path,
    quiet: bool,
    as_json: bool,
) -> None:
    """Export a checkpoint to ONNX: the whole model, or one of its blocks."""
    from llmexport.export import onnx_file
    from llmexport.export.manifest import as_data
    from llmexport.export.placing import openings
    from llmexport.export.source import chosen, open_source

    console = Console(quiet, as_json)
    part = chosen(part, checkpoint)
    with open_source(arch, checkpoint, output, part, block) as (named, found):
        one = None if block == "all" else block
        kind = (dtype, one, weights, target, digest, cache, max_tokens, runtimes, logits, part)
        request = onnx_file.Request(named, found, *kind, quantize, group_size, quantize_head, window_slots=window_slots)
        if block == "all":
            exports = onnx_file.write_blocks(request, output, force=force, progress=console.progress)
            console.table(
                f"{named.name}: {len(exports)} blocks in {output}",
                ("block", "inputs", "outputs", "custom ops"),
                [(n, *ports(e), counts(ops(e))) for n, e in exports.items()],
            )
            console.notes(list(dict.fromkeys(note for e in exports.values() for note in e.notes)))
            console.lines(openings(output / name for name in exports))
            console.result(lambda: {name: as_data(e) for name, e in exports.items()})
            return
        export = onnx_file.write(request, output, force=force, progress=console.progress)
    console.table(f"{named.name} in {output}", (), summary(export, output))
    console.notes(export.notes)
    console.lines(openings([output]))
    console.result(lambda: as_data(export))


def summary(export: Export, folder: Path) -> list[tuple[str, str]]:
    """Rows of what was exported: graphs but one that is a whole model, blocks, ops, fusions, files."""
    blocks = counts(Counter(type(s.block).__name__ for s in export.steps))
    fused: Counter[str] = Counter()
    refused: dict[str, list[str]] = {}
    for graph, name, fusion in ((g.name, *f) for g in export.graphs for f in g.fusions.items()):
        fused[name.removeprefix("fuse_")] += fusion.count
        for node, reason in fusion.refused:
            refused.setdefault(reason, []).append(export.place(graph, node))
    shared = {w.file for w in export.weights if w.placed == "reflink"}
    new = [p for p in folder.rglob("*") if p.is_file() and p.stat().st_nlink == 1 and p.name not in shared]
    held = sum(w.bytes for w in export.weights)
    return [
        *_flows(export),
        ("blocks", f"{blocks} ({len(export.blocks)} distinct, each traced once)"),
        ("custom ops", counts(ops(export))),
        ("fused", counts(fused)),
        ("left unfused", "; ".join(f"{few(names)}: {why}" for why, names in refused.items()) or "nothing"),
        ("dtype", export.dtype),
        *([("logits", "of the last token of each row")] if export.gives_last_logits else []),
        *([("cache", f"static, {export.max_tokens} tokens")] if export.max_tokens else []),
        ("weights", f"{len(export.weights)} files, {size(held)}, {export.placed}"),
        ("beside them", ", ".join(export.companions) or "nothing"),
        ("new bytes on disk", size(sum(p.stat().st_size for p in new))),
    ]


def _flows(export: Export) -> Iterator[tuple[str, str]]:
    """What each graph takes and gives beside what it carries, and which graph makes what another takes."""
    from llmexport.export.spec import ONLY

    made: dict[str, str] = {}
    for graph in export.graphs if [g.name for g in export.graphs] != [ONLY] else ():
        taken = [p for p in graph.assembly.inputs if p.name not in graph.carried]
        given = [p for p in graph.assembly.outputs if p.name not in graph.carried.values()]
        takes = [f"{_shaped(p)} of {made[p.name]}" if p.name in made else _shaped(p) for p in taken]
        carries = f", and carries {len(graph.carried)} states" if graph.carried else ""
        yield graph.file, f"{', '.join(takes)} -> {', '.join(map(_shaped, given))}{carries}"
        made |= {p.name: graph.file for p in given}


def _shaped(port: Port) -> str:
    return f"{port.name} [{', '.join(map(str, port.shape))}]"


def ops(export: Export) -> Mapping[str, int]:
    """How often each custom op occurs in all graphs."""
    return sum((Counter(g.ops) for g in export.graphs), Counter())


def ports(export: Export) -> tuple[str, str]:
    """The names of the inputs and of the outputs of a graph that is alone."""
    assembly = export.graphs[0].assembly
    return ", ".join(p.name for p in assembly.inputs), ", ".join(p.name for p in assembly.outputs)


def counts(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {what}" for what, n in numbers.items()) or "none"


def few(found: list[str]) -> str:
    """A list of names, cut."""
    return ", ".join(found[:2]) + (f" and {len(found) - 2} more" if len(found) > 2 else "")
