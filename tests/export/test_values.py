"""What a file says is shown on its own line, and cannot speak for us."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from llmexport.export import archs, random_checkpoint
from llmexport.export.cli.console import Console
from llmexport.export.cli.main import main
from llmexport.export.values import LONGEST, key_name, message, visible

FORGED = "x\nerror: forged\r\x1b[31m\u2028error: forged\u202etxt\x9b31m"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, très bien, 模型", "plain, très bien, 模型"),
        ("a\nb\rc\td", r"a\nb\rc\td"),
        ("\x1b[31m\x9b\x00\x7f", r"\x1b[31m\x9b\x00\x7f"),
        ("\u2028\u2029\u0085", r"\u2028\u2029\x85"),
        ("\u202e\u2066\u200f\ufeff", r"\u202e\u2066\u200f\ufeff"),
        ("\udc80", r"\udc80"),
    ],
)
def test_what_does_not_print_is_escaped(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_a_long_text_keeps_its_beginning_and_its_end() -> None:
    shown = visible(f"begin {'x' * 10**7} and the cure")
    assert shown.startswith("begin xxx")
    assert shown.endswith("xxx and the cure")
    assert "(9998019 characters more)" in shown
    assert len(shown) < LONGEST + 50


def test_a_long_key_is_cut() -> None:
    assert key_name("hidden_size") == "hidden_size"
    assert len(key_name("k" * 10**6)) < 100


def test_a_message_has_lines_of_its_own_only() -> None:
    assert message(f"name {FORGED}") == rf"name {visible(FORGED)}"
    assert message("failed:\n  one\ntwo\n  error: three") == "failed:\n  one\n  two\n    error: three"
    told = message("failed:\n  " + "\n".join(map(str, range(1000)))).splitlines()
    assert (len(told), told[-1]) == (62, "  ... (940 lines more)")


def change_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def misname(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][FORGED] = FORGED
    path.write_text(json.dumps(index))


def one_more_tensor(folder: Path) -> None:
    shard = min(folder.glob("*.safetensors"))
    save_file({FORGED: np.zeros(2, np.float32)}, folder / "more.safetensors")
    assert shard.exists()
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][FORGED] = "more.safetensors"
    path.write_text(json.dumps(index))


HOSTILE = {
    "model_type": change_config(model_type=FORGED),
    "architectures": change_config(architectures=[FORGED]),
    "key": change_config(**{FORGED: 1}),
    "value": change_config(hidden_act=FORGED),
    "index": misname,
    "tensor": one_more_tensor,
}


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """What a command that fails says on stderr, but for its progress."""
    monkeypatch.setattr(sys, "argv", ["llmexport", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    return capsys.readouterr().err


def assert_one_line(text: str) -> None:
    assert text.endswith("\n")
    assert text[:-1].isprintable()
    assert text.startswith("error: ")
    assert r"x\n" in text


@pytest.mark.parametrize("where", HOSTILE)
def test_a_name_in_a_checkpoint_forges_no_line(where: str, tmp_path: Path, capsys, monkeypatch) -> None:
    random_checkpoint.write(archs.load("llama"), tmp_path / "ck", shard_bytes=60_000)
    HOSTILE[where](tmp_path / "ck")
    assert_one_line(said(capsys, monkeypatch, "onnx", "-q", "--checkpoint", tmp_path / "ck", "-o", tmp_path / "out"))


@pytest.mark.parametrize("command", ["engine", "validate"])
@pytest.mark.parametrize("key", ["format", "blocks"])
def test_a_name_in_an_export_forges_no_line(command: str, key: str, tmp_path: Path, capsys, monkeypatch) -> None:
    text = json.dumps({"format": 1, "blocks": [{"is": FORGED, FORGED: 1}], "inputs": [FORGED]} | {key: FORGED})
    (tmp_path / "manifest.json").write_text(text)
    err = said(capsys, monkeypatch, command, "-q", tmp_path)
    assert err[:-1].isprintable()
    assert err.startswith("error: ")


def test_a_folder_with_a_hostile_name_forges_no_line(tmp_path: Path, capsys, monkeypatch) -> None:
    assert_one_line(said(capsys, monkeypatch, "engine", "-q", tmp_path / FORGED.replace("/", "")))


def test_a_table_shows_names_escaped(capsys) -> None:
    console = Console()
    console.table(FORGED, ("a",), [(FORGED,)])
    console.say(FORGED)
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if not line.isprintable() or line.startswith("error")] == []
    assert out.count("forged") == 6
