"""What --force replaces: all that a run of ours wrote, and nothing else."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from llmexport.export import archs, engine_record, onnx_file, random_checkpoint
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.earlier import BLOCKS, EXPORT, RANDOM, check
from llmexport.export.errors import ExportError
from llmexport.export.onnx_file import Request

MANIFEST = {"format": 1, "arch": "a", "blocks": [], "config": {}, "weights": {"files": [{"file": "w"}]}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What our commands write: `random`, `export`, `blocks`."""
    folder = tmp_path_factory.mktemp("made")
    gemma = archs.load("gemma")
    random_checkpoint.write(gemma, folder / "random", shard_bytes=60_000)
    request = Request(gemma, open_checkpoint(folder / "random"))
    onnx_file.write(request, folder / "export", force=False)
    onnx_file.write_blocks(request, folder / "blocks", force=False)
    return folder


@pytest.mark.parametrize(("name", "record"), [("export", EXPORT), ("blocks", BLOCKS), ("random", RANDOM)])
def test_what_a_run_wrote_may_be_replaced(made: Path, name: str, record: str) -> None:
    check(made / name, record)


def fill(folder: Path, *names: str, manifest: dict[str, object] | None = None) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    (folder / EXPORT).write_text(json.dumps(manifest or MANIFEST))
    return folder


def test_what_later_commands_add_may_be_replaced(tmp_path: Path) -> None:
    check(fill(tmp_path, "w", "model.onnx", "model.plan", engine_record.RECORD, "report.json", "report.html"), EXPORT)


def test_the_files_that_a_manifest_lists_may_be_replaced(tmp_path: Path) -> None:
    check(
        fill(tmp_path, "w", "tokenizer.json", "sub/x", manifest=MANIFEST | {"files": ["tokenizer.json", "sub/x"]}),
        EXPORT,
    )


def test_what_a_version_without_a_mark_wrote_may_be_replaced(tmp_path: Path) -> None:
    fill(tmp_path / "blocks/attention", "model.onnx", "w")
    (tmp_path / "blocks" / BLOCKS).write_text('{"blocks": ["attention"]}')
    check(tmp_path / "blocks", BLOCKS)


@pytest.mark.parametrize("name", ["notes", ".hidden", "sub/notes", "golden.npz", "model.onnx~", "engine/model.plan"])
def test_anything_else_is_named_and_kept(tmp_path: Path, name: str) -> None:
    fill(tmp_path, "w", "model.onnx", name)
    with pytest.raises(ExportError, match=f"also holds '{name.split('/')[0]}', .* move it away"):
        check(tmp_path, EXPORT)


def test_a_folder_in_the_place_of_a_file_is_kept(tmp_path: Path) -> None:
    fill(tmp_path, "model.onnx/mine")
    with pytest.raises(ExportError, match=r"also holds 'model.onnx/mine'"):
        check(tmp_path, EXPORT)


def test_an_empty_folder_and_a_link_of_the_users_are_kept(tmp_path: Path) -> None:
    fill(tmp_path / "a", "w").joinpath("mine").mkdir()
    fill(tmp_path / "b", "w").joinpath("mine").symlink_to(tmp_path / "a")
    for name in "ab":
        with pytest.raises(ExportError, match="also holds 'mine'"):
            check(tmp_path / name, EXPORT)


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (EXPORT, '{"name": "app", "icons": []}'),
        (EXPORT, '{"format": 1, "weights": {"files": []}}'),
        (EXPORT, json.dumps(MANIFEST | {"format": "1"})),
        (EXPORT, ""),
        (EXPORT, "[]"),
        (EXPORT, "[" * 100_000),
        (BLOCKS, '{"blocks": ["text", "image"]}'),
        (BLOCKS, '{"blocks": [".."]}'),
        (BLOCKS, '{"blocks": [], "editor": 1}'),
        (RANDOM, '{"seed": "mine"}'),
        (RANDOM, "{}"),
    ],
)
def test_a_record_of_another_program_is_none(tmp_path: Path, record: str, text: str) -> None:
    (tmp_path / record).write_text(text)
    with pytest.raises(ExportError, match=f"{record} is none of llmexport's, .*--force does not replace it"):
        check(tmp_path, record)


@pytest.mark.parametrize("place", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("elsewhere")])
def test_a_record_that_is_no_file_is_none(tmp_path: Path, place: Callable[[Path], object]) -> None:
    place(tmp_path / EXPORT)
    with pytest.raises(ExportError, match="is none of llmexport's"):
        check(tmp_path, EXPORT)
