"""A library is loaded only if it is whole, and if nobody else can have written it."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import onnx.onnx_cpp2py_export
import pytest

from llmexport.plugins import library_file
from llmexport.plugins.errors import PluginError

US = {0, os.geteuid()}


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A shared object, which a linker has made."""
    path = tmp_path / "some.so"
    shutil.copyfile(onnx.onnx_cpp2py_export.__file__, path)
    path.chmod(0o755)
    return path


@pytest.fixture
def placed(shared: Path, tmp_path: Path) -> Path:
    """The same with a record."""
    path = tmp_path / "placed.so"
    library_file.place(shared, path, {"archs": ["90"]})
    return path


def cut_to(size: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, size if size >= 0 else path.stat().st_size + size)


def change_a_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def test_one_that_is_whole_passes(shared: Path, placed: Path) -> None:
    assert library_file.check(shared, US) == library_file.identity(shared.stat())
    assert library_file.check(placed, US) == library_file.identity(placed.stat())


@pytest.mark.parametrize("size", [-1, -100_000, 200_000, 4096, 100])
def test_without_a_record_what_its_headers_describe_must_be_there(shared: Path, size: int) -> None:
    whole = shared.stat().st_size
    cut_to(size)(shared)
    with pytest.raises(PluginError, match=rf"is truncated, it has \d+ of {whole} bytes: build it: llmexport plugins"):
        library_file.check(shared, US)


@pytest.mark.parametrize("size", [0, 5, 63])
def test_what_has_no_header_is_no_library(shared: Path, size: int) -> None:
    cut_to(size)(shared)
    with pytest.raises(PluginError, match="is no plugin library: it is no ELF file of 64 bits"):
        library_file.check(shared, US)


@pytest.mark.parametrize(("missing", "refused"), [(0, False), (1, True)])
def test_a_segment_must_be_there_in_a_file_without_sections(tmp_path: Path, missing: int, refused: bool) -> None:
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 3, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 120, 0, 0, 80, 80, 4096)
    path = tmp_path / "stripped.so"
    path.write_bytes(header + segment + bytes(80 - missing))
    path.chmod(0o755)
    if refused:
        with pytest.raises(PluginError, match="is truncated, it has 199 of 200 bytes"):
            library_file.check(path, US)
    else:
        library_file.check(path, US)


@pytest.mark.parametrize("damage", [cut_to(-1), cut_to(0), change_a_byte], ids=["cut", "empty", "changed"])
def test_with_a_record_every_byte_counts(placed: Path, damage: Callable[[Path], None]) -> None:
    damage(placed)
    with pytest.raises(PluginError, match="is not the file that was built, it is cut or changed: build it"):
        library_file.check(placed, US)


@pytest.mark.parametrize("text", ["", "{}", "[]", "no JSON", "[" * 50_000])
def test_a_record_without_digest_fits_no_file(placed: Path, text: str) -> None:
    library_file.record_path(placed).write_text(text)
    with pytest.raises(PluginError, match="is not the file that was built"):
        library_file.check(placed, US)


def test_a_pipe_for_a_library_or_a_record_is_not_waited_for(placed: Path) -> None:
    library_file.record_path(placed).unlink()
    os.mkfifo(library_file.record_path(placed))
    with pytest.raises(PluginError, match="it is a named pipe, not a regular file"):
        library_file.check(placed, US)
    placed.unlink()
    os.mkfifo(placed)
    with pytest.raises(PluginError, match="it is a named pipe, not a regular file"):
        library_file.check(placed, US)


def test_another_users_is_refused(placed: Path) -> None:
    with pytest.raises(PluginError, match=r"placed.so belongs to .* and is not loaded"):
        library_file.check(placed, {12345})


def test_a_link_of_another_user_is_refused(placed: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can make a link of another user")
    link = placed.with_name("link.so")
    link.symlink_to(placed)
    library_file.check(link, US)
    os.chown(link, 12345, 12345, follow_symlinks=False)
    with pytest.raises(PluginError, match=r"link.so belongs to uid 12345, neither to root nor to you"):
        library_file.check(link, US)


@pytest.mark.parametrize("mode", [0o775, 0o757])
def test_one_that_others_can_write_is_refused_with_the_command_that_closes_it(placed: Path, mode: int) -> None:
    placed.chmod(mode)
    with pytest.raises(PluginError, match=f"can be written by others, and is not loaded: .*chmod go-w {placed}"):
        library_file.check(placed, US)


def test_it_is_placed_with_its_digest_and_nobody_else_can_write_it(shared: Path, tmp_path: Path) -> None:
    path = tmp_path / "placed.so"
    before = os.umask(0)
    try:
        library_file.place(shared, path, {"archs": ["90"]})
    finally:
        os.umask(before)
    assert path.read_bytes() == shared.read_bytes()
    record = json.loads(library_file.record_path(path).read_text())
    assert record == {"archs": ["90"], "sha256": record["sha256"]}
    assert {p.name: p.stat().st_mode & 0o022 for p in (path, library_file.record_path(path))} == {
        "placed.so": 0,
        "placed.so.json": 0,
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["placed.so", "placed.so.json", "some.so"]


def test_a_broken_one_is_placed_anew_and_a_whole_one_only_found_as_the_last(shared: Path, placed: Path) -> None:
    inode = placed.stat().st_ino
    os.utime(placed, (0, 0))
    library_file.place(shared, placed, {})
    assert placed.stat().st_ino == inode
    assert placed.stat().st_mtime > 0
    for damage in (change_a_byte, lambda path: path.chmod(0o777), lambda path: path.unlink()):
        damage(placed)
        library_file.place(shared, placed, {})
        assert placed.read_bytes() == shared.read_bytes()
        library_file.check(placed, US)


def test_what_a_broken_build_has_linked_is_linked_anew(shared: Path, placed: Path) -> None:
    library_file.drop_unless_placed(shared, placed)
    assert shared.exists()
    change_a_byte(shared)
    library_file.drop_unless_placed(shared, placed)
    assert not shared.exists()
