"""The benchmark's cases, without a GPU: the plugins take them, and their numbers are those of their shapes."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from native import emulated_library

from llmexport.plugins.host import Library, desc, number

HERE = Path(__file__).parent


@pytest.fixture
def op_cases(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(HERE))
    import op_cases

    return op_cases


def test_plugins_take_every_case_as_it_is(op_cases: Any) -> None:
    library, seen = Library(emulated_library()), set()
    for case in op_cases.cases():
        if not hasattr(case, "results"):
            continue
        plugin = library.create(case.op, case.attributes)
        inputs = [desc(t.shape, t.dtype) for t in case.on("meta")]
        results = case.results()
        assert plugin.output_shapes(inputs, known=True) == [t.shape for t in results]
        types = [number(t.dtype) for t in results]
        assert plugin.output_types([d.type for d in inputs]) == types
        plugin.configure([*inputs, *(desc(t.shape, t.dtype) for t in results)])
        seen.add(case.op)
    assert seen >= {"Rope", "QkNormRope", "AddRmsNorm", "GatedAct", "CausalConv1d", "GatedRmsNorm", "MoeRoute"}
    assert seen >= {"Wkv", "Wkv7", "KimiDeltaRule", "GatedDeltaNet", "QkNormRopeWrite"}


@pytest.mark.parametrize(
    ("op", "bytes_of_a_prompt"),
    [
        # Two of [4096, 8192], two states of three, the taps; where the row ends.
        ("CausalConv1d", 2 * (2 * 4096 * 8192 + 2 * 3 * 8192 + 4 * 8192) + 4),
        ("GatedRmsNorm", 2 * (3 * 4096 * 32 * 128 + 128)),
        # Heads of q, k and v of Gemma-2B, read and written; angles, weights, a place.
        ("QkNormRopeWrite", 2 * (4096 * (2 * (8 + 1 + 1) * 256 + 2 * 128) + 2 * 256) + 4),
        # q, k, v and y in bf16, decays of each channel in fp32, strengths, two states.
        ("KimiDeltaRule", 32 * (4096 * (2 * 4 * 128 + 4 * 128 + 2) + 2 * 4 * 128 * 128)),
        # Of 256 logits eight weights in bf16 and eight experts in int32.
        ("MoeRoute", 4096 * (2 * 256 + 8 * (2 + 4))),
    ],
)
def test_bytes_are_those_of_inputs_and_outputs(op_cases: Any, op: str, bytes_of_a_prompt: int) -> None:
    assert next(c for c in op_cases.cases() if c.op == op and c.T == 4096).bytes == bytes_of_a_prompt


def test_gates_between_heads_of_q_are_no_bytes(op_cases: Any) -> None:
    # Heads of q, k and v, read and written; angles; weights.
    moved = 2 * (4096 * (2 * (16 + 2 + 2) * 256 + 2 * 32) + 2 * 256)
    gated = (c for c in op_cases.cases() if c.op == "QkNormRope" and c.unread)
    assert next(c for c in gated if c.T == 4096).bytes == moved


def test_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 where there is no GPU; help anywhere."""
    import torch

    def ran(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["bench_ops.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(HERE / "bench_ops.py"), run_name="__main__")
        return int(ended.value.code or 0)

    assert ran("--help") == 0
    assert "--only" in capsys.readouterr().out
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert (ran(), capsys.readouterr().err) == (2, "no CUDA device: the ops are timed on a GPU only\n")
