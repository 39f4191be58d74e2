import builtins
import contextlib
import errno
import gc
import inspect
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace

import pytest

from llmexport.export import output, placing
from llmexport.export.errors import ExportError
from llmexport.export.output import new_folder, write_errors, write_files
from llmexport.export.stamp import stamp

OLD = {"manifest.json": b"old manifest", "model.onnx": b"old model", "sub/notes": b"kept by the user"}
NEW = {"manifest.json": b"new manifest", "model.onnx": b"new model", "sub/more": b"new"}

Tree = dict[str, bytes | None]


def tree(folder: Path) -> Tree:
    """Every file with its bytes, and every folder: hidden and stray ones too."""
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}


def fill(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        if not (folder / name).parent.is_dir():
            (folder / name).parent.mkdir()
        (folder / name).write_bytes(data)


def make(target: Path, then: Callable[[], object] = lambda: None, force: bool = False) -> None:
    with new_folder(target, force=force) as folder:
        fill(folder, NEW)
        then()


def replace(target: Path) -> None:
    make(target, force=True)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """An output of an earlier run."""
    fill(tmp_path / "out", OLD)
    return tmp_path / "out"


class Fault:
    """Counts the calls that can find the disk full, and fails the one that is `due`."""

    def __init__(self, due: int, error: OSError) -> None:
        self.due, self.error, self.calls = due, error, 0

    def step(self) -> None:
        self.calls += 1
        if self.calls == self.due:
            raise self.error

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("mkdir", "fsync", "rename", "replace", "link"):
                patch.setattr(os, name, self.before(getattr(os, name)))
            patch.setattr(output, "open", self.open, raising=False)
            patch.setattr(placing, "open", self.open, raising=False)
            patch.setattr(Path, "write_bytes", self.before(Path.write_bytes))
            yield

    def before(self, call: Callable[..., object]) -> Callable[..., object]:
        def checked(*args: object, **options: object) -> object:
            self.step()
            return call(*args, **options)

        return checked

    def open(self, path: Path, mode: str) -> object:
        if mode == "xb":
            self.step()
            try:
                self.step()
            except OSError:
                # This time the file is there and its data is not.
                path.touch()
                raise
        return builtins.open(path, mode)


def every_full_disk(action: Callable[[], object], folder: Path) -> None:
    """Run `action` with a full disk at its first step, its second ... to its end: `folder` stays the same."""
    before = tree(folder)
    for due in range(1, 100):
        fault = Fault(due, OSError(errno.ENOSPC, "No space left on device"))
        with fault.armed():
            try:
                action()
            except ExportError as error:
                message = str(error)
            else:
                break
        assert "No space left on device: free space" in message
        assert tree(folder) == before
    assert fault.calls == due - 1 > 5


def every_interrupt(reset: Callable[[], None], action: Callable[[], None], check: Callable[[], None]) -> None:
    """Run `action` with Ctrl-C at the first moment that Python looks for one, the second ... to its end."""
    ours = {module.__file__ for module in (output, contextlib, shutil)}
    for due in range(1, 10_000):
        reset()
        seen = 0

        def look(frame: FrameType, event: str, argument: object, due: int = due) -> None:
            nonlocal seen
            # Python runs a signal's handler when a Python function begins and when a C function has ended.
            # A generator that goes on is no beginning: Python 3.10 would end it without its `finally`.
            resumed = event == "call" and frame.f_code.co_flags & inspect.CO_GENERATOR
            if event in ("call", "c_return") and frame.f_code.co_filename in ours and not resumed:
                seen += 1
                if seen == due:
                    raise KeyboardInterrupt  # which also ends the profiling

        sys.setprofile(look)
        try:
            action()
        except (KeyboardInterrupt, OSError) as error:
            # At some moments shutil.rmtree closes a file twice and so makes an OSError of it.
            interrupt = error if isinstance(error, KeyboardInterrupt) else error.__context__
            assert isinstance(interrupt, KeyboardInterrupt)
            del interrupt
        else:
            assert seen > 50
            return
        finally:
            sys.setprofile(None)
        # A generator that is not told of the interrupt ends with the traceback that holds it.
        gc.collect(0)
        check()
    raise AssertionError("the action never succeeds")


def test_the_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with new_folder(target, force=False) as folder:
        assert list(folder.iterdir()) == []
        fill(folder, NEW)
        assert not target.exists()
        assert [path.name[0] for path in tmp_path.iterdir()] == ["."]
    assert tree(tmp_path) == {"out": None, "out/sub": None} | {f"out/{name}": data for name, data in NEW.items()}


def test_the_folder_has_the_permissions_of_an_ordinary_one(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out", force=False):
        (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_every_file_and_folder_is_synced_before_it_appears(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, names = [], {}
    fsync = os.fsync

    def record(file: int) -> None:
        synced.append(os.fstat(file).st_ino)
        names[os.fstat(file).st_ino] = tree(target).get("model.onnx")
        fsync(file)

    monkeypatch.setattr(os, "fsync", record)
    replace(target)
    inodes = {path.stat().st_ino for path in [target, *target.rglob("*")]}
    assert set(synced) == inodes | {target.parent.stat().st_ino}
    assert {names[inode] for inode in inodes} == {b"old model"}
    assert synced[-1] == target.parent.stat().st_ino


def test_an_exception_in_the_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        make(tmp_path / "out", lambda: 1 / 0)
    assert tree(tmp_path) == {}


def test_an_exception_in_the_block_leaves_the_old_output(target: Path) -> None:
    before = tree(target.parent)
    with pytest.raises(ZeroDivisionError):
        make(target, lambda: 1 / 0, force=True)
    assert tree(target.parent) == before


def test_refuses_an_existing_output_without_force(target: Path) -> None:
    before = tree(target.parent)
    with pytest.raises(ExportError, match="out exists: choose another folder, or pass --force"):
        make(target, pytest.fail)
    assert tree(target.parent) == before


def test_force_replaces_an_earlier_output(target: Path) -> None:
    replace(target)
    assert tree(target.parent) == {"out": None, "out/sub": None} | {f"out/{name}": x for name, x in NEW.items()}


def test_force_takes_an_empty_folder_and_one_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    replace(tmp_path / "empty")
    replace(tmp_path / "absent")
    assert tree(tmp_path / "empty") == tree(tmp_path / "absent") == {"sub": None} | NEW


def test_force_refuses_a_folder_that_is_not_ours(target: Path) -> None:
    (target / "manifest.json").unlink()
    before = tree(target.parent)
    with pytest.raises(ExportError, match=r"out has no manifest.json, so it is no earlier output"):
        replace(target)
    assert tree(target.parent) == before


def test_the_marker_can_be_another_file(target: Path) -> None:
    with new_folder(target, force=True, marker="model.onnx"):
        pass
    assert tree(target) == {}


def test_refuses_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"a file")
    with pytest.raises(ExportError, match="out is not a folder"):
        replace(tmp_path / "out")
    assert tree(tmp_path) == {"out": b"a file"}


def test_refuses_a_mount_point(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: path == target)
    with pytest.raises(ExportError, match=r"out is a mount point.*choose a folder inside it"):
        replace(target)


def test_replaces_the_folder_behind_a_symbolic_link(target: Path) -> None:
    (target.parent / "link").symlink_to(target)
    replace(target.parent / "link")
    assert (target.parent / "link").is_symlink()
    assert tree(target) == {"sub": None} | NEW


@pytest.mark.parametrize("parent", ["missing", "missing/deeper", "file"])
def test_refuses_a_parent_that_is_no_folder(tmp_path: Path, parent: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ExportError, match=f"{tmp_path / parent} is not a folder: make it first"):
        replace(tmp_path / parent / "out")
    assert tree(tmp_path) == {"file": b""}


def test_refuses_a_name_too_long_before_the_work_begins(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"File name too long.*choose a shorter name"):
        make(tmp_path / ("x" * 300), pytest.fail)


def test_another_run_that_came_first_is_not_harmed(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="another run made it meanwhile"):
        make(tmp_path / "out", lambda: fill(tmp_path / "out", OLD))
    assert tree(tmp_path / "out") == {"sub": None} | OLD
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "free space or choose another disk"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "choose a folder that you may write to"),
        (errno.EROFS, "not read-only"),
        (errno.EFBIG, "files of this size"),
        (errno.ENAMETOOLONG, "shorter name"),
    ],
)
def test_says_what_to_do_when_the_folder_cannot_be_made(
    target: Path, monkeypatch: pytest.MonkeyPatch, code: int, advice: str
) -> None:
    before = tree(target.parent)
    monkeypatch.setattr(os, "mkdir", Fault(1, OSError(code, os.strerror(code))).before(os.mkdir))
    with pytest.raises(ExportError, match=f"cannot write {target}: {os.strerror(code)}: .*{advice}"):
        replace(target)
    assert tree(target.parent) == before


def test_an_error_that_the_user_cannot_mend_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), write_errors(tmp_path / "out"):
        (tmp_path / "no such file").read_bytes()


def test_a_full_disk_at_any_step_leaves_the_old_output(target: Path) -> None:
    every_full_disk(lambda: replace(target), target.parent)
    assert tree(target) == {"sub": None} | NEW


def test_a_full_disk_at_any_step_leaves_no_new_output(tmp_path: Path) -> None:
    every_full_disk(lambda: make(tmp_path / "out"), tmp_path)


def test_an_interrupt_at_any_moment_leaves_the_old_output_or_the_new(target: Path) -> None:
    found = []

    def reset() -> None:
        shutil.rmtree(target)
        fill(target, OLD)

    def check() -> None:
        assert [path.name for path in target.parent.iterdir()] == ["out"]
        found.append(tree(target))
        assert found[-1] in ({"sub": None} | OLD, {"sub": None} | NEW)

    every_interrupt(reset, lambda: replace(target), check)
    assert {"sub": None} | OLD in found
    assert {"sub": None} | NEW in found


def test_an_interrupt_at_any_moment_leaves_no_output_or_a_whole_one(tmp_path: Path) -> None:
    def check() -> None:
        assert tree(tmp_path) in (
            {},
            {"out": None, "out/sub": None} | {f"out/{name}": x for name, x in NEW.items()},
        )

    every_interrupt(lambda: shutil.rmtree(tmp_path / "out", True), lambda: replace(tmp_path / "out"), check)


def test_an_old_output_that_cannot_be_put_back_is_kept_and_named(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def broken(source: Path, to: Path) -> None:
        if to == target:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(source))
        rename(source, to)

    monkeypatch.setattr(os, "rename", broken)
    with pytest.raises(ExportError) as caught:
        replace(target)
    [kept] = target.parent.glob(".llmexport-*/old")
    assert str(kept) in str(caught.value)
    assert tree(kept) == {"sub": None} | OLD


def test_write_files_replaces_and_adds(target: Path) -> None:
    write_files(target, {"report.json": b"report", "manifest.json": b"new manifest"})
    assert tree(target) == {"sub": None} | OLD | {"report.json": b"report", "manifest.json": b"new manifest"}


def test_write_files_leaves_a_hard_linked_original_alone(target: Path) -> None:
    os.link(target / "model.onnx", target.parent / "original")
    write_files(target, {"model.onnx": b"new"})
    assert (target.parent / "original").read_bytes() == OLD["model.onnx"]


def test_write_files_keeps_the_order(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    replace_file = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(b.name), replace_file(a, b)))
    write_files(target, {"z": b"1", "a": b"2", "manifest.json": b"3"})
    assert order == ["z", "a", "manifest.json"]


def test_write_files_refuses_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"out/report.json: .*out is not a folder: make it first"):
        write_files(tmp_path / "out", {"report.json": b""})


PAIR = {"model.onnx": b"new model", "manifest.json": b"new manifest"}


def check_pair(target: Path) -> None:
    """Each file is whole, and the second is new only if the first is."""
    states = [{}, {"model.onnx": PAIR["model.onnx"]}, PAIR]
    assert tree(target) in [{"sub": None} | OLD | state for state in states]


@pytest.mark.parametrize("due", range(1, 11))
def test_write_files_on_a_full_disk_leaves_whole_files(target: Path, due: int) -> None:
    # mkdir, twice open, write and sync, two renames, sync
    fault = Fault(due, OSError(errno.ENOSPC, "No space left on device"))
    with fault.armed(), pytest.raises(ExportError, match="No space left on device: free space"):
        write_files(target, PAIR)
    check_pair(target)


def test_write_files_interrupted_at_any_moment_leaves_whole_files(target: Path) -> None:
    every_interrupt(lambda: fill(target, OLD), lambda: write_files(target, PAIR), lambda: check_pair(target))


def place(shards: list[Path], folder: Path, mode: str) -> set[str]:
    """Place files as they are now; returns in which ways."""
    return set(placing.place_weights({shard: stamp(shard) for shard in shards}, folder, mode).values())


@pytest.fixture(autouse=True)
def no_reflinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system without them, whatever the one of these tests has."""
    monkeypatch.setattr(placing, "reflink", lambda source, target: False)


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Two shards, the second one a symbolic link as in a Hugging Face cache."""
    fill(tmp_path / "in", {"1.safetensors": b"one", "blob": b"two"})
    (tmp_path / "in/2.safetensors").symlink_to("blob")
    (tmp_path / "new").mkdir()
    return [tmp_path / "in/1.safetensors", tmp_path / "in/2.safetensors"]


@pytest.mark.parametrize("mode", ["link", "auto"])
def test_links_weights_to_the_files_themselves(shards: list[Path], tmp_path: Path, mode: str) -> None:
    assert place(shards, tmp_path / "new", mode) == {"link"}
    for shard in shards:
        assert not (tmp_path / "new" / shard.name).is_symlink()
        assert (tmp_path / "new" / shard.name).samefile(shard)


def test_copies_weights_when_asked(shards: list[Path], tmp_path: Path) -> None:
    assert place(shards, tmp_path / "new", "copy") == {"copy"}
    assert tree(tmp_path / "new") == {"1.safetensors": b"one", "2.safetensors": b"two"}
    assert not (tmp_path / "new/1.safetensors").samefile(shards[0])


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP])
def test_where_no_link_is_possible_auto_copies_and_link_names_the_option(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(source: Path, to: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(ExportError, match=r"cannot link .*1.safetensors.*pass --weights copy"):
        place(shards, tmp_path / "new", "link")
    assert place(shards, tmp_path / "new", "auto") == {"copy"}
    assert tree(tmp_path / "new") == {"1.safetensors": b"one", "2.safetensors": b"two"}


def test_auto_copies_only_what_it_cannot_link(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", Fault(2, OSError(errno.EMLINK, "Too many links")).before(os.link))
    assert place(shards, tmp_path / "new", "auto") == {"link", "copy"}
    assert tree(tmp_path / "new") == {"1.safetensors": b"one", "2.safetensors": b"two"}


def test_a_link_that_fails_for_another_reason_is_not_copied(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", Fault(1, OSError(errno.EROFS, os.strerror(errno.EROFS))).before(os.link))
    with pytest.raises(ExportError, match="Read-only file system"):
        place(shards, tmp_path / "new", "auto")


def test_says_how_much_space_a_copy_needs(shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = os.stat
    large = os.stat_result((0,) * 6 + (140 * 10**9,) + (0,) * 3, {"st_blocks": 140 * 10**9})
    monkeypatch.setattr(os, "stat", lambda path, **how: large if "/in/" in str(path) else stat(path, **how))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * 10**9))
    with pytest.raises(ExportError, match=r"cannot copy 280 GB .*, 5 GB are free: free space"):
        place(shards, tmp_path / "new", "copy")


def test_never_writes_into_an_existing_file(shards: list[Path], tmp_path: Path) -> None:
    place(shards, tmp_path / "new", "link")
    with pytest.raises(FileExistsError):
        place(shards, tmp_path / "new", "copy")
    assert shards[0].read_bytes() == b"one"


@pytest.mark.parametrize("tail", [0, 1, 12345])
def test_a_copy_keeps_the_holes_and_needs_no_space_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tail: int
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4 << 20))
    source, size = tmp_path / "sparse", (64 << 20) + tail
    with open(source, "wb") as file:
        file.write(b"head")
        file.seek(33 << 20)
        file.write(b"middle")
        file.truncate(size)
    (tmp_path / "new").mkdir()
    place([source], tmp_path / "new", "copy")
    copy = tmp_path / "new/sparse"
    assert copy.read_bytes() == source.read_bytes()
    assert copy.stat().st_blocks * 512 < 4 << 20


@pytest.mark.parametrize("mode", ["link", "copy"])
def test_weights_on_a_full_disk_leave_the_old_output(target: Path, shards: list[Path], mode: str) -> None:
    def act() -> None:
        with new_folder(target, force=True) as folder:
            place(shards, folder, mode)
            (folder / "model.onnx").write_bytes(b"new")

    every_full_disk(act, target.parent)
    assert shards[0].read_bytes() == b"one"
