"""Files that nobody vouches for: opened only if they are regular, so that no pipe hangs and no device fills memory."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

MOST = 10_000_000  # bytes of a file of settings; the largest published config.json has a hundredth of it
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def open_regular(path: Path, *, follow: bool = True) -> BinaryIO:
    """The file at `path`, opened to read. Raises OSError; if the file is not regular, the error says what it is.

    follow: whether `path` may be a symbolic link.
    """
    # The kind is checked before the file is opened, too, as opening a device may do something.
    _check_kind(path, os.stat(path, follow_symlinks=follow))
    # The open does not wait, as another process may put a pipe there in between.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
    file = os.fdopen(os.open(path, flags), "rb")
    try:
        _check_kind(path, os.fstat(file.fileno()))
    except OSError:
        file.close()
        raise
    return file


def read_regular(path: Path, most: int = MOST, *, follow: bool = True) -> bytes:
    """All bytes of the file at `path`. Raises OSError, also if it is no regular file or holds more than `most`."""
    with open_regular(path, follow=follow) as file:
        size = os.fstat(file.fileno()).st_size
        # Files that the system makes, as in /proc, have bytes and no size.
        data = b"" if size > most else file.read((size or most) + 1)
        if max(size, len(data)) > most:
            raise OSError(errno.EFBIG, f"it has more than the {most} bytes that such a file may have", str(path))
        return data


def sha256(file: BinaryIO) -> str:
    """Of what is left to read in it."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _check_kind(path: Path, info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode):
        kind = KINDS.get(stat.S_IFMT(info.st_mode), "something else")
        code = errno.EISDIR if stat.S_ISDIR(info.st_mode) else errno.EINVAL
        raise OSError(code, f"it is {kind}, not a regular file", str(path))
