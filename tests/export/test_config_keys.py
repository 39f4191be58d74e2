"""config.json with its keys taken away one by one, or junk in their place."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from arch_cases import DECODERS, EVERY_TIME, FIRST, IN_TRANSFORMERS, others_slow
from published_configs import PUBLISHED
from tiny_configs import config_class, everywhere, one_line, placed_layers

from llmexport.export import archs, blocks
from llmexport.export.config import LONGEST, MOST
from llmexport.export.errors import ExportError
from llmexport.export.keys import ANY, CAUSAL
from llmexport.export.onnx_file import read_model
from llmexport.export.spec import Model, Rotary
from llmexport.export.trace import module_shapes

Path = tuple[str, ...]
ABSENT = object()
# How many layers there are, of the same sizes each.
LAYERS = {"n_layer", "num_decoder_layers", "num_hidden_layers", "num_layers", "num_transformer_layers"}
CONFIGS = PUBLISHED | {
    c.name: {"model_type": archs.load(c.arch).model_types[0], **archs.load(c.arch).tiny} for c in FIRST
}
THEIRS = [n for n, c in CONFIGS.items() if archs.choose(None, c).name in IN_TRANSFORMERS]
# Those beside the text model of a multimodal config too, but for the tie, which the text model's config says as well.
NOT_READ = ANY.union(*(w.harmless for n in archs.names() for w in archs.load(n).multimodal)) - {"tie_word_embeddings"}


def not_read(arch: str) -> frozenset[str]:
    """Keys that an architecture passes over, whatever they hold."""
    return NOT_READ | CAUSAL if arch in {c.arch for c in DECODERS} else NOT_READ


def paths(config: dict[str, Any], start: Path = ()) -> Iterator[Path]:
    """Every key, those of objects within it too."""
    for key, value in config.items():
        yield (*start, key)
        if isinstance(value, dict) and key not in NOT_READ:
            yield from paths(value, (*start, key))


def changed(config: dict[str, Any], path: Path, value: Any) -> dict[str, Any]:
    """A copy with another value, or none."""
    config = copy.deepcopy(config)
    *start, last = path
    inner = config
    for key in start:
        inner = inner[key]
    if value is ABSENT:
        del inner[last]
    else:
        inner[last] = value
    return config


def ours(config: dict[str, Any]) -> Model | str:
    """The model that a config means here, or why it is refused."""
    try:
        return read_model(archs.choose(None, config), config)
    except ExportError as error:
        return one_line(error)


def theirs(config: dict[str, Any]) -> Model | str:
    """The model that it means to transformers, or that it is refused there."""
    try:
        full = config_class(config)(**copy.deepcopy(config)).to_dict()
    except Exception as error:
        return f"transformers refuses: {error}"
    return ours(full)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read(name: str) -> None:
    assert isinstance(ours(PUBLISHED[name]), Model)


def test_what_a_generation_config_says_may_stand_in_a_models_config() -> None:
    said = {"_from_model_config": True, "max_new_tokens": 512, "min_p": 0.05, "stop_strings": ["a"]}
    config = PUBLISHED["Llama-3.1-8B"]
    assert ours(config | said) == ours(config)


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("value", [ABSENT, None], ids=["absent", "null"])
def test_a_key_that_is_missing_is_refused_or_means_what_it_means_to_transformers(name, value):
    config = CONFIGS[name]
    passed_over = not_read(archs.choose(None, config).name)
    found = {p: ours(changed(config, p, value)) for p in paths(config) if p[-1] not in passed_over}
    differ = {
        p: other
        for p, model in found.items()
        if isinstance(model, Model) and (other := theirs(changed(config, p, value))) != model
    }
    assert differ == {}


# Numbers whose squares, inverses or products with another leave 64 bits are among them.
JUNK = [None, True, False, -1, 0, 1, 3, 2**31, 2**62, 1.5, -0.5, 5e-324, 1e300, "", "x", "silu", [], [1], {}, {"x": 1}]
ROPE = ["rope_type", "type", "factor", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"]
ROPE += ["attention_factor", "truncate", "beta_fast", "beta_slow", "low_freq_factor", "short_factor", "mrope_section"]
ROPE += ["mrope_interleaved"]
FULL = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {"original_max_position_embeddings": 64, "short_factor": [1.5] * 8, "long_factor": [2.5] * 8},
}


def keys(arch: str) -> list[str]:
    """All that the architecture could look at."""
    kind = archs.load(arch).model_types[0]
    written = transformers.CONFIG_MAPPING[kind]().to_dict().keys() if arch in IN_TRANSFORMERS else set()
    more = {"rope_scaling", "rope_theta", "hidden_activation", "layer_types", "quantization_config", "auto_map"}
    return sorted((written | more | archs.load(arch).tiny.keys() | {"architectures", "model_type"}) - not_read(arch))


def junk(arch: str) -> Iterator[dict[str, Any]]:
    """The tiny config with every key in turn, or every key of every type of RoPE, holding junk."""
    tiny = CONFIGS[arch]
    for value in JUNK:
        yield from (tiny | {key: value} for key in keys(arch))
        for kind, rope in FULL.items():
            for key in ROPE:
                yield tiny | {"rope_parameters": everywhere(arch, {"rope_type": kind, **rope, key: value})}


@functools.cache
def steps(block: Rotary) -> torch.Tensor:
    return blocks.module(block, torch.float32).steps


@pytest.mark.parametrize("arch", others_slow(archs.names(), EVERY_TIME))
def test_junk_in_place_of_any_value_is_refused_or_gives_a_model_that_turns(arch):
    """`ours` passes on any error but the one-line refusal."""
    read = [model for config in junk(arch) if isinstance(model := ours(config), Model)]
    assert read
    rotaries = {b for model in read for layer in placed_layers(model) for b in layer.reads if isinstance(b, Rotary)}
    assert [b for b in rotaries if not steps(b).isfinite().all()] == []


@pytest.mark.parametrize("arch", archs.names())
def test_the_largest_sizes_that_are_read_can_be_laid_out(arch):
    """The bytes of every weight fit in 64 bits, so that a disk and not an overflow is the limit."""
    config = dict(CONFIGS[arch])
    if arch in ("qwen3_5", "qwen3_5_moe"):
        # So that the sections of mRoPE still make its part of the head.
        config["rope_parameters"] = {"partial_rotary_factor": 8 / LONGEST, "mrope_section": [2, 1, 1]}
    # So that every expert may be chosen.
    groups = {k: 1 for k in ("n_group", "topk_group") if k in config}
    config |= groups
    passed_over = {*LAYERS, *groups, *not_read(arch)}
    for key in [k for k, v in config.items() if type(v) is int and k not in passed_over]:
        config[key] = next(n for n in (2**31 - 1, LONGEST, MOST) if "at most" not in str(ours(config | {key: n})))
    model = ours(config)
    assert isinstance(model, Model), model
    for block in {s.block for s in model.steps}:
        assert all(math.prod(shape) * 4 < 2**63 for shape in module_shapes(block).values())
