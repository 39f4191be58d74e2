"""Tokens that an export goes on with, on ONNX Runtime, against transformers' generate."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from arch_cases import CASES, DECODERS, FIRST, IN_TRANSFORMERS, PAIRS, SLOTS, Case, others_slow
from decoders import theirs
from two_graphs import in_two, rebuilt

from llmexport.export import archs, manifest, onnx_file
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.errors import EngineError
from llmexport.export.graph_file import load
from llmexport.run import engine
from llmexport.run.checks import check_prompt, run_again_at
from llmexport.run.errors import RunError
from llmexport.run.prompts import begun, opening
from llmexport.run.session import RuntimeSession, decode, greedy, opened
from llmexport.run.settings import start_token
from llmexport.validate import loading
from llmexport.validate.runners import onnx_runner

STEPS = 64
PROMPT = 11  # the windows of the tiny models are crossed on the way


def prompt(batch: int = 1, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (batch, PROMPT))


def expected(checkpoint: Path, ids: np.ndarray, steps: int = STEPS) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    # Else generate stops at it.
    model.generation_config.eos_token_id = None
    given = torch.from_numpy(ids)
    made = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=steps, do_sample=False, pad_token_id=0
    )
    return made[:, ids.shape[1] :].numpy()


def chosen(folder: Path, ids: np.ndarray) -> np.ndarray:
    """What the reference of a family that transformers lacks chooses, step by step; after the whole text each time
    where angles of earlier keys change."""
    export = manifest.read(folder)
    model, again = loading.load(export, "eager"), run_again_at(export)
    text, begin, cache = ids, 0, None
    for _ in range(STEPS):
        positions = np.arange(begin, text.shape[1])[None].repeat(len(ids), 0)
        step = theirs(model, text[:, begin:], np.ones_like(text), positions, cache)
        if not again:
            begin, cache = text.shape[1], step.past_key_values
        text = np.concatenate((text, step.logits[:, -1:].argmax(-1).numpy()), 1)
    return text[:, ids.shape[1] :]


def found(folder: Path, ids: np.ndarray, steps: int = STEPS) -> np.ndarray:
    export = manifest.read(folder)
    tokens = decode(RuntimeSession(export), ids, greedy, run_again_at(export))
    return np.stack(list(itertools.islice(tokens, steps)), 1)


@pytest.mark.parametrize("case", others_slow(DECODERS, [c for c in FIRST if c in DECODERS]), ids=str)
def test_greedy_tokens_are_those_of_generate_for_64_steps(case: Case, tiny_checkpoint, exported) -> None:
    ids, folder = prompt(), exported(case)
    known = case.arch in IN_TRANSFORMERS
    right = expected(tiny_checkpoint(case), ids) if known else chosen(folder, ids)
    assert np.array_equal(found(folder, ids), right)


@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_greedy_tokens_after_what_an_encoder_read_are_those_of_generate(case: Case, tiny_checkpoint, exported) -> None:
    export, ids = manifest.read(exported(case)), prompt(batch=2)
    start, begin = begun(export, ids)
    tokens = decode(RuntimeSession(export), start, greedy, begin=begin)
    model = transformers.T5ForConditionalGeneration.from_pretrained(tiny_checkpoint(case), dtype=torch.float32)
    model.generation_config.eos_token_id = None
    given = torch.from_numpy(ids)
    made = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=STEPS, do_sample=False)
    assert np.array_equal(np.stack(list(itertools.islice(tokens, STEPS)), 1), made[:, 1:].numpy())


def test_what_a_decoder_begins_with_is_what_the_files_say(exported, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported("t5"), tmp_path / "export"))
    export = manifest.read(folder)
    assert start_token(export) == 0
    (folder / "generation_config.json").write_text('{"decoder_start_token_id": 7}')
    assert start_token(export) == 7
    (folder / "generation_config.json").unlink()
    with pytest.raises(RunError, match=r"neither generation_config.json nor config.json says decoder_start_token_id"):
        start_token(dataclasses.replace(export, text_config={}))


def test_rows_of_a_batch_go_on_each_by_itself(exported) -> None:
    ids = prompt(batch=3)
    alone = [found(exported("llama"), row[None], 8)[0] for row in ids]
    assert np.array_equal(found(exported("llama"), ids, 8), np.stack(alone))


def test_a_model_of_two_graphs_gives_the_same_tokens(tiny_checkpoint, exported, tmp_path: Path) -> None:
    onnx_file.write(rebuilt("llama", tiny_checkpoint("llama"), in_two), tmp_path / "two")
    assert np.array_equal(found(tmp_path / "two", prompt(), 8), found(exported("llama"), prompt(), 8))


def test_longrope_is_run_again_where_its_factors_change(tiny_checkpoint, exported) -> None:
    """As generate does; without, tokens differ: else this test would show nothing."""
    case = next(c for c in CASES if c.name == "phi3-longrope-long")
    export, ids = manifest.read(exported(case)), prompt()
    assert run_again_at(export) == 24
    right = expected(tiny_checkpoint(case), ids, 40)
    assert np.array_equal(found(exported(case), ids, 40), right)
    kept = np.stack(list(itertools.islice(decode(RuntimeSession(export), ids, greedy), 40)), 1)
    assert not np.array_equal(kept, right)


@pytest.mark.parametrize(
    ("folder", "says"),
    [
        (
            lambda exported: exported("bert"),
            "bert is an encoder, which reads a text and continues none",
        ),
        (lambda exported: exported("llama", block="attention"), "is one block, attention, which gives no tokens"),
        (lambda exported: exported("llama", "bfloat16"), "no bfloat16 MatMul on a CPU: export with --dtype float32"),
    ],
    ids=["encoder", "block", "bfloat16"],
)
def test_what_gives_no_tokens_is_refused(folder: Callable[..., Path], says: str, exported) -> None:
    with pytest.raises(RunError, match=says):
        RuntimeSession(manifest.read(folder(exported)))


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([], "the prompt is empty, it has no token"),
        ([1, 256], "the prompt has token 256, the model knows 0 to 255: is the tokenizer the model's own"),
        ([-1], "the prompt has token -1"),
        ([1] * 513, "the prompt has 513 tokens, the model takes 512: give a shorter one"),
    ],
    ids=["empty", "beyond", "negative", "long"],
)
def test_a_prompt_that_the_model_does_not_take_is_refused(ids: list[int], says: str, exported) -> None:
    with pytest.raises(RunError, match=says):
        check_prompt(manifest.read(exported("llama")), ids)


def test_a_prompt_may_be_longer_than_the_texts_that_dynamic_rope_was_trained_on(exported) -> None:
    case = next(c for c in CASES if c.name == "internlm2-bias")
    assert case.changes["max_position_embeddings"] == 24
    check_prompt(manifest.read(exported(case)), [1] * 600)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "qwen3_5_moe"])
def test_a_thousand_steps_leave_no_memory_behind(arch: str, exported) -> None:
    """Another thousand, and one more, add less than the states take: nothing is kept of a step."""
    script = Path(__file__).parent / "memory_of_steps.py"
    done = subprocess.run([sys.executable, script, exported(arch)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["states"] > 100_000
    assert max(found["rss"][1:]) - found["rss"][0] < found["states"], found


def test_engines_are_stepped_as_onnx_runtime_is(exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of TensorRT's runner stands ONNX Runtime's, which takes and gives the same."""
    runner = lambda export, graph: onnx_runner(load(export, graph), export.folder)  # noqa: E731
    monkeypatch.setattr(engine, "EngineRunner", runner)
    monkeypatch.setattr(engine, "unable", lambda export: "")
    record = types.SimpleNamespace(profile={"sequence": (1, 64, 512)})
    monkeypatch.setattr("llmexport.export.engine_record.read", lambda folder: record)
    monkeypatch.setattr(engine, "outside", lambda export, sizes: "" if sizes["past"] < PROMPT + 7 else "past is 18")
    export = manifest.read(exported("llama"))
    with opened(export, "engine") as session:
        tokens = decode(session, prompt(), greedy)
        made = np.stack(list(itertools.islice(tokens, 8)), 1)
        assert np.array_equal(made, found(exported("llama"), prompt(), 8))
        with pytest.raises(EngineError, match="past is 18: build it with a larger --profile"):
            next(tokens)


def test_an_export_without_an_engine_is_told_so(exported) -> None:
    with (
        pytest.raises(EngineError, match=r"holds no engine"),
        opened(manifest.read(exported("llama")), "engine"),
    ):
        pass


@pytest.mark.usefixtures("static_caches")
@pytest.mark.parametrize("arch", others_slow(["gemma", "gpt_oss", "qwen3_5_moe"], ["gpt_oss"]))
def test_a_static_cache_gives_the_same_tokens_and_is_written_in_place(arch: str, tiny_checkpoint, exported, tmp_path):
    checkpoint = open_checkpoint(tiny_checkpoint(arch))
    request = onnx_file.Request(archs.load(arch), checkpoint, cache="static", max_tokens=SLOTS)
    export = onnx_file.write(request, tmp_path / "static")
    session, stage = RuntimeSession(export), opening(prompt())
    addresses = set()
    for _ in range(3):
        scores = session.run(stage)
        slots = {p.name for g in export.graphs for p in g.assembly.inputs if p.use == "slots"}
        carried = {n: v for values in session._carried.values() for n, v in values.items() if n in slots}
        addresses.add(tuple(v.data_ptr() for v in carried.values()))
        stage = stage.then("decode", "decode", scores.argmax(-1)[:, None])
    assert slots
    assert len(addresses) == 1
    assert np.array_equal(found(tmp_path / "static", prompt(), 40), found(exported(arch), prompt(), 40))
