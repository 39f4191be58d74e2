"""The cache of traces: what was made once is not made again, and a bad entry costs only time."""

import ast
import errno
import gc
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from llmexport.export import cache
from llmexport.plugins.cache_folder import cache_folder


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    chosen = tmp_path / "cache"
    monkeypatch.setenv("LLMEXPORT_CACHE", str(chosen))
    cache._note.cache_clear()
    return chosen


class Make:
    """Makes other bytes each time."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> bytes:
        self.calls += 1
        return f"graph {self.calls}".encode()


def entry(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_the_second_call_makes_nothing(folder):
    make = Make()
    assert [cache.cached("block", ["key"], make) for _ in range(2)] == [b"graph 1"] * 2
    assert make.calls == 1


@pytest.mark.parametrize(("kind", "key"), [("body", ["key"]), ("block", ["other"]), ("block", ["key", 1])])
def test_another_kind_or_key_is_made(folder, kind, key):
    make = Make()
    cache.cached("block", ["key"], make)
    assert cache.cached(kind, key, make) == b"graph 2"


def test_the_order_of_a_mappings_keys_says_nothing(folder):
    make = Make()
    cache.cached("block", {"a": 1, "b": 2}, make)
    cache.cached("block", {"b": 2, "a": 1}, make)
    assert make.calls == 1


def test_a_change_of_our_source_makes_anew(folder, monkeypatch):
    make = Make()
    cache.cached("block", ["key"], make)
    monkeypatch.setattr(cache, "source_digest", lambda: "another")
    assert cache.cached("block", ["key"], make) == b"graph 2"


@pytest.mark.parametrize("library", [*cache.LIBRARIES, "llmexport"])
def test_another_version_of_a_library_makes_anew(folder, monkeypatch, library):
    make = Make()
    cache.cached("block", ["key"], make)
    changed = cache.versions() | {library: "0.0.0"}
    monkeypatch.setattr(cache, "versions", lambda: changed)
    assert cache.cached("block", ["key"], make) == b"graph 2"


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    "damage",
    [flip, lambda data: flip(data[::-1])[::-1], lambda data: data[:-1], lambda data: data[:32], lambda data: b""],
    ids=["last bit", "first bit", "cut short", "digest only", "empty"],
)
def test_a_damaged_entry_is_made_anew_and_mended(folder, damage: Callable[[bytes], bytes]):
    make = Make()
    cache.cached("block", ["key"], make)
    entry(folder).write_bytes(damage(entry(folder).read_bytes()))
    assert [cache.cached("block", ["key"], make) for _ in range(2)] == [b"graph 2"] * 2


def test_an_entry_under_the_name_of_another_key_is_made_anew(folder):
    make = Make()
    cache.cached("block", ["one"], make)
    one = entry(folder)
    cache.cached("block", ["two"], make)
    (two,) = set(folder.iterdir()) - {one}
    os.replace(one, two)
    assert cache.cached("block", ["two"], make) == b"graph 3"


def test_an_entry_that_others_can_write_is_made_anew_and_closed(folder):
    make = Make()
    cache.cached("block", ["key"], make)
    entry(folder).chmod(0o666)
    assert [cache.cached("block", ["key"], make) for _ in range(2)] == [b"graph 2"] * 2
    assert entry(folder).stat().st_mode & 0o777 == 0o600


def test_an_entry_of_another_user_is_made_anew(folder, monkeypatch):
    make = Make()
    cache.cached("block", ["key"], make)
    monkeypatch.setattr(os, "fstat", changed_owner(entry(folder)))
    assert cache.cached("block", ["key"], make) == b"graph 2"


def changed_owner(path: Path) -> Callable[[int], os.stat_result]:
    """fstat, by which the file that is now at `path` belongs to another user."""
    inode, real = path.stat().st_ino, os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        info = real(descriptor)
        return os.stat_result([*info[:4], info.st_uid + 1, *info[5:]]) if info.st_ino == inode else info

    return fstat


@pytest.mark.parametrize(
    "put",
    [
        os.mkfifo,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(path.with_name("elsewhere")),
        lambda path: path.touch() or os.truncate(path, 10**12),
    ],
    ids=["pipe", "device", "link", "a terabyte"],
)
def test_an_entry_that_is_no_file_of_ours_is_neither_read_nor_waited_for(folder, put):
    make = Make()
    cache.cached("block", ["key"], make)
    path = entry(folder)
    path.rename(path.with_name("elsewhere"))
    put(path)
    assert [cache.cached("block", ["key"], make) for _ in range(2)] == [b"graph 2"] * 2


def test_a_folder_that_is_not_trusted_is_not_used_and_said_once(folder, caplog):
    caplog.set_level(logging.WARNING, "llmexport")
    folder.mkdir()
    (folder / "theirs").touch()
    folder.chmod(0o777)
    make = Make()
    assert [cache.cached("block", ["key"], make) for _ in range(2)] == [b"graph 1", b"graph 2"]
    assert [p.name for p in folder.iterdir()] == ["theirs"]
    (said,) = caplog.messages
    assert said.startswith(f"note: traces are not kept: cache folder {folder} can be written by others")


def test_a_user_without_home_and_name_has_no_cache(monkeypatch, caplog):
    caplog.set_level(logging.WARNING, "llmexport")
    for variable in ("LLMEXPORT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 987654)
    make = Make()
    assert [cache.cached("block", ["key"], make) for _ in range(2)] == [b"graph 1", b"graph 2"]
    assert len(caplog.messages) == 1


def test_an_entry_that_is_a_folder_costs_only_time(folder):
    make = Make()
    cache.cached("block", ["key"], make)
    path = entry(folder)
    path.unlink()
    path.mkdir()
    assert cache.cached("block", ["key"], make) == b"graph 2"


def test_a_folder_that_cannot_be_made_costs_only_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LLMEXPORT_CACHE", str(tmp_path / "file" / "cache"))
    make = Make()
    assert [cache.cached("block", ["key"], make) for _ in range(2)] == [b"graph 1", b"graph 2"]


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_costs_only_time(folder, monkeypatch):
    monkeypatch.setattr(os, "replace", full_disk)
    make = Make()
    assert cache.cached("block", ["key"], make) == b"graph 1"


def test_a_full_disk_leaves_nothing_behind(folder, monkeypatch):
    monkeypatch.setattr(os, "replace", full_disk)
    cache.cached("block", ["key"], Make())
    assert list(folder.iterdir()) == []


def test_an_entry_appears_whole_or_not_at_all(folder, monkeypatch):
    seen: list[bytes] = []
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (seen.append(Path(old).read_bytes()), rename(old, new)))
    cache.cached("block", ["key"], Make())
    assert seen == [entry(folder).read_bytes()]


def test_a_failure_to_make_is_not_kept(folder):
    def fail() -> bytes:
        raise RuntimeError("no trace")

    with pytest.raises(RuntimeError):
        cache.cached("block", ["key"], fail)
    assert cache.cached("block", ["key"], Make()) == b"graph 1"


def test_entries_lie_in_the_users_cache_folder_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.delenv("LLMEXPORT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "llmexport"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "llmexport"


def digest(root: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cache, "ROOT", root)
    return cache.source_digest.__wrapped__()


@pytest.mark.parametrize(
    "path",
    ["plugins/spec.py", "plugins/rope/__init__.py", "export/blocks/norm.py", "export/spec/mixer.py", "export/trace.py"],
)
def test_every_byte_of_what_traces_is_in_the_digest(tmp_path, monkeypatch, path):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text("x = 1")
    before = digest(tmp_path, monkeypatch)
    (tmp_path / path).write_text("x = 2")
    assert digest(tmp_path, monkeypatch) != before


def imports(path: Path) -> set[Path]:
    """The files of ours that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{a.name}" for a in node.names}
    parts = [cache.ROOT.joinpath(*n.split(".")[1:]) for n in names if n.startswith("llmexport.")]
    found = {p for part in parts for p in (part.with_suffix(".py"), part / "__init__.py") if p.is_file()}
    return found


def test_every_file_that_tracing_imports_is_in_the_digest():
    # What an error says is in no trace, nor is how a config is read, which the spec names for types alone; the package
    # itself imports only when one of its functions is called.
    aside = {
        cache.ROOT / f"export/{n}.py" for n in ("__init__", "config", "errors", "keys", "quantised", "rope", "values")
    }
    todo, seen = {cache.ROOT / "export/trace.py"}, set()
    while todo:
        seen.add(path := todo.pop())
        todo |= imports(path) - seen - aside
    covered = {p for pattern in cache.SOURCES for p in cache.ROOT.glob(pattern)}
    assert seen - covered == set()


@pytest.mark.parametrize("swept", [True, False])
def test_cycles_are_not_searched_for_meanwhile_and_then_as_before(swept: bool) -> None:
    def failing() -> bytes:
        assert not gc.isenabled()
        raise ValueError

    (gc.enable if swept else gc.disable)()
    try:
        with pytest.raises(ValueError):  # noqa: PT011
            cache.cached("block", 1, failing)
        assert cache.cached("block", 2, lambda: bytes([gc.isenabled()])) == bytes([False])
        assert gc.isenabled() is swept
    finally:
        gc.enable()
