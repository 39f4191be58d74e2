"""A checkpoint's files in an export: reflinks, hard links or copies of the very files that were read."""

from __future__ import annotations

import errno
import fcntl
import fnmatch
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from llmexport.export.checkpoint import Checkpoint
from llmexport.export.errors import ExportError
from llmexport.export.identity import Held, WeightFile, identify
from llmexport.export.output import write_errors
from llmexport.export.quantised import FILES
from llmexport.export.stamp import Stamp, read_errors, stamp

FICLONE = 0x40049409  # of linux/fs.h: share the blocks of another file

# What link() says where it is the file system, or its policy, that has no hard link to offer; and what ioctl() says
# where it has no reflink.
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS}
_NO_REFLINK = {errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.ENOTTY, errno.EINVAL, errno.EBADF}

CONFIG = "config.json"
# What lies beside the weights and says how the model is used; where a folder is named, what in it travels.
COMPANIONS = (
    *(CONFIG, "generation_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("tokenizer*", "chat_template*", "*.model", "*.tiktoken", "tekken.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    # How the weights are quantised, where config.json does not say it.
    *FILES,
)
TEMPLATES = {"additional_chat_templates": "*.jinja", "chat_templates": "*.jinja"}
# Neither code nor weights travel, whatever they are called.
_STAYS = {".py", ".pyc", ".so", ".sh", ".safetensors", ".onnx", ".gguf", ".bin", ".pt", ".pth", ".pkl", ".pickle"}


def place_weights(sources: Mapping[Path, Stamp], folder: Path, mode: str) -> dict[str, str]:
    """Put files into `folder`, a new one, under their own names; returns in which of `WAYS` each was.

    sources: the files, each as it was when its header was read. Raises ExportError if one is another by now.
    mode: "link", "copy", or "auto", the first way that the file system has. The files are not synced, `new_folder`
    does that.
    """
    placed: dict[str, str] = {}
    with write_errors(folder):
        # The file itself: a Hugging Face cache is a folder of symbolic links.
        real = {source: Path(os.path.realpath(source)) for source in sources}
        for source, seen in sources.items():
            to = folder / source.name
            if mode == "auto" and _clone(real[source], to, seen):
                placed[source.name] = "reflink"
            elif mode != "copy" and _link(real[source], to, seen):
                placed[source.name] = "link"
        copies = [source for source in sources if source.name not in placed]
        if copies and mode == "link":
            raise ExportError(
                f"cannot link {real[copies[0]]} into {folder}: pass --weights copy, "
                "or choose a folder on the file system of the checkpoint"
            )
        _check_space(folder, [real[source] for source in copies], "copy")
        for source in copies:
            _copy(real[source], folder / source.name, sources[source])
            placed[source.name] = "copy"
    return placed


def place_shards(
    checkpoint: Checkpoint, used: Collection[str], folder: Path, mode: str, *, whole: bool
) -> list[tuple[WeightFile, Held]]:
    """Puts the shards `used` by an export into its folder, as place_weights does, and says what each is then."""
    shards = [s for s in checkpoint.shards if s.file in used]
    placed = place_weights({checkpoint.folder / s.file: s.stamp for s in shards}, folder, mode)
    return [identify(folder / s.file, s, placed[s.file], whole=whole) for s in shards]


def check_room(checkpoint: Checkpoint, used: Collection[str], folder: Path, mode: str, more: int) -> None:
    """Raise ExportError if the shards `used`, where they are copied for sure, and `more` bytes do not fit."""
    copied = [checkpoint.folder / s.file for s in checkpoint.shards if mode == "copy" and s.file in used]
    with write_errors(folder):
        _check_space(folder, copied, "write", more)


def place_companions(checkpoint: Checkpoint, folder: Path, *, rounded: bool = False) -> dict[str, str]:
    """Put the checkpoint's config, tokenizer and the like into `folder`; returns their names there and SHA-256.

    They are no hard links, as tools edit them. Links to them are followed. rounded: whether weights are quantised now,
    so that files which say how they were stay behind. Raises ExportError on one that cannot be read.
    """
    placed = {}
    with write_errors(folder):
        for name in sorted(n for n in _companions(checkpoint.folder) if not (rounded and n in FILES)):
            source, to = checkpoint.folder / name, folder / name
            to.parent.mkdir(exist_ok=True)
            if not _clone(source, to, None):
                _copy(source, to, None)
            placed[name] = hashlib.sha256(to.read_bytes()).hexdigest()
    return placed


def check_config(checkpoint: Checkpoint) -> None:
    """Raise ExportError if config.json does not say any more what was read from it."""
    path = checkpoint.folder / CONFIG
    with reading(path) as file:
        text = file.read()
    try:
        same = json.loads(text) == checkpoint.config
    except ValueError:
        same = False
    if not same:
        raise _changed(path)


def openings(folders: Iterable[Path]) -> list[str]:
    """Sentences on how the weights of these exports are opened, where that is not plain."""
    if all(file.stat().st_nlink == 1 for folder in folders for file in folder.glob("*.safetensors")):
        return []
    return [
        "ONNX Runtime and TensorRT open these hard links. onnx.load, onnx.checker and tools on them (quantisers, "
        "onnxslim) refuse hard links: export with `--weights copy` for those, or call "
        "onnx.load(..., load_external_data=False)"
    ]


def _companions(folder: Path) -> Iterator[str]:
    """The names, relative to a checkpoint's folder, of all that travels."""
    for name in _names(folder):
        path = folder / name
        if name in TEMPLATES and path.is_dir():
            inside = fnmatch.filter(_names(path), TEMPLATES[name])
            yield from (f"{name}/{file}" for file in inside if _is_file(path / file))
        elif _travels(name) and _is_file(path):
            yield name


def _travels(name: str) -> bool:
    return Path(name).suffix.lower() not in _STAYS and any(fnmatch.fnmatchcase(name, known) for known in COMPANIONS)


def _names(folder: Path) -> list[str]:
    with read_errors(folder):
        return [name for name in os.listdir(folder) if name.isprintable()]


def _is_file(path: Path) -> bool:
    with read_errors(path):
        return stat.S_ISREG(os.stat(path).st_mode)


def _clone(source: Path, to: Path, seen: Stamp | None) -> bool:
    with reading(source, seen) as reader, open(to, "xb") as writer:
        shared = reflink(reader.fileno(), writer.fileno())
    if not shared:
        os.unlink(to)
    return shared


def reflink(source: int, target: int) -> bool:
    """Share the blocks of one open file with another, an empty one; False where the file system cannot."""
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError as error:
        if error.errno not in _NO_REFLINK:
            raise
        return False
    return True


def _link(source: Path, to: Path, seen: Stamp) -> bool:
    try:
        os.link(source, to)
    except FileNotFoundError as error:
        raise _changed(source) from error
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        return False
    if stamp(to) != seen:
        raise _changed(source)
    return True


def _check_space(folder: Path, sources: list[Path], do: str, needed: int = 0) -> None:
    # A hole takes no space, and _copy leaves it a hole.
    for source in sources:
        with read_errors(source):
            info = os.stat(source)
        needed += min(info.st_size, info.st_blocks * 512)
    elsewhere = ", or choose a folder on the file system of the checkpoint and --weights link"
    check_space(folder, needed, do, f"free space{elsewhere if sources else ''}")


def check_space(folder: Path, needed: int, do: str, cure: str) -> None:
    """Raise ExportError, with the cure, if so many bytes of weights are more than the disk takes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ExportError(
            f"cannot {do} {needed / 1e9:.3g} GB of weights to {folder}, {free / 1e9:.3g} GB are free: {cure}"
        )


def _copy(source: Path, to: Path, seen: Stamp | None) -> None:
    zeros = bytes(1 << 20)
    # "x": writing into a hard link of an earlier run would change the checkpoint itself.
    with reading(source, seen) as reader, open(to, "xb") as writer:
        while chunk := reader.read(len(zeros)):
            if chunk == zeros:
                writer.seek(len(zeros), os.SEEK_CUR)
            else:
                writer.write(chunk)
        writer.truncate()


@contextmanager
def reading(path: Path, seen: Stamp | None = None) -> Iterator[BinaryIO]:
    """The file, open. Raises ExportError if it is not the one that was `seen`, or changes while it is open."""
    with read_errors(path):
        file = open(path, "rb")  # noqa: SIM115  closed below: what fails inside the block is no error of reading
    with file:
        seen = seen or stamp(file.fileno())
        if stamp(file.fileno()) != seen:
            raise _changed(path)
        yield file
        if stamp(file.fileno()) != seen:
            raise _changed(path)


def _changed(path: Path) -> ExportError:
    return ExportError(
        f"{path} changed while it was exported: export again when nothing writes to the checkpoint any more"
    )
