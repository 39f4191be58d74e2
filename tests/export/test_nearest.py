"""A family that is not exported is answered with the nearest that are."""

import pytest
from tiny_configs import one_line

from llmexport.export import archs
from llmexport.export.errors import ExportError


def refusal(config):
    with pytest.raises(ExportError) as error:
        archs.choose(None, config)
    return one_line(error.value)


@pytest.mark.parametrize(
    ("kind", "near"),
    [
        ("gemma3n", ["gemma3_text"]),
        ("qwen3_vl_moe", ["qwen3", "qwen3_moe"]),
        ("qwen2_5_omni", ["qwen2"]),
        ("mistral4", ["mistral"]),
        ("glm4v", ["glm4"]),
        ("olmoe", ["olmo2", "olmo"]),
        ("phi3_v", ["phi3"]),
    ],
)
def test_the_nearest_of_a_like_name_are_said(kind, near):
    said = refusal({"model_type": kind}).partition("nearest is ")[2].partition(", which would")[0].split(", ")
    assert set(near) <= set(said)
    assert len(said) < 7


def test_no_nearest_is_said_of_a_family_that_is_like_none():
    line = refusal({"model_type": "speecht5"})
    assert "nearest" not in line
    assert all(name in line for name in archs.names())


@pytest.mark.parametrize("tower", ["vision_config", "audio_config"])
def test_a_multimodal_one_is_called_so(tower):
    line = refusal({"model_type": "gemma3n", tower: {}, "text_config": {"model_type": "gemma3n_text"}})
    assert f"it is multimodal ({tower}, text_config)" in line
    assert "of such, gemma3, llama4, qwen3_5, qwen3_5_moe are exported with their tower, and the text model" in line
    assert "alone of gemma4, mistral3, qwen2_vl, qwen2_5_vl, qwen3_vl; " in line
    assert "nearest is gemma3_text" in line


@pytest.mark.parametrize("kind", [5, [], {"a": 1}, "", "x" * 10**6, "a\nb"])
def test_a_type_that_is_none_is_refused_in_one_line(kind):
    assert len(refusal({"model_type": kind})) < 1000


def test_a_config_without_a_type_is_called_so():
    assert "has no 'model_type'" in refusal({"hidden_size": 4})


def test_a_base_model_is_called_so():
    line = refusal({"model_type": "qwen3", "architectures": ["Qwen3Model"]})
    assert "a base model has no head that gives logits" in line
