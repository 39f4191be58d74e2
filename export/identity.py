"""Whether a weight file is the one that was exported, and how much of it was read to say so."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from llmexport.export.checkpoint import MAX_HEADER, Shard, read_header
from llmexport.export.errors import ExportError
from llmexport.export.stamp import Stamp, stamp

PAGES, PAGE = 64, 4096  # of a weight file, for its sample digest
CHUNK, PIECE = 1 << 24, 1 << 20  # bytes that a thread digests on its own, and that it reads at a time
# To place a file, in the order in which "auto" tries them; or what made it.
WAYS = ("reflink", "link", "copy", "repacked", "quantised")
WHOLE, KNOWN, SAMPLED = "whole", "known", "sampled"
# What each says of a file, for people; `rest`: what became of its other bytes.
SAYS = {
    WHOLE: "every byte as recorded",
    KNOWN: "header, 64 pages, inode and modification time as recorded, other bytes {rest}",
    SAMPLED: "header and 64 pages as recorded, inode or modification time not, as in a copy, other bytes {rest}",
}


@dataclass(frozen=True)
class WeightFile:
    """A weight file of an export: its size, how it was placed there, digests of it, and its stamp then.

    `whole_sha256` is None where nobody has read every byte yet.
    """

    file: str
    bytes: int
    placed: str
    header_sha256: str
    sample_sha256: str
    whole_sha256: str | None
    inode: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Held:
    """A weight file as it was found: how much was read of it, and its stamp then."""

    how: str
    stamp: Stamp


def identify(path: Path, shard: Shard, placed: str, *, whole: bool) -> tuple[WeightFile, Held]:
    """A weight file that was placed so, as it is now, and how it was found.

    Raises ExportError if it is not `shard` any more.
    """
    before = stamp(path)
    sampled, digest = sample(path, shard.nbytes), whole_digest(path) if whole else None
    # A link shares its file with whoever writes to the checkpoint.
    if before.nbytes != shard.nbytes or _header_digest(path) != shard.header_sha256 or stamp(path) != before:
        raise ExportError(f"{path.name} changed while it was exported: export again when nothing writes to it any more")
    header = shard.header_sha256
    file = WeightFile(path.name, shard.nbytes, placed, header, sampled, digest, before.inode, before.mtime_ns)
    return file, Held(WHOLE if whole or _pages_are_all(shard) else KNOWN, before)


def examine(path: Path, said: WeightFile, *, moved: bool, whole: bool = False) -> Held:
    """Hold a weight file against what the manifest says of it; `whole` reads every byte.

    A hard-linked shard is the checkpoint's own file: whoever overwrites one changes the other. So a file of another
    inode or time of change is read whole where a digest tells of every byte; else it is refused, unless the whole
    export is a copy (`moved`), as times and inodes of copies say nothing. Raises ExportError.
    """
    if not path.is_file():
        raise ExportError(f"{path} is missing from the export: export again")
    _, shard = read_header(path)
    now = shard.stamp
    found = [shard.nbytes, shard.header_sha256, sample(path, shard.nbytes)]
    if found != [said.bytes, said.header_sha256, said.sample_sha256]:
        raise changed(path)
    if _pages_are_all(shard):
        return Held(WHOLE, now)
    same_time, same_inode = now.mtime_ns == said.mtime_ns, now.inode == said.inode
    known = same_time and same_inode
    written = not known and (same_inode or not moved)
    if (whole or not known) and said.whole_sha256 is not None:
        if whole_digest(path) != said.whole_sha256:
            raise changed(path)
        return Held(WHOLE, now)
    if whole:
        raise ExportError(
            f"{path} cannot be verified, no digest of all its bytes was recorded: export with --digest, "
            "or run `llmexport validate` once"
        )
    if written:
        raise ExportError(
            f"{path} was written, touched or replaced after the export; its size, header and {PAGES} pages are the "
            "same, no digest tells of its other bytes: export again (with --digest such a file is read whole instead)"
        )
    return Held(KNOWN if known else SAMPLED, now)


def _pages_are_all(shard: Shard) -> bool:
    """Whether the pages of the sample cover the file."""
    return shard.nbytes <= PAGES * PAGE


def changed(path: Path) -> ExportError:
    return ExportError(f"{path} is not the file that was exported, it has changed since: export again")


def sample(path: Path, size: int) -> str:
    """SHA-256 of PAGES pages spread evenly over the file: other weights of the same shapes differ in all of them."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        for i in range(PAGES):
            digest.update(os.pread(file.fileno(), PAGE, size * i // PAGES))
    return digest.hexdigest()


def whole_digest(path: Path) -> str:
    """SHA-256 of the SHA-256s of the file's chunks, which threads make side by side."""
    with open(path, "rb", buffering=0) as file:
        number = file.fileno()

        def digest(start: int) -> bytes:
            inner, at = hashlib.sha256(), start
            # Pieces that stay in a core's cache between being read and being digested.
            while piece := os.pread(number, min(PIECE, start + CHUNK - at), at):
                inner.update(piece)
                at += len(piece)
            return inner.digest()

        pool = ThreadPoolExecutor(max_workers=min(16, 2 * (os.cpu_count() or 1)))
        try:
            parts = list(pool.map(digest, range(0, os.fstat(number).st_size, CHUNK)))
        finally:
            pool.shutdown(cancel_futures=True)
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _header_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(min(int.from_bytes(file.read(8), "little"), MAX_HEADER))).hexdigest()
