"""A published checkpoint folder, read strictly: whatever does not add up stops the export and is named."""

from __future__ import annotations

import hashlib
import json
import math
import reprlib
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmexport.export.errors import ExportError
from llmexport.export.folder import ADAPTER, INDEX, SINGLE, few, what_it_is
from llmexport.export.packed.read import matrices_of
from llmexport.export.stamp import Stamp, check_stamp, stamp
from llmexport.export.stamp import read_errors as _read_errors
from llmexport.export.stored_tensor import StoredTensor
from llmexport.plugins.dtypes import BY_SAFETENSORS
from llmexport.plugins.regular import open_regular, read_regular

if TYPE_CHECKING:
    import numpy as np

    from llmexport.export.packed.matrix import Matrix

# What ends the names of buffers that follow from the config: some indexes name ones that no shard holds.
BUFFERS = ("rotary_emb.inv_freq",)
# Bytes of an item, by safetensors' name. Types that pack several items in a byte are not read.
ITEMSIZE = {name: d.bits // 8 for name, d in BY_SAFETENSORS.items() if d.bits % 8 == 0}

MAX_HEADER = 100_000_000  # the format's own limit
MAX_TENSORS = 500_000  # in a file; the largest models published have some 100,000
MAX_RANK = 32  # numpy 1 takes no more
MAX_NBYTES = 2**63 - 1  # numpy, ONNX and the file system count in int64

_short = reprlib.Repr()
_short.maxstring = 120
_show = _short.repr  # a value from a file that nobody vouches for, on one line, cut in length and depth


@dataclass(frozen=True, slots=True)
class Shard:
    file: str
    nbytes: int  # of the whole file
    header_sha256: str  # of the header, not of the data: 140 GB open in milliseconds
    stamp: Stamp  # when the header was read


@dataclass(frozen=True, slots=True)
class Checkpoint:
    folder: Path
    config: Mapping[str, Any]
    tensors: dict[str, StoredTensor]  # shard by shard, in the order of their data
    shards: tuple[Shard, ...]
    matrices: Mapping[str, Matrix] = field(default_factory=dict)  # those in few bits, by their names in 16

    @property
    def names(self) -> Set[str]:
        """Of all tensors, and of the matrices that several tensors hold."""
        return self.tensors.keys() | self.matrices.keys()

    def holders(self, name: str) -> tuple[str, ...]:
        """The tensors that hold what is called so."""
        return self.matrices[name].tensors if name in self.matrices else (name,)

    def values(self, name: str) -> np.ndarray:
        """The numbers of a tensor as it is stored, or those that a matrix in few bits means, in float32."""
        return self.matrices[name].floats(self.read) if name in self.matrices else self.read(name)

    def read(self, name: str) -> np.ndarray:
        """Map one tensor read-only, without a copy; bf16 and fp8 come as ml_dtypes."""
        import ml_dtypes  # noqa: F401  teaches np.dtype its names
        import numpy as np

        tensor = self.tensors[name]
        dtype = np.dtype(BY_SAFETENSORS[tensor.dtype].name)
        if tensor.nbytes == 0:
            return np.empty(tensor.shape, dtype)
        path = self.folder / tensor.file
        with _read_errors(path):
            check_stamp(path, next(s.stamp for s in self.shards if s.file == tensor.file), path)
            return tensor.mapped(path, dtype)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read config, index and headers and hold them against each other; no tensor data is read."""
    config = read_config(folder)
    with _read_errors(folder):
        indexed, single = (folder / INDEX).exists(), (folder / SINGLE).exists()
        if not indexed and not single:
            raise _no_weights(folder)
    placed = _read_index(folder) if indexed else {}
    named: dict[str, set[str]] = {}
    for name, file in placed.items():
        if not name.endswith(BUFFERS):
            named.setdefault(file, set()).add(name)
    files = sorted(named) or [SINGLE]
    if single and SINGLE not in files:
        raise ExportError(f"{folder} has both {SINGLE} and {INDEX}: move away the weights that are not meant")
    tensors: dict[str, StoredTensor] = {}
    shards = []
    for file in files:
        held, shard = read_header(folder / file)
        weights = {name for name in held if not name.endswith(BUFFERS)}
        for name in sorted(weights ^ named.get(file, weights)):
            does, where = "holds" if name in held else "lacks", placed.get(name, "no shard")
            problem = f"{does} tensor {_show(name)}, which {INDEX} puts in {where}"
            raise ExportError(f"{folder / file} {problem}: download both again")
        tensors |= held
        shards.append(shard)
    return Checkpoint(folder, config, tensors, tuple(shards), matrices_of(config, folder, tensors))


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    with _read_errors(folder):
        if not folder.exists():
            raise ExportError(f"no folder {folder}: get one with `hf download <model> --local-dir <folder>`")
        if not folder.is_dir():
            raise ExportError(f"{folder} is not a folder: give the one that holds its config.json")
        if not path.exists():
            raise ExportError(f"{folder} has no config.json: {what_it_is(folder)}")
        if (folder / ADAPTER).exists():
            raise ExportError(f"{folder} holds an adapter ({ADAPTER}): merge it into the model, or move it away")
        return _parse_object(read_regular(path), path)


def read_header(path: Path) -> tuple[dict[str, StoredTensor], Shard]:
    """Read and check the header of one safetensors file; tensors come in the order of their data."""
    with _read_errors(path), open_regular(path) as file:
        seen = stamp(file.fileno())
        size, length = seen.nbytes, int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MAX_HEADER):
            problem = f"is no safetensors file: {size} bytes, of which it claims {length} for a header"
            raise _broken(path, f"{problem} (after git clone: `git lfs pull`)")
        header = file.read(length)
        # An entry is an object.
        if header.count(b"{") > MAX_TENSORS:
            raise ExportError(f"{path} describes over {MAX_TENSORS} tensors: is it the weights of a language model?")
        check_stamp(file.fileno(), seen, path)
    entries = _parse_object(header, path)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "has a __metadata__ that is not a map of strings")
    start = 8 + length
    tensors = [_read_entry(path, name, entry, start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))

    end = start
    for tensor in tensors:
        if tensor.offset != end:
            problem = "overlaps the one before" if tensor.offset < end else "leaves a hole before it"
            raise _broken(path, f"has tensor {_show(tensor.name)}, which {problem}")
        end += tensor.nbytes
    if end != size:
        problem = "is truncated" if size < end else "is too long"
        raise _broken(path, f"{problem}: its header describes {end} bytes, it has {size}")
    digest = hashlib.sha256(header).hexdigest()
    return {tensor.name: tensor for tensor in tensors}, Shard(path.name, size, digest, seen)


def _read_entry(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise _broken_entry(path, name, f"{_show(entry)} in place of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        has = f"has tensor {_show(name)} with"
        raise ExportError(f"{path} {has} dtype {_show(dtype)}: convert it to one of {', '.join(ITEMSIZE)}")
    if not _is_shape(shape):
        raise _broken_entry(path, name, f"the impossible shape {_show(shape)}")
    nbytes = math.prod(shape) * ITEMSIZE[dtype]
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        takes = f"{dtype} {_show(shape)} takes {nbytes} bytes"
        raise _broken_entry(path, name, f"data_offsets {_show(offsets)}, but {takes}")
    return StoredTensor(name, dtype, tuple(shape), path.name, data_start + offsets[0], nbytes)


def _read_index(folder: Path) -> dict[str, str]:
    """The shard of every tensor, as the index says; all shards are files of this folder."""
    path = folder / INDEX
    with _read_errors(path):
        placed = _parse_object(read_regular(path, MAX_HEADER), path).get("weight_map")
        if not isinstance(placed, dict) or not placed:
            raise _broken(path, "has no weight_map from tensor to shard")
        for name, file in placed.items():
            if not _is_shard_name(file):
                raise _broken(path, f"places tensor {_show(name)} in {_show(file)}, no shard of this folder")
        files = sorted({file for name, file in placed.items() if not name.endswith(BUFFERS)})
        missing = [file for file in files if not (folder / file).exists()]
    if missing:
        lacks = f"lacks {len(missing)} of the {len(files)} shards that {INDEX} names"
        raise ExportError(f"{folder} {lacks} ({few(missing)}): finish the download")
    return placed


def _no_weights(folder: Path) -> ExportError:
    return ExportError(f"{folder} has no weights that can be read: {what_it_is(folder)}")


def _parse_object(text: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"holds no valid JSON ({_show(str(error))})") from error
    if not isinstance(value, dict):
        raise _broken(path, f"holds {_show(value)} where a JSON object should be")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError(f"key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} appears twice")
    return result


def _are_sizes(value: Any) -> bool:
    # type(), not isinstance(): JSON's true is no size.
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _is_shape(value: Any) -> bool:
    # A zero does not excuse the other sizes: numpy multiplies them too. 8 is the largest item.
    return _are_sizes(value) and len(value) <= MAX_RANK and math.prod(n or 1 for n in value) * 8 <= MAX_NBYTES


def _is_shard_name(file: Any) -> bool:
    # NUL and lone surrogates are not printable; the file functions raise ValueError for them.
    plain = isinstance(file, str) and file.isprintable() and not set(file) & set("/\\:")
    return plain and file.endswith(".safetensors")


def _broken_entry(path: Path, name: str, problem: str) -> ExportError:
    return _broken(path, f"has tensor {_show(name)} with {problem}")


def _broken(path: Path, problem: str) -> ExportError:
    return ExportError(f"{path} {problem}: the file is damaged, download it again")
