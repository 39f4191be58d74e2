"""`manifest.json`: what an export holds, so that later steps start from its files and derive nothing again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmexport.export import cache
from llmexport.export.checkpoint import Checkpoint, StoredTensor, read_header
from llmexport.export.errors import ExportError
from llmexport.export.identity import SAYS, WAYS, Held, changed, examine, whole_digest
from llmexport.export.output import write_files
from llmexport.export.spec import Assembly, Port, Step, from_data, to_data
from llmexport.export.stamp import check_stamp, read_errors, stamp
from llmexport.plugins.regular import read_regular

if TYPE_CHECKING:
    from llmexport.export.onnx_file import Built, Request

NAME, MODEL = "manifest.json", "model.onnx"
FORMAT = 2
SEAL = "manifest_sha256"
# That later steps read.
KEYS = {"arch", "block", "dtype", "target", "opset", "ops", "versions", "config", "model_sha256", "files"}
MOST = 100_000_000  # bytes; of the deepest known models it has a hundredth


def record(request: Request, assembly: Assembly, built: Built, weights: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest of an export, as JSON data, but for what its folder holds; weights: of each file, its identity."""
    blocks = assembly.blocks
    return {
        "format": FORMAT,
        "arch": request.arch.name,
        "block": request.block,
        "dtype": request.dtype,
        "target": request.target,
        "opset": built.proto.opset_import[0].version,
        "inputs": [_port(p, request.dtype) for p in assembly.inputs],
        "outputs": [_port(p, request.dtype) for p in assembly.outputs],
        "ops": built.ops,
        "fusions": built.fusions,
        "weights": {"placed": "+".join(sorted({w["placed"] for w in weights}, key=WAYS.index)), "files": weights},
        "versions": cache.versions(),
        "config": request.checkpoint.config,
        "blocks": [to_data(b) for b in blocks],
        "steps": [
            {
                "name": s.name,
                "block": blocks.index(s.block),
                "inputs": s.inputs,
                "outputs": s.outputs,
                "path": s.path,
                "weights": built.step_weights[s.name],
            }
            for s in assembly.steps
        ],
    }


def finish(folder: Path, data: dict[str, Any], companions: Mapping[str, str], model: bytes) -> dict[str, Any]:
    """The rest of a manifest: what the folder holds beside the weights, and the digests that later steps check."""
    files = sorted({NAME, MODEL, *companions, *(w["file"] for w in data["weights"]["files"])})
    return seal(
        data
        | {"companions": dict(companions), "files": files, "inode": stamp(folder).inode}
        | {"model_sha256": hashlib.sha256(model).hexdigest()}
    )


def seal(data: dict[str, Any]) -> dict[str, Any]:
    """The same with a digest of its own content, whatever its order and layout."""
    content = {k: v for k, v in data.items() if k != SEAL}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return content | {SEAL: hashlib.sha256(text.encode()).hexdigest()}


def encode(data: dict[str, Any]) -> bytes:
    return json.dumps(data, indent=1).encode()


@dataclass(frozen=True)
class Manifest:
    """A manifest as read back, with the assembly and the weights of its steps (path in block -> tensor or tensors).

    `held`: how each weight file was found; `digested`: digests of all their bytes were recorded just now.
    """

    folder: Path
    data: dict[str, Any]
    assembly: Assembly
    step_weights: dict[str, dict[str, str | list[str]]]
    held: dict[str, Held]
    digested: bool = False

    def checkpoint(self) -> Checkpoint:
        """The weights that lie in the export's folder."""
        tensors: dict[str, StoredTensor] = {}
        shards = []
        for file in self.data["weights"]["files"]:
            held, shard = read_header(self.folder / file["file"])
            tensors |= held
            shards.append(shard)
        return Checkpoint(self.folder, self.data["config"], tensors, tuple(shards))

    def in_float32(self) -> Manifest:
        """The same model in fp32, where what it computes can be told from how it rounds."""
        assembly = dataclasses.replace(
            self.assembly,
            inputs=tuple(_retype(p, self.dtype) for p in self.assembly.inputs),
            outputs=tuple(_retype(p, self.dtype) for p in self.assembly.outputs),
        )
        return dataclasses.replace(self, data={**self.data, "dtype": "float32"}, assembly=assembly)

    @property
    def dtype(self) -> str:
        return str(self.data["dtype"])

    @property
    def checked(self) -> str:
        """What was read of the weights to tell that they are those that were exported, for people."""
        ways = Counter(held.how for held in self.held.values())
        rest = "read for the first time and their digests recorded" if self.digested else "not read"
        said = [
            f"{ways[how]} of {len(self.held)} files: {text.format(rest=rest)}"
            for how, text in SAYS.items()
            if ways[how]
        ]
        return "; ".join(said) or "no weights"

    def check_untouched(self) -> None:
        """Raise ExportError if a weight file was written or replaced since it was held against the manifest."""
        for name, held in self.held.items():
            path = self.folder / name
            with read_errors(path):
                check_stamp(path, held.stamp, path)


def verified(found: Manifest) -> Manifest:
    """The same after every byte of its weights was read. Raises ExportError if one is another, or none can tell."""
    moved = stamp(found.folder).inode != found.data["inode"]
    entries = found.data["weights"]["files"]
    held = {e["file"]: examine(found.folder / e["file"], e, moved=moved, whole=True) for e in entries}
    return dataclasses.replace(found, held=held)


def has_digests(found: Manifest) -> bool:
    return all("whole_sha256" in entry for entry in found.data["weights"]["files"])


def digested(found: Manifest) -> Manifest:
    """The same with digests of all bytes of its weights as they lie there, for a later `verified`."""
    files = []
    for entry in found.data["weights"]["files"]:
        path = found.folder / entry["file"]
        files.append(entry | {"whole_sha256": whole_digest(path)})
    found.check_untouched()
    data = found.data | {"weights": found.data["weights"] | {"files": files}}
    return dataclasses.replace(found, data=data, digested=True)


def restamp(found: Manifest) -> Manifest:
    """The same with the inodes and times of its weights and folder as they are now, all bytes having been read."""
    files = [
        entry | {"inode": found.held[entry["file"]].stamp.inode, "mtime_ns": found.held[entry["file"]].stamp.mtime_ns}
        for entry in found.data["weights"]["files"]
    ]
    weights = found.data["weights"] | {"files": files}
    return dataclasses.replace(found, data=seal(found.data | {"weights": weights, "inode": stamp(found.folder).inode}))


def rewrite(found: Manifest) -> None:
    """Replace the manifest of an export by this one."""
    write_files(found.folder, {NAME: encode(found.data)})


def read(folder: Path) -> Manifest:
    """The manifest of the export in `folder`. Raises ExportError if it is none, or its weights have changed."""
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
        assembly, step_weights = _assembly(data)
        missing = KEYS - data.keys()
        if missing:
            raise KeyError(*missing)
        moved = stamp(folder).inode != data["inode"]
        held = {f["file"]: examine(folder / f["file"], f, moved=moved) for f in data["weights"]["files"]}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ExportError(f"{path} is damaged or of another version ({error!r}): export again") from error
    except OSError as error:
        raise ExportError(f"cannot read {path}: {error.strerror}: export again") from error
    return Manifest(folder, data, assembly, step_weights, held)


def _assembly(data: dict[str, Any]) -> tuple[Assembly, dict[str, dict[str, str | list[str]]]]:
    blocks = [from_data(b) for b in data["blocks"]]
    steps = tuple(
        Step(s["name"], blocks[s["block"]], tuple(s["inputs"]), tuple(s["outputs"]), s["path"]) for s in data["steps"]
    )
    ports = [
        tuple(Port(p["name"], tuple(p["shape"]), p["dtype"], p["use"]) for p in data[k]) for k in ("inputs", "outputs")
    ]
    return Assembly(ports[0], steps, ports[1]), {s["name"]: s["weights"] for s in data["steps"]}


def _retype(port: Port, dtype: str) -> Port:
    return dataclasses.replace(port, dtype="float32") if port.dtype == dtype else port


def _port(port: Port, dtype: str) -> dict[str, Any]:
    return {
        "name": port.name,
        "shape": port.shape,
        "dtype": dtype if port.dtype == "T" else port.dtype,
        "use": port.use,
    }
