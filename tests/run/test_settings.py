"""generation_config.json, as transformers' GenerationConfig reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from llmexport.export import manifest
from llmexport.run.errors import RunError
from llmexport.run.sampling import Sampling
from llmexport.run.settings import Settings, read_settings

pytestmark = pytest.mark.model


def settings(folder: Path, said: dict[str, Any] | None, **arguments: Any) -> Settings:
    if said is not None:
        (folder / "generation_config.json").write_text(json.dumps(said))
    return read_settings(manifest.read(folder), **arguments)


def test_what_the_file_leaves_out_is_what_transformers_takes(llama: Path) -> None:
    found = settings(llama, {"do_sample": True}).sampling
    (llama / "generation_config.json").unlink()
    said = transformers.GenerationConfig(do_sample=True)
    defaults = said._get_default_generation_params()
    theirs = {n: defaults[n] for n in ("temperature", "top_k", "top_p", "repetition_penalty")}
    assert found == Sampling(**theirs)


def test_the_file_says_how_tokens_are_drawn(llama: Path) -> None:
    said = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": None, "min_p": 0.1, "repetition_penalty": 1.1}
    assert settings(llama, said).sampling == Sampling(1.1, 0.6, 50, 0.9, 0.1)


def test_without_do_sample_the_likeliest_token_is_taken(llama: Path) -> None:
    assert settings(llama, {"temperature": 0.6}).sampling.temperature == 0
    assert settings(llama, None).sampling.temperature == 0


def test_an_argument_counts_more_than_the_file_and_asks_for_chance(llama: Path) -> None:
    assert settings(llama, {"temperature": 0.6}, top_p=0.5).sampling == Sampling(1.0, 0.6, 50, 0.5)
    assert settings(llama, None, temperature=2.0, top_k=0).sampling == Sampling(1.0, 2.0, 0)
    assert settings(llama, {"do_sample": True}, temperature=0.0).sampling.temperature == 0


@pytest.mark.parametrize(("said", "ids"), [(7, {7}), ([7, 9], {7, 9})])
def test_one_token_or_several_end_the_text(said: Any, ids: set[int], llama: Path) -> None:
    assert settings(llama, {"eos_token_id": said}).eos == ids


def test_the_config_says_what_ends_the_text_where_the_file_does_not(llama: Path) -> None:
    assert settings(llama, {}).eos == {manifest.read(llama).config["eos_token_id"]}


def test_what_is_not_done_is_said(llama: Path) -> None:
    said = {"no_repeat_ngram_size": 3, "num_beams": 1, "suppress_tokens": [], "stop_strings": "fox"}
    found = settings(llama, said)
    assert found.notes == ("generation_config.json asks for no_repeat_ngram_size 3, which generate does not do",)
    assert found.stop == ("fox",)


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"temperature": "hot", "do_sample": True}, "says temperature 'hot', which is no number"),
        ({"top_p": 0, "do_sample": True}, "top_p is 0: make it above 0 and at most 1"),
        ({"repetition_penalty": -1}, "repetition_penalty is -1: make it above 0"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>', which is no token id"),
    ],
)
def test_a_file_that_says_what_cannot_be_is_one_line(said: dict[str, Any], says: str, llama: Path) -> None:
    with pytest.raises(RunError, match=says):
        settings(llama, said)
