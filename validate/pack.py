"""A golden pack, as a file: what an export is fed, stage by stage, and what it must give, as plain numpy arrays.

It is an npz without pickles. Its first array is a header, JSON as bytes, which names all others with their types. Read
where neither torch nor a checkpoint is: numpy is all that this needs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmexport.export.output import new_file
from llmexport.export.spec import Port
from llmexport.export.typed import DAMAGED, typed
from llmexport.plugins.regular import open_regular
from llmexport.validate.compare import Mismatch
from llmexport.validate.tolerance import Tolerance

FORMAT = 1
HEADER = "header"
MOST_HEADER = 100_000_000  # bytes
# numpy has no bfloat16 of its own: it is stored, and fed, as the integers of its bits.
BITS = {"bfloat16": "uint16"}
BROKEN = (*DAMAGED, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)
AGAIN = "make it again: llmexport golden"
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Graph:
    """A graph as the pack's export has it: the digest of its file, its ports, and what is carried."""

    model_sha256: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    carried: Mapping[str, str]


@dataclass(frozen=True)
class Shot:
    """What is fed to a graph in one stage: these inputs come from the pack, the others from what the runner made."""

    graph: str
    fed: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """A stage of the script.

    allowed: the tolerance of each output that is compared. whole: those of them of which padding is compared too, as
    no token lies along them. logits: the one that tokens are chosen by, if there is one; greedy: whether the best one
    follows this stage.
    """

    name: str
    kind: Literal["opening", "decode", "piece", "crossing"]
    greedy: bool
    shots: tuple[Shot, ...]
    allowed: Mapping[str, Tolerance]
    whole: tuple[str, ...]
    logits: str | None


@dataclass(frozen=True)
class Stored:
    """An array of the pack. One that is `zero` everywhere, as a cache before the first token, is not in the file."""

    dtype: str
    shape: tuple[int, ...]
    zero: bool


@dataclass(frozen=True)
class Header:
    """What a pack says of itself.

    llmexport: the version that made it. reference: what computed the outputs, and what that was compared with.
    left_out: stages that were run and are not in it. arrays: by key, see `fed_key` and its like.
    """

    llmexport: str
    arch: str
    dtype: str
    seed: int
    reference: str
    graphs: Mapping[str, Graph]
    stages: tuple[Stage, ...]
    left_out: tuple[str, ...]
    arrays: Mapping[str, Stored]


def fed_key(stage: int, graph: str, port: str) -> str:
    return f"fed/{stage}/{graph}/{port}"


def expected_key(stage: int, output: str) -> str:
    return f"expected/{stage}/{output}"


def real_key(stage: int) -> str:
    """Of which tokens are no padding, [B, T]."""
    return f"real/{stage}"


class Pack:
    """An open pack, whose arrays are read when they are asked for."""

    def __init__(self, path: Path, header: Header, npz: Any) -> None:
        self.path, self.header, self._npz = path, header, npz

    def array(self, key: str) -> np.ndarray:
        """The array of a key, of bfloat16 the bits. Raises Mismatch if it is not what the header says."""
        said = self.header.arrays[key]
        with _readable(self.path):
            if said.zero:
                return np.zeros(said.shape, BITS.get(said.dtype, said.dtype))
            found: np.ndarray = self._npz[key]
            if (found.dtype.name, found.shape) != (BITS.get(said.dtype, said.dtype), said.shape):
                raise ValueError(f"{key} is {found.dtype.name} {list(found.shape)}")
            return found


def write(path: Path, header: Header, arrays: Arrays, *, force: bool) -> None:
    """Writes a pack, whole or not at all; `header.arrays` is made here of the arrays. `force` replaces another pack."""
    said = {k: Stored(a.dtype.name, a.shape, not a.any()) for k, a in arrays.items()}
    data = {"format": FORMAT, **dataclasses.asdict(dataclasses.replace(header, arrays=said))}
    text = np.frombuffer(json.dumps(data).encode(), np.uint8)
    stored: dict[str, Any] = {HEADER: text} | {k: bits(a) for k, a in arrays.items() if not said[k].zero}
    with new_file(path, force=force, ours=is_pack) as file:
        np.savez(file, **stored)


def bits(array: np.ndarray) -> np.ndarray:
    """The array, of bfloat16 as the integers of its bits."""
    name = array.dtype.name
    return np.ascontiguousarray(array).view(BITS[name]) if name in BITS else array


def widened(array: np.ndarray, dtype: str) -> np.ndarray:
    """An array of a port of this dtype in a type that numpy computes with: the bits of bfloat16 become fp32."""
    if dtype not in BITS or array.dtype.name != BITS[dtype]:
        return array
    return (array.astype(np.uint32) << 16).view(np.float32)


def is_pack(path: Path) -> bool:
    """Whether a file is a golden pack, of any format."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as zipped:
            return zipped.namelist()[0] == f"{HEADER}.npy"
    except (OSError, IndexError, *BROKEN):
        return False


@contextlib.contextmanager
def read(path: Path) -> Iterator[Pack]:
    """The pack in a file. Raises Mismatch, in one line, if it is none, of another format, or not whole."""
    with contextlib.ExitStack() as stack:
        with _readable(path):
            file = stack.enter_context(open_regular(path))
            with zipfile.ZipFile(file) as zipped:
                sizes = {i.filename.removesuffix(".npy"): i.file_size for i in zipped.infolist()}
            if sizes.get(HEADER, MOST_HEADER) >= MOST_HEADER:
                raise ValueError("it has no header")
            file.seek(0)
            npz = stack.enter_context(np.load(file, allow_pickle=False))
            data = json.loads(npz[HEADER].tobytes())
            if data["format"] != FORMAT:
                raise Mismatch(f"{path} is of format {data['format']!r}, this version reads {FORMAT}: {AGAIN}")
            header: Header = typed(Header, {k: v for k, v in data.items() if k != "format"})
            _check(header, sizes)
        yield Pack(path, header, npz)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Mismatch(f"cannot read {path}: {error.strerror}: {AGAIN}") from error
    except BROKEN as error:
        raise Mismatch(f"{path} is no golden pack, damaged or of another version ({error!r}): {AGAIN}") from error


def _check(header: Header, sizes: Mapping[str, int]) -> None:
    """The arrays must be those of the stages, and in the file. Raises ValueError."""
    wanted: set[str] = set()
    for i, stage in enumerate(header.stages):
        wanted |= {fed_key(i, shot.graph, port) for shot in stage.shots for port in shot.fed}
        wanted |= {expected_key(i, output) for output in stage.allowed} | {real_key(i)}
        made = {p.name for s in stage.shots for p in header.graphs[s.graph].outputs}
        if lost := stage.allowed.keys() - made:
            raise ValueError(f"outputs {sorted(lost)[:3]}")
    held = {k for k, said in header.arrays.items() if not said.zero} | {HEADER}
    if not header.stages or wanted != header.arrays.keys() or held != sizes.keys():
        others = (wanted ^ header.arrays.keys()) | (held ^ sizes.keys())
        raise ValueError(f"arrays {sorted(others)[:3]}")
