"""What changes in an export after it was made: found, or said that it was not looked for."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from llmexport.export import archs, engine, graph_file, identity, manifest, onnx_file, random_checkpoint
from llmexport.export.checkpoint import open_checkpoint, read_header
from llmexport.export.cli.main import main
from llmexport.export.errors import ExportError
from llmexport.export.identity import KNOWN, SAMPLED, WHOLE
from llmexport.validate import validate

pytestmark = pytest.mark.model

SHARD = "model-00001-of-00001.safetensors"
FLIPS = 12_800


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of over a megabyte, of which 64 pages are a part."""
    arch = archs.load("gemma")
    folder = tmp_path_factory.mktemp("large") / "ck"
    random_checkpoint.write(arch, folder, config={**arch.tiny, "vocab_size": 16384}, dtype="float32")
    assert (folder / SHARD).stat().st_size > 8 * identity.PAGES * identity.PAGE
    return folder


@pytest.fixture
def checkpoint(large: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(large, tmp_path / "ck"))


def export(folder: Path, *, digest: bool = False) -> Path:
    """Hard links, so that who writes to the checkpoint writes to the export."""
    found = open_checkpoint(folder)
    request = onnx_file.Request(archs.choose(None, found.config), found, weights="link", digest=digest)
    onnx_file.write(request, folder.parent / "out", force=False)
    return folder.parent / "out"


def flip_between_pages(path: Path) -> None:
    """The sign of 12,800 weights, none of them on a page that a sample reads."""
    data = bytearray(path.read_bytes())
    starts = [len(data) * i // identity.PAGES for i in range(identity.PAGES)]
    first = min(t.offset for t in read_header(path)[0].values())
    free = [o for s in starts[1:-1] for o in range((s + identity.PAGE + 3) // 4 * 4 + 3, s + 4 * identity.PAGE, 4)]
    chosen = [o for o in free if o > first and not any(s <= o < s + identity.PAGE for s in starts)][:FLIPS]
    assert len(chosen) == FLIPS
    for offset in chosen:
        data[offset] ^= 0x80
    with open(path, "r+b") as file:
        file.write(data)


def hide(path: Path, change: Callable[[Path], None]) -> None:
    """As `change`, with the file's time put back: nothing but its bytes tells."""
    before = path.stat()
    change(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def touch(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def how(folder: Path) -> list[str]:
    return [held.how for held in manifest.read(folder).held.values()]


def test_an_export_that_nobody_touched_says_what_was_not_read(checkpoint: Path) -> None:
    found = manifest.read(export(checkpoint))
    assert found.held[SHARD].how == KNOWN
    assert found.checked == "1 of 1 files: " + identity.SAYS[KNOWN].format(rest="not read")
    assert "other bytes not read" in found.checked


@pytest.mark.parametrize("change", [flip_between_pages, touch])
def test_a_file_written_to_since_is_refused_where_no_digest_tells_of_all_its_bytes(
    change: Callable[[Path], None], checkpoint: Path
) -> None:
    out = export(checkpoint)
    change(checkpoint / SHARD)
    for use in (manifest.read, lambda folder: engine.build(folder)):
        with pytest.raises(ExportError, match=r"was written, touched or replaced.*no digest tells.*export again"):
            use(out)


def test_a_file_replaced_in_its_folder_is_refused(checkpoint: Path) -> None:
    out = export(checkpoint)
    new = Path(shutil.copyfile(checkpoint / SHARD, checkpoint / "new"))
    flip_between_pages(new)
    touch(new)
    os.replace(new, out / SHARD)
    with pytest.raises(ExportError, match=r"was written, touched or replaced"):
        manifest.read(out)


def test_with_digests_a_touched_file_is_read_whole_and_passes(checkpoint: Path) -> None:
    out = export(checkpoint, digest=True)
    assert how(out) == [KNOWN]
    touch(checkpoint / SHARD)
    assert how(out) == [WHOLE]


def test_with_digests_flipped_signs_are_found(checkpoint: Path) -> None:
    out = export(checkpoint, digest=True)
    flip_between_pages(checkpoint / SHARD)
    with pytest.raises(ExportError, match=r"is not the file that was exported, it has changed since"):
        manifest.read(out)


def test_verify_finds_what_size_time_inode_and_pages_do_not(checkpoint: Path) -> None:
    out = export(checkpoint, digest=True)
    assert manifest.verified(manifest.read(out)).checked == "1 of 1 files: every byte as recorded"
    hide(checkpoint / SHARD, flip_between_pages)
    found = manifest.read(out)
    assert "other bytes not read" in found.checked
    with pytest.raises(ExportError, match=r"is not the file that was exported"):
        manifest.verified(found)
    with pytest.raises(ExportError, match=r"is not the file that was exported"):
        engine.build(out, verify=True)


def test_verify_without_digests_says_how_to_get_them(checkpoint: Path) -> None:
    with pytest.raises(ExportError, match=r"cannot be verified.*--digest, or run `llmexport validate` once"):
        manifest.verified(manifest.read(export(checkpoint)))


@pytest.mark.parametrize("copy", [shutil.copy2, shutil.copy], ids=["cp -a", "cp -r"])
def test_an_export_copied_elsewhere_is_taken_and_said_to_be_sampled(copy: Any, checkpoint: Path) -> None:
    out = export(checkpoint)
    there = Path(shutil.copytree(out, checkpoint.parent / "there", copy_function=copy))
    if copy is shutil.copy:
        touch(there / SHARD)
    found = manifest.read(there)
    assert found.held[SHARD].how == SAMPLED
    assert found.checked.endswith("inode or modification time not, as in a copy, other bytes not read")
    # What the copy says for itself from now on.
    manifest.rewrite(manifest.restamp(manifest.digested(found)))
    assert how(there) == [KNOWN]
    flip_between_pages(there / SHARD)
    with pytest.raises(ExportError, match=r"has changed since"):
        manifest.read(there)


def test_an_export_moved_elsewhere_is_as_it_was(checkpoint: Path) -> None:
    out = export(checkpoint)
    os.rename(out, checkpoint.parent / "there")
    assert how(checkpoint.parent / "there") == [KNOWN]


def test_a_small_file_is_read_whole_whatever_its_time(tmp_path: Path) -> None:
    random_checkpoint.write(archs.load("gemma"), tmp_path / "ck", shard_bytes=50_000)
    out = export(tmp_path / "ck")
    for shard in out.glob("*.safetensors"):
        touch(shard)
    assert set(how(out)) == {WHOLE}


def test_a_file_that_changes_while_it_is_used_is_noticed(checkpoint: Path) -> None:
    found = manifest.read(export(checkpoint))
    found.check_untouched()
    flip_between_pages(checkpoint / SHARD)
    with pytest.raises(ExportError, match="changed while it was used"):
        found.check_untouched()


@pytest.mark.parametrize("size", [0, 1, identity.PIECE, identity.CHUNK - 1, identity.CHUNK, 2 * identity.CHUNK + 7])
def test_a_whole_digest_is_of_every_byte_in_order(size: int, tmp_path: Path) -> None:
    import hashlib

    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    parts = [hashlib.sha256(data[i : i + identity.CHUNK]).digest() for i in range(0, size, identity.CHUNK)]
    assert identity.whole_digest(tmp_path / "file") == hashlib.sha256(b"".join(parts)).hexdigest()


def swap_offsets(model: onnx.ModelProto) -> None:
    by_size: dict[tuple[int, ...], list[onnx.TensorProto]] = {}
    for tensor in model.graph.initializer:
        if tensor.external_data:
            by_size.setdefault(tuple(tensor.dims), []).append(tensor)
    first, second = next(same for same in by_size.values() if len(same) > 1)[:2]
    for one, other in zip(first.external_data, second.external_data, strict=True):
        one.value, other.value = other.value, one.value


def subtract(model: onnx.ModelProto) -> None:
    next(n for f in model.functions for n in f.node if n.op_type == "Add").op_type = "Sub"


def change_epsilon(model: onnx.ModelProto) -> None:
    next(a for n in model.graph.node for a in n.attribute if a.name == "epsilon").f *= 2


@pytest.fixture(params=["model", "block"])
def copied(request: pytest.FixtureRequest, exported: Callable[..., Path], tmp_path: Path) -> Path:
    block = {"model": None, "block": "layer"}[request.param]
    return Path(shutil.copytree(exported("llama", block=block), tmp_path / "export"))


def load(folder: Path) -> onnx.ModelProto:
    found = manifest.read(folder)
    return graph_file.load(found, found.graphs[0])


@pytest.mark.parametrize("change", [swap_offsets, subtract, change_epsilon])
def test_a_changed_model_is_refused_by_all_that_reads_it(
    change: Callable[[onnx.ModelProto], None], copied: Path
) -> None:
    load(copied)
    model = onnx.load(copied / "model.onnx", load_external_data=False)
    change(model)
    (copied / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=r"model.onnx is not the file that was exported, it has changed since"):
        load(copied)
    with pytest.raises(ExportError, match=r"model.onnx is not the file that was exported"):
        engine.build(copied)


@pytest.mark.parametrize(
    ("key", "value"), [("dtype", "float16"), ("target", "tensorrt"), ("graphs", {}), ("weights", {"files": []})]
)
def test_a_changed_manifest_is_refused(key: str, value: object, copied: Path) -> None:
    path = copied / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ExportError, match=r"manifest.json is not the file that was exported, it has changed since"):
        manifest.read(copied)


def test_a_manifest_laid_out_otherwise_says_the_same(copied: Path) -> None:
    path = copied / "manifest.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(data.items()))))
    assert manifest.as_data(manifest.read(copied)) == data


def test_a_first_validation_that_passes_records_digests_and_says_so(checkpoint: Path) -> None:

    found = open_checkpoint(checkpoint)
    request = onnx_file.Request(archs.choose(None, found.config), found, block="embedding", weights="link")
    out = checkpoint.parent / "out"
    onnx_file.write(request, out, force=False)
    assert not manifest.has_digests(manifest.read(out))
    first = validate(out)
    assert first.passed
    assert first.weights.endswith("other bytes read for the first time and their digests recorded")
    assert json.loads((out / "report.json").read_text())["weights"] == first.weights
    assert first.weights in (out / "report.html").read_text()
    assert validate(out).weights.endswith("other bytes not read")
    assert validate(out, verify=True).weights == "1 of 1 files: every byte as recorded"
    hide(checkpoint / SHARD, flip_between_pages)
    with pytest.raises(ExportError, match="has changed since"):
        validate(out, verify=True)


def test_a_validation_that_fails_records_no_digests(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would vouch for what was found wrong."""
    from llmexport.validate import ladder
    from llmexport.validate.report import Report, Rung

    monkeypatch.setattr(ladder, "climb", lambda *_, **__: Report([Rung("a rung", "fail")], {}, {}))
    out = export(checkpoint)
    assert not validate(out).passed
    assert not manifest.has_digests(manifest.read(out))


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["llmexport", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_command_line_records_digests_and_verifies_them(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = checkpoint.parent / "out"
    made = ("--checkpoint", checkpoint, "--block", "embedding", "--weights", "link", "-o", out, "--digest")
    assert command(monkeypatch, "onnx", *made) == 0
    assert "export with `--weights copy`" in capsys.readouterr().out
    assert command(monkeypatch, "validate", out, "--verify", "--json") == 0
    assert json.loads(capsys.readouterr().out)["weights"] == "1 of 1 files: every byte as recorded"
    hide(checkpoint / SHARD, flip_between_pages)
    for name in ("engine", "validate"):
        assert command(monkeypatch, name, out, "--verify", "-q") == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.endswith(f"{SHARD} is not the file that was exported, it has changed since: export again\n")
