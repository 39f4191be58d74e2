"""The folder that traces and libraries are taken from is one that only its user can write to."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from llmexport.plugins.cache_folder import cache_folder, trusted_folder
from llmexport.plugins.errors import CacheError

TRACE = "block-" + "0" * 32


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache is to be; nothing is there yet."""
    monkeypatch.setenv("LLMEXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def made(folder: Path, mode: int, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    folder.chmod(mode)
    return folder


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `path` another user's: by root truly, otherwise by being another."""
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345, follow_symlinks=False)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)


def test_it_is_made_for_its_user_alone_whatever_the_umask(folder, monkeypatch):
    monkeypatch.setenv("LLMEXPORT_CACHE", str(folder / "deep" / "cache"))
    before = os.umask(0)
    try:
        assert trusted_folder("plugins", "90") == folder / "deep" / "cache" / "plugins" / "90"
    finally:
        os.umask(before)
    assert [mode(p) for p in (folder, folder / "deep", folder / "deep" / "cache" / "plugins" / "90")] == [0o700] * 3


@pytest.mark.parametrize(
    ("found", "names"), [(0o777, ()), (0o755, ()), (0o755, (TRACE, f".{TRACE}-0a1b2c3d", "plugins"))]
)
def test_one_where_nobody_can_have_put_anything_is_closed(folder, found, names):
    made(folder, found, *names)
    assert trusted_folder() == folder
    assert mode(folder) == 0o700


def appearing(path: Path, monkeypatch: pytest.MonkeyPatch, uid: int = -1) -> None:
    """A file of that user's comes to `path` just before its folder is closed."""
    close = os.fchmod

    def fchmod(descriptor: int, mode: int) -> None:
        path.touch()
        os.chown(path, uid, -1)
        close(descriptor, mode)

    monkeypatch.setattr(os, "fchmod", fchmod)


@pytest.mark.parametrize(("found", "names"), [(0o777, ()), (0o755, (TRACE,))])
def test_two_of_ours_may_begin_at_once(folder, monkeypatch, found, names):
    appearing(made(folder, found, *names) / f"graph-{'1' * 32}", monkeypatch)
    assert trusted_folder() == folder


def test_what_another_put_there_just_now_is_seen(folder, monkeypatch):
    if os.geteuid():
        pytest.skip("only root can give a file away")
    appearing(made(folder, 0o777) / TRACE, monkeypatch, 12345)
    with pytest.raises(CacheError, match="can be written by others"):
        trusted_folder()


@pytest.mark.parametrize(
    ("found", "names", "why"),
    [
        (0o777, (TRACE,), "can be written by others"),
        (0o770, (TRACE,), "can be written by others"),
        (0o755, ("thesis.tex",), "is open to others and holds other things"),
    ],
)
def test_one_that_is_too_open_is_refused_with_the_command_that_closes_it(folder, found, names, why):
    made(folder, found, *names)
    with pytest.raises(CacheError, match=f"{why}, and is not used: chmod 700 {folder}, or set LLMEXPORT_CACHE"):
        trusted_folder()
    assert mode(folder) == found


def test_nobody_is_told_to_close_what_all_share(folder):
    made(folder, 0o1777, "theirs")
    with pytest.raises(CacheError, match="can be written by others") as caught:
        trusted_folder()
    assert "chmod" not in str(caught.value)


def test_another_users_is_refused_by_root_too(folder, monkeypatch):
    give_away(made(folder, 0o700), monkeypatch)
    with pytest.raises(CacheError, match=r"belongs to .*, not to .*, and is not used: set LLMEXPORT_CACHE"):
        trusted_folder()


def test_another_users_folder_in_it_is_refused(folder, monkeypatch):
    inside = trusted_folder("plugins")
    if os.geteuid():
        pytest.skip("only root can give a folder away")
    give_away(inside, monkeypatch)
    with pytest.raises(CacheError, match="plugins belongs to"):
        trusted_folder("plugins", "90")


@pytest.mark.parametrize("put", [lambda p: p.symlink_to("/"), lambda p: p.touch()], ids=["link", "file"])
def test_what_is_no_folder_in_it_is_refused(folder, put):
    put(trusted_folder() / "plugins")
    with pytest.raises(CacheError, match="plugins is no folder of this cache: remove it"):
        trusted_folder("plugins")


def test_a_folder_in_it_that_others_can_write_is_refused(folder):
    trusted_folder("plugins").chmod(0o777)
    with pytest.raises(CacheError, match="can be written by others"):
        trusted_folder("plugins")


def test_a_link_of_another_user_is_not_followed(folder, tmp_path, monkeypatch):
    if os.geteuid():
        pytest.skip("only root can make a link of another user")
    made(tmp_path / "mine", 0o700)
    folder.symlink_to("mine")
    assert trusted_folder() == folder
    give_away(folder, monkeypatch)
    with pytest.raises(CacheError, match="cache is a link of "):
        trusted_folder()


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_above_it_of_another_user_is_refused_and_nothing_is_made_in_it(tmp_path, monkeypatch, there):
    above = tmp_path / "above"
    above.mkdir()
    monkeypatch.setenv("LLMEXPORT_CACHE", str(above / "deep" / "cache"))
    if there:
        trusted_folder()
    give_away(above, monkeypatch)
    with pytest.raises(CacheError, match="above it belongs to "):
        trusted_folder()
    assert [p.name for p in above.iterdir()] == ["deep"] * there


@pytest.mark.parametrize("linked", [False, True])
def test_a_folder_above_it_that_others_can_write_is_refused_unless_sticky(folder, tmp_path, monkeypatch, linked):
    above = tmp_path / "above"
    above.mkdir()
    monkeypatch.setenv("LLMEXPORT_CACHE", str(above / "cache"))
    if linked:
        made(above / "cache", 0o700)
        folder.symlink_to(above / "cache")
        monkeypatch.setenv("LLMEXPORT_CACHE", str(folder))
    above.chmod(0o777)
    with pytest.raises(CacheError, match=f"others can write to {above} above it: chmod go-w {above} .*, or set"):
        trusted_folder()
    above.chmod(0o1777)
    trusted_folder()


def test_what_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLMEXPORT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CacheError, match=r"cannot be used \(.*file.*: Not a directory\): set LLMEXPORT_CACHE"):
        trusted_folder()


def test_a_relative_one_is_in_this_folder_and_an_empty_one_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMEXPORT_CACHE", "traces")
    assert cache_folder() == tmp_path / "traces"
    monkeypatch.setenv("LLMEXPORT_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative, which the standard ignores")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "llmexport"


def test_a_user_without_name_and_home_has_none(monkeypatch):
    for variable in ("LLMEXPORT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 987654)
    with pytest.raises(CacheError, match=r"there is no home for a cache .*: set LLMEXPORT_CACHE"):
        trusted_folder()
