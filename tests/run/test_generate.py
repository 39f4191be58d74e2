"""`llmexport generate` as a user meets it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from commands import Run, runner
from misuse import heed_signals
from tiny_tokenizer import add_tokenizer, tiny_tokenizer

PROMPT = "the quick fox"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process; returns its exit code, stdout and stderr."""
    return runner(monkeypatch, capsys)


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def by_transformers(checkpoint: Path, text: str, *, special: bool) -> str:
    """What transformers' generate makes of a prompt, on the tokenizer of the tests."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer())
    ids = torch.tensor([tiny_tokenizer().encode(text, add_special_tokens=special).ids])
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    mask = torch.ones_like(ids)
    made = model.generate(ids, attention_mask=mask, max_new_tokens=32, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


def test_the_text_is_what_transformers_generates(run: Run, talking, tiny_checkpoint) -> None:
    code, out, _ = run("generate", talking("llama"), "--prompt", PROMPT, "--raw", "--max-new-tokens", 32)
    assert (code, out) == (0, by_transformers(tiny_checkpoint("llama"), PROMPT, special=True) + "\n")


def test_a_prompt_is_what_an_encoder_reads(run: Run, talking, tiny_checkpoint) -> None:
    code, out, _ = run("generate", talking("t5"), "--prompt", PROMPT, "--raw", "--max-new-tokens", 32)
    ids = torch.tensor([tiny_tokenizer().encode(PROMPT).ids])
    model = transformers.T5ForConditionalGeneration.from_pretrained(tiny_checkpoint("t5"), dtype=torch.float32)
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer())
    assert (code, out) == (0, tokenizer.decode(made[0, 1:], skip_special_tokens=True) + "\n")


def test_a_chat_template_is_applied_where_there_is_one(run: Run, talking, tiny_checkpoint) -> None:
    code, out, _ = run("generate", talking("llama"), "--prompt", PROMPT, "--max-new-tokens", 32, "--json")
    answer = json.loads(out)
    assert answer["prompt"] == f"<s><|user|>{PROMPT}<|assistant|>"
    assert (code, answer["text"]) == (0, by_transformers(tiny_checkpoint("llama"), answer["prompt"], special=False))
    assert answer["finish"] == "length"
    assert (len(answer["ids"]), set(answer["seconds"])) == (32, {"load", "first", "rest"})


def test_an_export_talks_with_what_lay_beside_its_checkpoint(run: Run, tiny_checkpoint, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "checkpoint"))
    add_tokenizer(checkpoint)
    (checkpoint / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    (checkpoint / "generation_config.json").write_text('{"stop_strings": ["fox"]}')
    assert run("onnx", "--checkpoint", checkpoint, "-o", tmp_path / "out")[0] == 0
    code, out, _ = run("generate", tmp_path / "out", "--prompt", "jump", "--max-new-tokens", 4, "--json")
    assert (code, json.loads(out)["prompt"]) == (0, "jump!")
    beside = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert beside <= json.loads((tmp_path / "out/manifest.json").read_text())["companions"].keys()


def test_a_stream_gives_the_same_text(run: Run, talking) -> None:
    arguments = ("generate", talking("llama"), "--prompt", PROMPT, "--max-new-tokens", 32)
    assert run(*arguments, "--stream")[:2] == run(*arguments, "--no-stream")[:2]


def test_a_prompt_comes_from_stdin(run: Run, talking, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    arguments = ("generate", talking("llama"), "--max-new-tokens", 4, "--prompt")
    assert run(*arguments, "-") == run(*arguments, PROMPT)


def test_token_ids_need_no_tokenizer(run: Run, exported) -> None:
    code, out, err = run("generate", exported("llama"), "--ids", "1,2, 3", "--max-new-tokens", 3)
    assert code == 0, err
    assert [0 <= int(i) < 256 for i in out.split()] == [True] * 3


def test_a_token_of_the_generation_config_ends_the_text(run: Run, llama: Path) -> None:
    arguments = ("generate", llama, "--prompt", PROMPT, "--max-new-tokens", 32, "--json")
    ids = json.loads(run(*arguments)[1])["ids"]
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids[5], 999]}))
    answer = json.loads(run(*arguments)[1])
    assert (answer["finish"], answer["ids"]) == ("stop", ids[: ids.index(ids[5]) + 1])


def test_a_stop_text_ends_the_text(run: Run, talking) -> None:
    arguments = ("generate", talking("llama"), "--prompt", PROMPT, "--max-new-tokens", 32, "--seed", 1)
    arguments += ("--temperature", 1, "--json")
    text = json.loads(run(*arguments)[1])["text"]
    letter = next(c for c in text[3:] if c.isalnum())
    answer = json.loads(run(*arguments, "--stop", letter)[1])
    assert (answer["finish"], answer["text"]) == ("stop", text[: text.index(letter)])


def test_a_seed_gives_the_same_text_again(run: Run, talking) -> None:
    arguments = ("generate", talking("llama"), "--prompt", PROMPT, "--max-new-tokens", 16, "--temperature", 1, "--json")
    texts = [json.loads(run(*arguments, "--seed", seed)[1])["ids"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    drawn = json.loads(run(*arguments)[1])
    assert json.loads(run(*arguments, "--seed", drawn["seed"])[1])["ids"] == drawn["ids"]


def test_the_text_ends_where_the_model_has_no_more_positions(run: Run, talking) -> None:
    ids = ",".join(["7"] * 510)
    code, out, err = run("generate", talking("llama"), "--ids", ids, "--json")
    answer = json.loads(out)
    assert (code, answer["finish"], len(answer["ids"])) == (0, "context", 3)
    assert "note: the text ends where the model has no more room: it takes 512 tokens" in err
    assert answer["notes"] == ["the text ends where the model has no more room: it takes 512 tokens"]


def test_a_text_to_stop_at_that_could_not_be_found_is_refused(run: Run, talking, llama: Path) -> None:
    code, _, err = run("generate", llama, "--prompt", PROMPT, "--stop", "")
    assert (code, err) == (2, "error: a text to stop at is empty: give some text, or no --stop\n")
    (llama / "tokenizer.json").unlink()
    code, _, err = run("generate", llama, "--ids", "1", "--stop", "fox")
    assert (code, err.count("\n")) == (2, 1)
    assert err.endswith("has no tokenizer.json: leave --stop out\n")


def test_what_is_not_done_as_asked_is_a_note(run: Run, llama: Path) -> None:
    (llama / "generation_config.json").write_text('{"num_beams": 4}')
    code, _, err = run("generate", llama, "--prompt", PROMPT, "--max-new-tokens", 1)
    assert (code, "note: generation_config.json asks for num_beams 4, which" in err) == (0, True)


def drop_template(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()


def change_weights(folder: Path) -> None:
    path = min(folder.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    path.write_bytes(data)


def nothing(folder: Path) -> None:
    assert folder.is_dir()


REFUSED = {
    "nothing to continue": (nothing, [], "--prompt TEXT, or --ids"),
    "two prompts": (nothing, ["--prompt", "a", "--ids", "1"], "--prompt TEXT, or --ids"),
    "no prompt": (nothing, ["--prompt", "", "--raw"], "the prompt is empty"),
    "no ids": (nothing, ["--ids", ""], "the prompt is empty"),
    "a chat of ids": (nothing, ["--ids", "1", "--chat"], "a chat template takes text, and ids are given"),
    "words as ids": (nothing, ["--ids", "fox"], "--ids 'fox': give numbers with commas"),
    "a token beyond": (nothing, ["--ids", "256"], "has token 256, the model knows 0 to 255"),
    "a long prompt": (nothing, ["--prompt", "xyz " * 500], "the model takes 512: give a shorter one"),
    "no tokens wanted": (nothing, ["--prompt", "a", "--max-new-tokens", 0], "'--max-new-tokens'"),
    "no template": (drop_template, ["--prompt", "a", "--chat"], "has no chat template"),
    "a template that fails": (
        lambda folder: (folder / "chat_template.jinja").write_text("{{ raise_exception('no\nway') }}"),
        ["--prompt", "a"],
        "does not take this prompt",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["--prompt", "a"], "has no tokenizer.json: make one"),
    "changed weights": (change_weights, ["--prompt", "a"], "export again"),
    "no engine": (nothing, ["--prompt", "a", "--backend", "engine"], "holds no engine"),
    "no graph": (lambda f: (f / "model.onnx").unlink(), ["--prompt", "a"], "is missing from the export"),
}


@pytest.mark.parametrize(("change", "arguments", "says"), REFUSED.values(), ids=REFUSED)
def test_a_mistake_is_one_line_and_changes_nothing(change, arguments: list[object], says: str, run: Run, llama) -> None:
    change(llama)
    before = contents(llama.parent)
    code, out, err = run("generate", llama, *arguments)
    assert (code, out) == (2, "")
    assert says in err
    # Behind what progress says.
    assert [line for line in err.splitlines() if "/1)" not in line] == [err.splitlines()[-1]]
    assert contents(llama.parent) == before


def start(folder: Path, place: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """The command in a process of its own, whose temporary files would lie in `place`."""
    command = [sys.executable, "-m", "llmexport.export.cli.main", "generate", str(folder), *arguments]
    environment = {**os.environ, "TMPDIR": str(place), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=place, env=environment, preexec_fn=heed_signals
    )
    return process


ENDLESS = ("--ids", "1,2,3", "--stream", "--max-new-tokens", "500")


def test_ctrl_c_leaves_what_was_streamed_and_ends_with_code_2(llama: Path, tmp_path: Path) -> None:
    process = start(llama, tmp_path, *ENDLESS)
    assert process.stdout
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    assert first
    assert out.endswith(b"\n")
    assert err.splitlines()[-1].startswith(b"error: interrupted by SIGINT")


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0.1, 0.5, 1.0, 1.5, "streaming"])
def test_a_process_that_is_killed_leaves_nothing(moment: float | str, llama: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    process = start(llama, tmp_path, *ENDLESS)
    if moment == "streaming":
        assert process.stdout
        assert process.stdout.read(1)
    else:
        time.sleep(float(moment))
    process.kill()
    process.communicate(timeout=60)
    assert contents(tmp_path) == before


def test_no_torch_is_imported_on_the_way(llama: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom llmexport.run.generate import generate\n"
        f"assert generate({str(llama)!r}, 'fox', max_new_tokens=2).ids\n"
        "print(sys.modules.keys() & {'torch', 'transformers', 'polygraphy', 'onnxscript'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "set()\n", done.stderr
