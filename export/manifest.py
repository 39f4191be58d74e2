"""`manifest.json`: what an export holds, so that later steps start from its files and derive nothing again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmexport.export import cache
from llmexport.export.checkpoint import Checkpoint, Shard, StoredTensor, read_header
from llmexport.export.errors import ExportError
from llmexport.export.spec import Assembly, Port, Step, from_data, to_data
from llmexport.plugins.regular import read_regular

if TYPE_CHECKING:
    from llmexport.export.onnx_file import Built, Request

NAME = "manifest.json"
FORMAT = 1
KEYS = {"arch", "block", "dtype", "target", "opset", "ops", "versions", "config"}  # that later steps read
MOST = 100_000_000  # bytes; of the deepest known models it has a hundredth
PAGES, PAGE = 64, 4096  # of a weight file, for its sample digest


def record(request: Request, assembly: Assembly, built: Built, shards: list[Shard], placed: str) -> dict[str, Any]:
    """The manifest of an export, as JSON data."""
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
        "weights": {
            "placed": placed,
            "files": [_identity(request.checkpoint.folder / s.file, s) for s in shards],
        },
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


@dataclass(frozen=True)
class Manifest:
    """A manifest as read back, with the assembly and the weights of its steps (path in block -> tensor or tensors)."""

    folder: Path
    data: dict[str, Any]
    assembly: Assembly
    step_weights: dict[str, dict[str, str | list[str]]]

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
        assembly, step_weights = _assembly(data)
        files = [
            (folder / f["file"], f["bytes"], f["header_sha256"], f["sample_sha256"]) for f in data["weights"]["files"]
        ]
        missing = KEYS - data.keys()
        if missing:
            raise KeyError(*missing)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ExportError(f"{path} is damaged or of another version ({error!r}): export again") from error
    except OSError as error:
        raise ExportError(f"cannot read {path}: {error.strerror}: export again") from error
    for file, *identity in files:
        _check_unchanged(file, identity)
    return Manifest(folder, data, assembly, step_weights)


def _assembly(data: dict[str, Any]) -> tuple[Assembly, dict[str, dict[str, str | list[str]]]]:
    blocks = [from_data(b) for b in data["blocks"]]
    steps = tuple(
        Step(s["name"], blocks[s["block"]], tuple(s["inputs"]), tuple(s["outputs"]), s["path"]) for s in data["steps"]
    )
    ports = [tuple(Port(p["name"], tuple(p["shape"]), p["dtype"]) for p in data[k]) for k in ("inputs", "outputs")]
    return Assembly(ports[0], steps, ports[1]), {s["name"]: s["weights"] for s in data["steps"]}


def _identity(path: Path, shard: Shard) -> dict[str, Any]:
    """What tells a weight file from another of its size, without reading it whole."""
    sample = _sample(path, shard.nbytes)
    return {"file": shard.file, "bytes": shard.nbytes, "header_sha256": shard.header_sha256, "sample_sha256": sample}


def _sample(path: Path, size: int) -> str:
    """SHA-256 of PAGES pages spread evenly over the file: other weights of the same shapes differ in all of them."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        for i in range(PAGES):
            digest.update(os.pread(file.fileno(), PAGE, size * i // PAGES))
    return digest.hexdigest()


def _check_unchanged(path: Path, identity: list[Any]) -> None:
    """A hard-linked shard is the checkpoint's own file: whoever overwrites one changes the other."""
    if not path.is_file():
        raise ExportError(f"{path} is missing from the export: export again")
    _, shard = read_header(path)
    if [shard.nbytes, shard.header_sha256, _sample(path, shard.nbytes)] != identity:
        raise ExportError(f"{path} is not the file that was exported, it has changed since: export again")


def _retype(port: Port, dtype: str) -> Port:
    return dataclasses.replace(port, dtype="float32") if port.dtype == dtype else port


def _port(port: Port, dtype: str) -> dict[str, Any]:
    return {"name": port.name, "shape": port.shape, "dtype": dtype if port.dtype == "T" else port.dtype}
