"""bench_decoders.py: what it runs, and how it reads what it measured."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from llmexport.export import archs
from llmexport.export.onnx_file import read_model


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("bench_decoders")


@pytest.mark.parametrize("arch", archs.names())
def test_a_wider_config_is_one_of_its_architecture(bench: Any, arch: str) -> None:
    named = archs.load(arch)
    assert read_model(named, bench.wide(named.tiny)).graphs


def test_widths_windows_lengths_and_words_grow_and_depth_and_heads_stay(bench: Any) -> None:
    tiny = archs.load("mistral").tiny
    made = bench.wide(tiny)
    assert {made[n] // tiny[n] for n in ("hidden_size", "intermediate_size", "head_dim")} == {bench.WIDER}
    assert [made[n] for n in ("sliding_window", "max_position_embeddings")] == [bench.WINDOW, bench.POSITIONS]
    same = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    assert (made["vocab_size"], [made[n] for n in same]) == (bench.VOCABULARY, [tiny[n] for n in same])


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"grows": 3.0, "static": 2.0, "transformers": 4.0}, 0.5),
        ({"grows": 6.0, "transformers": 4.0}, 1.5),
        ({"grows": 3.0, "static": 2.0}, None),
        ({"transformers": 4.0}, None),
    ],
)
def test_the_faster_of_ours_counts(bench: Any, times: dict[str, float], expected: float | None) -> None:
    assert bench.ratio(times) == expected
