"""What is no regular file is refused as what it is, at once."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from llmexport.plugins.regular import open_regular, read_regular


def put(kind: str, path: Path) -> Path:
    """Something at `path` that is no file: `kind` is how it is called."""
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    else:
        path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize("kind", ["a named pipe", "a folder", "a socket", "a character device"])
def test_what_is_no_regular_file_is_refused_as_what_it_is(kind: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"it is {kind}, not a regular file"):
        read_regular(put(kind, tmp_path / "x"), 10)


def test_a_pipe_put_there_in_between_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, stat = tmp_path / "x", os.stat
    path.touch()
    before = stat(path)
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(os, "stat", lambda *_, **__: before)
    with pytest.raises(OSError, match="it is a named pipe"):
        open_regular(path)


def test_a_file_of_the_most_bytes_is_read_and_one_of_more_is_not(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_regular(path, 5) == b"12345"
    with pytest.raises(OSError, match="more than the 4 bytes"):
        read_regular(path, 4)


def test_a_file_without_a_size_is_read() -> None:
    assert read_regular(Path("/proc/self/comm"), 100).strip()
    with pytest.raises(OSError, match="more than the 1 bytes"):
        read_regular(Path("/proc/self/comm"), 1)


def test_a_terabyte_of_holes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.touch()
    os.truncate(path, 10**12)
    with pytest.raises(OSError, match="more than the 1000 bytes"):
        read_regular(path, 1000)


def test_a_link_is_followed_only_where_it_may_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link", 1) == b"1"
    with pytest.raises(OSError, match="it is a symbolic link"):
        read_regular(tmp_path / "link", 1, follow=False)
