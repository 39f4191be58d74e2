"""A golden pack finds a wrong runner, in the stage where it is wrong, and is of one model alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import toy_model
from engine_folder import PROFILE, ports
from toy_pack import DIGEST, make_pack, parts

from llmexport.export.errors import EngineError
from llmexport.validate import pack
from llmexport.validate.compare import Mismatch
from llmexport.validate.pack import Arrays
from llmexport.validate.replay import Replay, check_same, outside, replay

DTYPES = ["float32", "float16", "bfloat16"]
Change = Callable[[int, Arrays], None]


def replayed(path: Path, dtype: str, change: Change = lambda call, outputs: None, **options: object) -> Replay:
    """The pack on the model that it is of, whose outputs are changed, call by call."""
    calls = iter(range(100))

    def run(graph: str, feed: Arrays) -> Arrays:
        outputs = toy_model.run(feed, dtype)
        change(next(calls), outputs)
        return outputs

    with pack.read(path) as opened:
        return replay(opened, "toy / golden pack", run, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_pack_is_of_passes(dtype: str, tmp_path: Path) -> None:
    found = replayed(make_pack(tmp_path / "p.npz", dtype), dtype)
    assert (found.rung.status, found.rung.note) == ("pass", "")
    assert found.rung.difference
    assert found.rung.difference.max_abs == 0
    assert [d["step"] for d in found.rung.details] == ["prompt", "decode 1", "decode 2", "last", "last", "across 40"]
    assert found.rung.metrics
    assert (found.rung.metrics.tokens, found.rung.metrics.top1, found.rung.metrics.parted) == (
        12 + 2 + 2 + 6 + 13,
        1,
        "",
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_cache_is_found_in_the_steps_that_read_it(dtype: str, tmp_path: Path) -> None:
    def lose(call: int, outputs: Arrays) -> None:
        if call == 0:
            outputs["present"] = np.zeros_like(outputs["present"])

    rung = replayed(make_pack(tmp_path / "p.npz", dtype), dtype, lose).rung
    wrong = [d["step"] for d in rung.details if d["difference"].excess(d["allowed"]) > 1]
    assert (rung.status, wrong) == ("fail", ["decode 1", "decode 2", "last", "last"])


def test_wrong_logits_are_found_in_their_step_and_part_the_greedy_tokens(tmp_path: Path) -> None:
    def swap(call: int, outputs: Arrays) -> None:
        if call == 2:
            outputs["logits"] = -outputs["logits"]

    rung = replayed(make_pack(tmp_path / "p.npz"), "float16", swap).rung
    assert [d["step"] for d in rung.details if d["difference"].excess(d["allowed"]) > 1] == ["decode 2"]
    assert rung.metrics
    assert rung.metrics.parted == "decode 2"


def test_what_is_made_of_padding_is_not_compared(tmp_path: Path) -> None:
    def spoil(call: int, outputs: Arrays) -> None:
        if call == 0:
            outputs["logits"] = outputs["logits"].copy()
            outputs["logits"][1, :2] = np.nan

    assert replayed(make_pack(tmp_path / "p.npz"), "float16", spoil).rung.status == "pass"


def test_outputs_of_another_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Mismatch, match="shapes differ"):
        replayed(make_pack(tmp_path / "p.npz"), "float16", lambda call, made: made.update(logits=made["logits"][:, 1:]))


def test_a_crossing_outside_of_the_profile_is_left_out_and_named(tmp_path: Path) -> None:
    inputs, _ = ports("float16")

    def fits(graph: str, feed: Arrays) -> str:
        return outside(inputs, PROFILE, feed)

    found = replayed(make_pack(tmp_path / "p.npz", crossing=80), "float16", fits=fits)
    assert found.rung.status == "pass"
    why = "across 80 (past is 78, the engine takes 0 to 64)"
    assert found.rung.note == f"not run, as it is outside of the profile: {why}"
    assert {d["step"] for d in found.rung.details} == {"prompt", "decode 1", "decode 2", "last"}


def test_a_prompt_outside_of_the_profile_is_an_error(tmp_path: Path) -> None:
    inputs, _ = ports("float16")
    narrow = PROFILE | {"sequence": (1, 1, 6)}
    with pytest.raises(EngineError, match="prompt: sequence is 7, the engine takes 1 to 6: make a pack with fewer"):
        replayed(make_pack(tmp_path / "p.npz"), "float16", fits=lambda graph, feed: outside(inputs, narrow, feed))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda g: {"other": g}, "is of the graphs model, the engine of other"),
        (lambda g: {"model": dataclasses.replace(g, model_sha256="c" * 64)}, "is of another model than the engine"),
        (lambda g: {"model": dataclasses.replace(g, inputs=g.inputs[:1])}, "other ports, as past float16"),
        (
            lambda g: {
                "model": dataclasses.replace(g, inputs=(dataclasses.replace(g.inputs[0], name="ids"), g.inputs[1]))
            },
            "have other ports, as ids int64",
        ),
        (
            lambda g: {"model": dataclasses.replace(g, outputs=ports("float32")[1])},
            "have other ports, as logits float",
        ),
    ],
)
def test_a_pack_of_another_model_is_refused(change, says: str, tmp_path: Path) -> None:
    [graph] = parts()[0].graphs.values()
    with pack.read(make_pack(tmp_path / "p.npz")) as opened:
        check_same(opened, {"model": graph}, "the engine")
        with pytest.raises(Mismatch) as error:
            check_same(opened, change(graph), "the engine")
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert graph.model_sha256 == DIGEST
