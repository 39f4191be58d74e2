"""Long prompts, which are read in pieces: what follows is what follows the whole prompt."""

from __future__ import annotations

import dataclasses
import itertools
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from arch_cases import CASES, DECODERS, FIRST_EVERY_TIME, KEYED, SLOTS, Case, others_slow

from llmexport.export import archs, manifest, onnx_file
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.errors import EngineError
from llmexport.export.graph_file import load
from llmexport.export.spec import Experts
from llmexport.run import engine, prompts
from llmexport.run.prompts import best_at_once, in_pieces, opening
from llmexport.run.session import RuntimeSession, decode, greedy, opened
from llmexport.validate.runners import onnx_runner
from llmexport.validate.stages import Stage

PROMPT, PIECE = 11, 4  # windows and chunks of the tiny models are crossed within a piece, and between two
AT_ONCE = [c for c in FIRST_EVERY_TIME if c in DECODERS]


def prompt(batch: int = 1, tokens: int = PROMPT) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (batch, tokens))


class Counted(RuntimeSession):
    """Counts the tokens of each call, at most `most` of them."""

    most = PIECE

    def check(self, stage: Stage) -> None:
        self.calls = [*getattr(self, "calls", []), stage.ids.shape[1]]

    @property
    def tokens_at_once(self) -> int:
        return self.most


def scores(session: RuntimeSession, stage: Stage) -> Iterator[np.ndarray]:
    """Of the stage, and of three tokens behind it."""
    for token in itertools.count():
        yield session.run(stage)
        stage = stage.then("decode", "decode", np.full((len(stage.ids), 1), token))


def agree(session: RuntimeSession, other: RuntimeSession, stage: Stage) -> bool:
    steps = itertools.islice(zip(scores(session, stage), scores(other, stage), strict=True), 4)
    return all(np.abs(a - b).max() < 1e-5 * max(np.abs(b).max(), 1) for a, b in steps)


@pytest.mark.parametrize("case", others_slow(DECODERS, AT_ONCE), ids=str)
def test_what_follows_pieces_is_what_follows_the_whole(case: Case, exported) -> None:
    export = manifest.read(exported(case))
    pieces = Counted(export)
    assert agree(pieces, RuntimeSession(export), opening(prompt(batch=2)))
    assert pieces.calls == [*([PROMPT] if case.arch == "chatglm_6b" else [4, 4, 3]), 1, 1, 1]


@pytest.mark.usefixtures("static_caches")
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("case", others_slow(KEYED, AT_ONCE), ids=str)
def test_pieces_are_written_into_a_static_cache(case: Case, batch: int, tiny_checkpoint, tmp_path: Path) -> None:
    """Of rows alone and of a batch, which ONNX Runtime's operators take otherwise."""
    checkpoint, kind = open_checkpoint(tiny_checkpoint(case)), {"cache": "static", "target": "onnxruntime"}
    request = onnx_file.Request(archs.load(case.arch), checkpoint, max_tokens=SLOTS, window_slots="last", **kind)
    export = onnx_file.write(request, tmp_path / "out")
    assert agree(Counted(export), RuntimeSession(export), opening(prompt(batch)))


@pytest.mark.parametrize("name", ["phi3-longrope-long", "internlm2-bias"])
def test_a_prompt_with_other_angles_than_its_first_tokens_is_run_whole(name: str, exported, monkeypatch) -> None:
    """Of LongRoPE and dynamic RoPE beyond 24 tokens, which pieces would turn by the angles of shorter texts."""
    export = manifest.read(exported(next(c for c in CASES if c.name == name)))
    pieces, whole = Counted(export), RuntimeSession(export)
    assert agree(pieces, whole, opening(prompt(tokens=30)))
    assert pieces.calls[0] == 30
    assert not in_pieces(export, opening(prompt(tokens=24)), 8)[1].begins
    monkeypatch.setattr(prompts, "_reads_ahead", lambda block, tokens: False)
    assert not agree(pieces, whole, opening(prompt(tokens=30)))


def test_what_a_prompt_knows_of_its_tokens_is_cut_with_them(exported) -> None:
    export = manifest.read(exported("llama"))
    stage = dataclasses.replace(opening(prompt(2)), types=prompt(2) % 2)
    behind = stage.then("later", "piece", prompt(2))
    for whole, first, masks in ((stage, "opening", [4, 8, 11]), (behind, "piece", [15, 19, 22])):
        cut = in_pieces(export, whole, 4)
        assert [p.kind for p in cut] == [first, "piece", "piece"]
        assert [p.mask.shape[1] for p in cut] == masks
        for field in ("ids", "positions", "types"):
            assert np.array_equal(np.concatenate([getattr(p, field) for p in cut], -1), getattr(whole, field))
    assert in_pieces(export, stage, PROMPT) == [stage]


def test_a_padded_prompt_is_run_whole(exported) -> None:
    stage = opening(prompt(2))
    stage.mask[1, :3] = 0
    assert in_pieces(manifest.read(exported("llama")), stage, 4) == [stage]


def test_experts_are_given_more_tokens_at_once(exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that each, of 8 of which a token goes to 2, gets as many as pay for its weights."""
    llama, mixtral = (manifest.read(exported(n)) for n in ("llama", "mixtral"))
    [(experts, top_k)] = {(b.experts, b.top_k) for b in prompts._blocks(mixtral) if isinstance(b, Experts)}
    assert (best_at_once(llama), best_at_once(mixtral)) == (512, 512)
    monkeypatch.setattr(prompts, "ROWS", 1000)
    assert (best_at_once(llama), best_at_once(mixtral)) == (512, 1000 * experts // top_k)


def test_a_session_asks_once_how_many_tokens_are_best(exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """As who walks over all blocks at every token takes a percent of a small model's time."""
    asked = list[object]()
    monkeypatch.setattr("llmexport.run.session.best_at_once", lambda export: asked.append(export) or 512)
    session = RuntimeSession(manifest.read(exported("llama")))
    assert len([*itertools.islice(decode(session, prompt(), greedy), 4)]) == 4
    assert len(asked) == 1


def test_an_engine_is_given_as_many_tokens_as_its_profile_has(exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of TensorRT's runner stands ONNX Runtime's, which takes and gives the same."""
    export, asked = manifest.read(exported("llama")), list[int]()

    def outside(export: object, sizes: dict[str, int]) -> str:
        asked.append(sizes["sequence"])
        return "past is 20" if sizes["past"] > 20 else ""

    record = types.SimpleNamespace(profile={"sequence": (1, 2, PIECE)}, backend="tensorrt-rtx", version="1")
    monkeypatch.setattr("llmexport.export.engine_record.read", lambda folder: record)
    monkeypatch.setattr(engine, "EngineRunner", lambda export, graph: onnx_runner(load(export, graph), export.folder))
    monkeypatch.setattr(engine, "unable", lambda export: "")
    monkeypatch.setattr(engine, "outside", outside)
    with opened(export, "engine") as session:
        made = [int(t[0]) for t in itertools.islice(decode(session, prompt(), greedy), 3)]
        assert made == [int(t[0]) for t in itertools.islice(decode(RuntimeSession(export), prompt(), greedy), 3)]
        assert asked == [4, 4, 3, 1, 1]
        # Nothing is run of a prompt whose last piece does not fit.
        monkeypatch.setattr(session, "infer", None)
        with pytest.raises(EngineError, match="past is 20: build it with a larger --profile"):
            session.run(opening(prompt(tokens=25)))
