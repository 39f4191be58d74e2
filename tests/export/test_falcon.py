"""Falcon's configs: the first ones, by other names, and those that no model has."""

from __future__ import annotations

from typing import Any

import pytest
from published_configs import PUBLISHED
from tiny_configs import one_line, read, refusal

from llmexport.export import archs
from llmexport.export.errors import ExportError
from llmexport.export.onnx_file import read_model
from llmexport.export.spec import Attention, Layer, Model

OTHER = {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer", "num_kv_heads": "n_head_kv"}
CODE = {"AutoConfig": "configuration_RW.RWConfig", "AutoModelForCausalLM": "modelling_RW.RWForCausalLM"}
TYPES = {"falcon-7b": "RefinedWebModel", "falcon-rw-1b": "RefinedWebModel", "falcon-40b": "RefinedWeb"}


def first(name: str, **changes: Any) -> dict[str, Any]:
    """The config as it was first published: the layer's kind is that of the model_type."""
    kept = {OTHER.get(k, k): v for k, v in PUBLISHED[name].items() if k != "new_decoder_architecture"}
    said = {"model_type": TYPES[name], "architectures": ["RWForCausalLM"], "auto_map": CODE}
    return {**kept, **said, **changes}


def of(config: dict[str, Any]) -> Model:
    return read_model(archs.choose(None, config), config)


@pytest.mark.parametrize("name", TYPES)
def test_a_first_config_is_the_model_of_the_later_one(name: str) -> None:
    assert of(first(name)) == of(PUBLISHED[name])


def test_code_of_somebody_else_is_refused() -> None:
    with pytest.raises(ExportError) as error:
        of(first("falcon-7b", auto_map={"AutoModelForCausalLM": "modeling_falcon.FalconForCausalLM"}))
    assert "only the code of configuration_RW and modelling_RW is supported here" in one_line(error.value)


def test_two_names_of_one_thing_must_agree() -> None:
    line = refusal("falcon", n_head=4)
    assert line == "config.json says num_attention_heads 6 and n_head 4, which are one thing: which of them is right?"
    assert read("falcon", n_head=6) == read("falcon")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"multi_query": False, "num_kv_heads": 2},
            "num_kv_heads is 2, without multi_query each of 6 heads has its own",
        ),
        ({"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn is 2 and parallel_attn true, which no model with"),
        ({"new_decoder_architecture": True, "parallel_attn": False}, "and parallel_attn false, which no model with"),
        ({"hidden_size": 100}, "hidden_size 100 is not a multiple of 6 attention heads"),
        ({"ff_factor": 4}, "ff_factor is 4, only 1.1666666666666667 is supported here"),
    ],
)
def test_what_no_falcon_has_is_refused(changes: dict[str, Any], said: str) -> None:
    assert said in refusal("falcon", **changes)


def test_a_cache_holds_the_keys_that_heads_share() -> None:
    """transformers repeats them before it caches them."""
    attention = {
        b.block for s in of(PUBLISHED["falcon-40b"]).steps if isinstance(s.block, Layer) for b in s.block.sublayers
    }
    [keys] = [b.states[0].present.shape[1] for b in attention if isinstance(b, Attention)]
    assert keys == 8
