import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from faults import Fault, every_full_disk, every_interrupt, fill, tree

from llmexport.export import interrupt, output, placing
from llmexport.export.errors import ExportError
from llmexport.export.output import check_new_file, new_folder, write_errors, write_files
from llmexport.export.stamp import stamp

RECORD = {"format": 1, "arch": "a", "blocks": [], "config": {}, "weights": {"files": []}}
OLD = {
    "manifest.json": json.dumps(RECORD | {"files": ["sub/tokens"]}).encode(),
    "model.onnx": b"old model",
    "sub/tokens": b"listed",
}
NEW = {"manifest.json": b"new manifest", "model.onnx": b"new model", "sub/more": b"new"}


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


def test_refuses_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"a file")
    with pytest.raises(ExportError, match="out is not a folder"):
        replace(tmp_path / "out")
    assert tree(tmp_path) == {"out": b"a file"}


def test_refuses_a_mount_point(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: path == target)
    with pytest.raises(ExportError, match=r"out is a mount point.*choose a folder inside it"):
        replace(target)


def test_a_name_by_way_of_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"gone/.. is not a folder: make it first"):
        make(tmp_path / "gone/../out")
    assert tree(tmp_path) == {}


def test_what_is_put_into_the_old_output_meanwhile_is_not_deleted(target: Path) -> None:
    with pytest.raises(ExportError, match=r"also holds 'notes'"):
        make(target, lambda: fill(target, {"notes": b"mine"}), force=True)
    assert tree(target) == {"sub": None, "notes": b"mine"} | OLD


def test_an_old_output_is_at_its_place_at_every_call_of_the_system(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def look(name: str) -> None:
        call = getattr(os, name)

        def looked(*args: object, **options: object) -> object:
            found.append(tree(target).get("model.onnx"))
            return call(*args, **options)

        monkeypatch.setattr(os, name, looked)

    for name in ("rename", "fsync", "unlink", "rmdir"):
        look(name)
    replace(target)
    assert set(found) == {b"old model", b"new model"}


def test_an_interrupt_that_a_library_lost_stops_the_output_before_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupt, "_came", [signal.SIGTERM])
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out")
    assert tree(tmp_path) == {}


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


@pytest.fixture(params=["in one step", "in two"])
def exchanged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders change places as the system can, then as where it cannot."""
    if request.param == "in two":
        monkeypatch.setattr(output, "exchange", lambda new, target: False)


@pytest.mark.usefixtures("exchanged")
def test_a_full_disk_at_any_step_leaves_the_old_output(target: Path) -> None:
    every_full_disk(lambda: replace(target), target.parent)
    assert tree(target) == {"sub": None} | NEW


def test_a_full_disk_at_any_step_leaves_no_new_output(tmp_path: Path) -> None:
    every_full_disk(lambda: make(tmp_path / "out"), tmp_path)


@pytest.mark.usefixtures("exchanged")
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
    monkeypatch.setattr(output, "exchange", lambda new, target: False)
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


def test_the_folder_that_one_is_in_is_not_replaced(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(target)
    for place in (target, target / "sub"):
        monkeypatch.chdir(place)
        with pytest.raises(ExportError, match="holds the folder that you are in, and --force would replace it"):
            make(target, force=True)
    assert tree(target) == before


def test_a_file_in_a_folder_that_cannot_be_written_to_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not (Path(path) == tmp_path and mode & os.W_OK))
    with pytest.raises(ExportError, match=f"{tmp_path} cannot be written to: choose another folder"):
        check_new_file(tmp_path / "pack.npz", False, Path.exists)
