"""A checkpoint's files in an export: the very ones that were read, in the way that the file system has."""

from __future__ import annotations

import builtins
import contextlib
import errno
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest

from llmexport.export import archs, identity, manifest, onnx_file, placing, random_checkpoint
from llmexport.export import checkpoint as checkpoint_module
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.errors import ExportError
from llmexport.export.progress import Progress, silent
from llmexport.export.stamp import Stamp, stamp

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints 0 and 1 of the same shapes, whose files are an hour old."""
    folder = tmp_path_factory.mktemp("originals")
    for seed in (0, 1):
        random_checkpoint.write(archs.load("gemma"), folder / f"{seed}", seed=seed)
    return folder


@pytest.fixture
def checkpoint(originals: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(originals / "0", tmp_path / "ck"))
    for path in folder.iterdir():
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 3600))
    return folder


def export(folder: Path, weights: str = "link", progress: Progress = silent) -> Path:
    checkpoint = open_checkpoint(folder)
    request = onnx_file.Request(archs.choose(None, checkpoint.config), checkpoint, weights=weights)
    onnx_file.write(request, folder.parent / "out", force=False, progress=progress)
    return folder.parent / "out"


def rename(path: Path, new: bytes) -> None:
    path.with_suffix(".new").write_bytes(new)
    os.replace(path.with_suffix(".new"), path)


def overwrite(path: Path, new: bytes) -> None:
    path.write_bytes(new)


def truncate(path: Path, new: bytes) -> None:
    os.truncate(path, path.stat().st_size - 4)


def append(path: Path, new: bytes) -> None:
    with open(path, "ab") as file:
        file.write(b"\0\0\0\0")


def remove(path: Path, new: bytes) -> None:
    path.unlink()


CHANGES = [rename, overwrite, truncate, append, remove]
Change = Callable[[Path, bytes], None]


def traced(what: str) -> bool:
    return what.startswith("trace")


@pytest.mark.parametrize("weights", ["link", "copy"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_that_changes_while_blocks_are_traced_is_refused(
    change: Change, weights: str, checkpoint: Path, originals: Path
) -> None:
    def progress(what: str, done: int, of: int) -> None:
        if traced(what) and done == 0:
            change(checkpoint / SHARD, (originals / "1" / SHARD).read_bytes())

    with pytest.raises(ExportError, match=rf"{SHARD}.* (changed while it was exported|No such file)") as caught:
        export(checkpoint, weights, progress)
    assert "\n" not in str(caught.value)
    assert not (checkpoint.parent / "out").exists()


# What has another name, or none, by then is still the file that was opened or linked.
@pytest.mark.parametrize(("change", "right"), [(c, c in (rename, remove)) for c in CHANGES])
def test_a_shard_that_changes_while_it_is_copied_is_refused_or_not_what_is_copied(
    change: Change, right: bool, checkpoint: Path, originals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change_once(path: Path, mode: str) -> object:
        if mode == "xb" and path.name == SHARD:
            change(checkpoint / SHARD, (originals / "1" / SHARD).read_bytes())
        return builtins.open(path, mode)

    monkeypatch.setattr(placing, "open", change_once, raising=False)
    check_right_or_refused(right, lambda: export(checkpoint, "copy"), originals)


@pytest.mark.parametrize(("change", "right"), [(c, c in (rename, remove)) for c in CHANGES])
def test_a_shard_that_changes_after_it_was_linked_is_refused_or_not_what_is_linked(
    change: Change, right: bool, checkpoint: Path, originals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = identity.sample

    def change_first(path: Path, size: int) -> str:
        monkeypatch.setattr(identity, "sample", sample)
        change(checkpoint / SHARD, (originals / "1" / SHARD).read_bytes())
        return sample(path, size)

    monkeypatch.setattr(identity, "sample", change_first)
    check_right_or_refused(right, lambda: export(checkpoint), originals)


def check_right_or_refused(right: bool, act: Callable[[], Path], originals: Path) -> None:
    if right:
        assert (act() / SHARD).read_bytes() == (originals / "0" / SHARD).read_bytes()
        return
    with pytest.raises(ExportError, match=f"{SHARD} changed while it was exported"):
        act()


@pytest.mark.parametrize("text", [b'{"hidden_size": 1}', b"{", None])
def test_a_config_that_changes_while_blocks_are_traced_is_refused(text: bytes | None, checkpoint: Path) -> None:
    """It would lie beside a graph that was made of another."""

    def progress(what: str, done: int, of: int) -> None:
        if traced(what) and done == 0:
            (checkpoint / "config.json").unlink()
            if text is not None:
                (checkpoint / "config.json").write_bytes(text)

    with pytest.raises(ExportError, match=r"config.json(: No such file| changed while it was exported)"):
        export(checkpoint, "link", progress)


def test_a_header_that_changes_while_it_is_read_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stamp_first(file: int) -> Stamp:
        seen = stamp(file)
        append(checkpoint / SHARD, b"")
        return seen

    monkeypatch.setattr(checkpoint_module, "stamp", stamp_first)
    with pytest.raises(ExportError, match=f"{SHARD} changed while it was used"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize("change", [rename, overwrite, truncate, append])
def test_a_tensor_of_a_file_that_changed_is_not_read(change: Change, checkpoint: Path, originals: Path) -> None:
    found = open_checkpoint(checkpoint)
    name = list(found.tensors)[-1]
    assert found.read(name).nbytes == found.tensors[name].nbytes
    change(checkpoint / SHARD, (originals / "1" / SHARD).read_bytes())
    with pytest.raises(ExportError, match=f"{SHARD} changed while it was used"):
        found.read(name)


def test_auto_makes_reflinks_where_it_can(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = []

    def reflink(source: int, target: int) -> bool:
        shared.append(os.fstat(source).st_ino)
        os.sendfile(target, source, 0, os.fstat(source).st_size)
        return True

    monkeypatch.setattr(placing, "reflink", reflink)
    out = export(checkpoint, "auto")
    assert (checkpoint / SHARD).stat().st_ino in shared
    assert not (out / SHARD).samefile(checkpoint / SHARD)
    assert manifest.read(out).placed == "reflink"
    # No hard link, so that onnx opens it; and no hint that it does not.
    onnx.load(out / "model.onnx")
    assert placing.openings([out]) == []


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY])
def test_auto_links_where_the_file_system_has_no_reflinks(
    code: int, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(target: int, request: int, source: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(placing.fcntl, "ioctl", refuse)
    out = export(checkpoint, "auto")
    data = manifest.as_data(manifest.read(out))
    assert (out / SHARD).samefile(checkpoint / SHARD)
    assert data["weights"]["placed"] == "link"
    [hint] = placing.openings([out])
    assert "`--weights copy`" in hint


def test_a_reflink_that_finds_the_disk_full_is_an_error(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(target: int, request: int, source: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(placing.fcntl, "ioctl", refuse)
    with pytest.raises(ExportError, match="No space left on device"):
        export(checkpoint, "auto")


@pytest.fixture
def reflinking(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system with reflinks, made in a file where this process may mount it."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    makers = [name for name in ("mkfs.btrfs", "mkfs.xfs") if shutil.which(name)]
    if not makers or os.geteuid():
        pytest.skip("needs root, and mkfs.btrfs or mkfs.xfs, to mount a file system with reflinks")
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 400 << 20)
    subprocess.run([makers[0], "-q", image], check=True, capture_output=True)
    if subprocess.run(["mount", "-o", "loop", image, folder], capture_output=True).returncode:
        pytest.skip(f"this machine mounts nothing that {makers[0]} makes")
    with contextlib.ExitStack() as stack:
        stack.callback(subprocess.run, ["umount", folder], check=True)
        yield folder


def test_a_real_file_system_with_reflinks_shares_the_bytes(checkpoint: Path, reflinking: Path) -> None:
    source = Path(shutil.copytree(checkpoint, reflinking / "ck"))
    out = export(source, "auto")
    assert manifest.read(out).placed == "reflink"
    assert (out / SHARD).read_bytes() == (source / SHARD).read_bytes()
    onnx.load(out / "model.onnx")
    # A later change of the checkpoint is none of the export.
    (source / SHARD).write_bytes(b"x")
    manifest.read(out)


TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]


def test_a_tokenizer_travels_and_both_auto_classes_open_the_folder(checkpoint: Path) -> None:
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "one": 1, "two": 2}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    made.chat_template = "{{ messages[0]['content'] }}"
    made.save_pretrained(checkpoint)
    out = export(checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer("two one three")["input_ids"] == [2, 1, 0]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "one"}], tokenize=False) == "one"
    config = transformers.AutoConfig.from_pretrained(out)
    assert config.model_type == "gemma"


def test_what_says_how_a_model_is_used_travels_and_nothing_else(checkpoint: Path, tmp_path: Path) -> None:
    travels = [*TOKENIZER, "generation_config.json", "added_tokens.json", "vocab.json", "merges.txt", "spiece.model"]
    travels += ["qwen.tiktoken", "preprocessor_config.json", "additional_chat_templates/tools.jinja"]
    stays = ["tokenizer_code.py", "tokenizer.bin", "notes.txt", "manifest.json", "model.onnx", "pytorch_model.bin"]
    stays += ["additional_chat_templates/code.py"]
    (checkpoint / "additional_chat_templates").mkdir()
    for name in (*travels, *stays):
        (checkpoint / name).write_text(f"this is {name}")
    # As in a hub cache, where a snapshot is a folder of links.
    (tmp_path / "blob").write_text("linked")
    (checkpoint / "processor_config.json").symlink_to(tmp_path / "blob")
    out = export(checkpoint)
    data = manifest.as_data(manifest.read(out))
    expected = sorted([*travels, "config.json", "processor_config.json"])
    assert list(data["companions"]) == expected
    assert data["files"] == sorted([*expected, SHARD, "manifest.json", "model.onnx"])
    assert data["files"] == sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    for name, digest in data["companions"].items():
        assert hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() == digest
        assert not (out / name).is_symlink()
        assert not (out / name).samefile(checkpoint / name)
    assert (out / "processor_config.json").read_text() == "linked"


def test_a_companion_that_was_edited_does_not_stop_what_is_computed_without_it(checkpoint: Path) -> None:
    out = export(checkpoint)
    (out / "config.json").write_text("{}")
    assert manifest.read(out).config == json.loads((checkpoint / "config.json").read_text())


def test_a_companion_that_cannot_be_read_is_one_line(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").symlink_to("gone")
    with pytest.raises(ExportError, match=r"cannot read .*tokenizer.json: No such file.*: check that") as caught:
        export(checkpoint)
    assert "\n" not in str(caught.value)


def test_a_block_lists_its_files_and_has_no_companions(checkpoint: Path) -> None:
    found = open_checkpoint(checkpoint)
    request = onnx_file.Request(archs.choose(None, found.config), found, weights="link")
    records = onnx_file.write_blocks(request, checkpoint.parent / "out", force=False)
    for name, record in records.items():
        inside = sorted(p.name for p in (checkpoint.parent / "out" / name).iterdir())
        assert record.files == inside
        assert record.companions == {}
