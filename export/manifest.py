"""`manifest.json`: what an export holds, so that later steps start from its files and derive nothing again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmexport.export.earlier import EXPORT as NAME
from llmexport.export.errors import ExportError
from llmexport.export.exported import Export, ExportedGraph
from llmexport.export.identity import WHOLE, WeightFile, changed, examine, whole_digest
from llmexport.export.output import write_files
from llmexport.export.spec import Assembly, Block, Step, from_data, to_data
from llmexport.export.stamp import stamp
from llmexport.graphs.fusion import Fused
from llmexport.plugins.regular import read_regular

FORMAT = 2
SEAL = "manifest_sha256"
MOST = 100_000_000  # bytes; of the deepest known models it has a hundredth


# The fields of an export that are JSON as they are.
OTHERS = {"folder", "graphs", "reference", "weights", "notes", "held", "digested"}
PLAIN = [f.name for f in dataclasses.fields(Export) if f.name not in OTHERS]


def as_data(export: Export) -> dict[str, Any]:
    """The content of its manifest, sealed: every step names its block by the place in `blocks`."""
    blocks = export.blocks
    return seal(
        {"format": FORMAT}
        | {name: getattr(export, name) for name in PLAIN}
        | {
            "cache": "static" if export.max_tokens else "dynamic",
            "max_tokens": export.max_tokens,
            "window_slots": export.window_slots,
            "logits": "last" if export.gives_last_logits else "all",
            "reference": to_data(export.reference),
            "notes": list(export.notes),
            "files": export.files,
            "weights": {"placed": export.placed, "files": [dataclasses.asdict(w) for w in export.weights]},
            "blocks": [to_data(b) for b in blocks],
            "graphs": {g.name: _graph_data(g, blocks) for g in export.graphs},
        }
    )


def _graph_data(graph: ExportedGraph, blocks: tuple[Block, ...]) -> dict[str, Any]:
    assembly = graph.assembly
    return {
        "sha256": graph.sha256,
        "inputs": [to_data(p) for p in assembly.inputs],
        "outputs": [to_data(p) for p in assembly.outputs],
        "carried": graph.carried,
        "ops": graph.ops,
        "fusions": {n: {"count": f.count, "refused": [list(r) for r in f.refused]} for n, f in graph.fusions.items()},
        "steps": [
            {
                "name": s.name,
                "block": blocks.index(s.block),
                "inputs": list(s.inputs),
                "outputs": list(s.outputs),
                "path": s.path,
                "weights": graph.step_weights[s.name],
            }
            for s in assembly.steps
        ],
    }


def from_record(folder: Path, data: Mapping[str, Any]) -> Export:
    """The export that `as_data` described. Raises KeyError, TypeError and the like on other data."""
    blocks = [from_data(b) for b in data["blocks"]]
    if not data["graphs"]:
        raise ValueError("no graph")
    return Export(
        folder,
        **{name: data[name] for name in PLAIN},
        graphs=tuple(_graph(name, graph, blocks) for name, graph in data["graphs"].items()),
        weights=tuple(WeightFile(**w) for w in data["weights"]["files"]),
        reference=from_data(data["reference"]),
        notes=tuple(data["notes"]),
    )


def _graph(name: str, data: Mapping[str, Any], blocks: list[Block]) -> ExportedGraph:
    steps = tuple(
        Step(s["name"], blocks[s["block"]], tuple(s["inputs"]), tuple(s["outputs"]), s["path"]) for s in data["steps"]
    )
    assembly = Assembly(from_data(data["inputs"]), steps, from_data(data["outputs"]))
    weights = {s["name"]: {path: from_data(names) for path, names in s["weights"].items()} for s in data["steps"]}
    fusions = {n: Fused(f["count"], [(r[0], r[1]) for r in f["refused"]]) for n, f in data["fusions"].items()}
    return ExportedGraph(name, assembly, data["carried"], weights, data["ops"], fusions, data["sha256"])


def seal(data: dict[str, Any]) -> dict[str, Any]:
    """The same with a digest of its own content, whatever its order and layout."""
    content = {k: v for k, v in data.items() if k != SEAL}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return content | {SEAL: hashlib.sha256(text.encode()).hexdigest()}


def encode(data: dict[str, Any]) -> bytes:
    return json.dumps(data, indent=1).encode()


def verified(export: Export) -> Export:
    """The same after every byte of its weights was read. Raises ExportError if one is another, or none can tell."""
    moved = stamp(export.folder).inode != export.inode
    held = {
        w.file: found
        if (found := export.held[w.file]).how == WHOLE
        else examine(export.folder / w.file, w, moved=moved, whole=True)
        for w in export.weights
    }
    return dataclasses.replace(export, held=held)


def has_digests(export: Export) -> bool:
    return all(w.whole_sha256 is not None for w in export.weights)


def digested(export: Export) -> Export:
    """The same with digests of all bytes of its weights as they lie there, for a later `verified`."""
    weights = tuple(dataclasses.replace(w, whole_sha256=whole_digest(export.folder / w.file)) for w in export.weights)
    export.check_untouched()
    return dataclasses.replace(export, weights=weights, digested=True)


def restamp(export: Export) -> Export:
    """The same with the inodes and times of its weights and folder as they are now, all bytes having been read."""
    stamps = {name: held.stamp for name, held in export.held.items()}
    weights = tuple(
        dataclasses.replace(w, inode=stamps[w.file].inode, mtime_ns=stamps[w.file].mtime_ns) for w in export.weights
    )
    return dataclasses.replace(export, weights=weights, inode=stamp(export.folder).inode)


def rewrite(export: Export) -> None:
    """Replace the manifest of an export by what it says now."""
    write_files(export.folder, {NAME: encode(as_data(export))})


def read(folder: Path) -> Export:
    """The export in `folder`. Raises ExportError if there is none, or its weights have changed."""
    path = folder / NAME
    if not path.exists():
        blocks = sorted(p.parent.name for p in folder.glob(f"*/{NAME}"))
        hint = f"name one of its blocks: {', '.join(blocks)}" if blocks else "make one with `llmexport onnx`"
        raise ExportError(f"{folder} is no export, it has no {NAME}: {hint}")
    try:
        data = json.loads(read_regular(path, MOST))
        if data["format"] != FORMAT:
            raise ExportError(f"{path} is of format {data['format']}, this version reads {FORMAT}: export again")
        if data[SEAL] != seal(data)[SEAL]:
            raise changed(path)
        export = from_record(folder, data)
        moved = stamp(folder).inode != export.inode
        held = {w.file: examine(folder / w.file, w, moved=moved) for w in export.weights}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        raise ExportError(f"{path} is damaged or of another version ({error!r}): export again") from error
    except OSError as error:
        raise ExportError(f"cannot read {error.filename or path}: {error.strerror}: export again") from error
    return dataclasses.replace(export, held=held)
