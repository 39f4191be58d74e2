"""What optimum's ORTModelForCausalLM reads: a config in words that transformers 4 and 5 both have, and its cache."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from arch_cases import DECODERS, IN_TRANSFORMERS, LATENTS, Case
from other_runtimes import OPTIMUM, asked
from tiny_configs import one_line, read

from llmexport.export import archs, onnx_file, optimum
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.errors import ExportError
from llmexport.export.onnx_file import read_model
from llmexport.export.static import StaticCache

PYTHON = "LLMEXPORT_OPTIMUM_PYTHON"  # the interpreter of an environment with optimum-onnx
# Those that carry more than keys and values, or others.
OTHERS = ("gemma4_text", "qwen3_5", "qwen3_5_moe", *LATENTS)
KNOWN = [c for c in DECODERS if c.arch not in OTHERS and "rope_parameters" in archs.load(c.arch).tiny]


def stored(case: Case) -> dict:
    """A config.json as transformers 5 writes it."""
    arch = archs.load(case.arch)
    kind = getattr(transformers, arch.reference.model_class).config_class
    return kind(**json.loads(json.dumps({**arch.tiny, **case.changes}))).to_dict()


@pytest.mark.parametrize("case", [c for c in KNOWN if c.arch in IN_TRANSFORMERS], ids=str)
def test_transformers_reads_the_same_of_both_forms(case: Case, tmp_path: Path) -> None:
    before = stored(case)
    after = optimum.with_old_rope(before, archs.load(case.arch).rope_keys)
    assert "rope_parameters" not in after
    found = []
    for config in (before, after):
        (tmp_path / "config.json").write_text(json.dumps(config))
        found.append(transformers.AutoConfig.from_pretrained(tmp_path).to_dict())
    new, old = (f.pop("rope_parameters", {}) for f in found)
    assert rope_of(new) == rope_of(old)
    # Beside it, only the names that say the same.
    told = {"rope_theta", "rope_local_base_freq", "partial_rotary_factor", "original_max_position_embeddings"}
    assert {k for k in found[0] if found[0][k] != found[1].get(k)} <= told


def rope_of(parameters: dict) -> dict:
    """What is said, whatever the older form calls it besides."""
    if parameters.keys() & {"full_attention", "sliding_attention"}:
        return {kind: rope_of(p) for kind, p in parameters.items()}
    return {k: v for k, v in parameters.items() if v is not None and k not in ("type", ORIGINAL)}


ORIGINAL = "original_max_position_embeddings"


@pytest.mark.parametrize("case", KNOWN, ids=str)
def test_this_package_reads_the_same_of_both_forms(case: Case) -> None:
    arch = archs.load(case.arch)
    before = {**arch.tiny, **case.changes}
    assert read_model(arch, optimum.with_old_rope(before, arch.rope_keys)) == read_model(arch, before)


def test_a_checkpoint_without_a_generation_config_gets_its_ids() -> None:
    config = {"eos_token_id": 2, "pad_token_id": None, "num_attention_heads": 4, "hidden_size": 64}
    graph = read("llama").graphs[0]
    assert optimum.files(graph, config, {}, {})[0]["generation_config.json"] == {"eos_token_id": 2}
    assert list(optimum.files(graph, config, {"top_k": 3}, {})[0]) == ["config.json"]


def test_a_cache_that_optimum_mistakes_is_noted_with_the_line_that_sets_it() -> None:
    graph = read("llama").graphs[0]
    sizes = {"num_attention_heads": 2, "hidden_size": 32}
    assert optimum.files(graph, sizes, {}, {})[1] == []
    [note] = optimum.files(graph, {**sizes, "hidden_size": 64}, {}, {})[1]
    line = note.partition("run after from_pretrained: ")[2]
    model = type("Model", (), {"input_shapes": {"past_key_values.0.key": ["batch", 2, "past", 16]}})
    exec(line, {"model": model})
    assert (model.num_key_value_heads, model.embed_size_per_head) == (2, 16)


@pytest.mark.parametrize(
    ("arch", "slots", "why"),
    [
        ("qwen3_5_moe", None, "past_key_values.%d.recurrent_state beside keys and values"),
        ("llama", 64, "whose static cache it does not write in place"),
    ],
)
def test_what_optimum_does_not_feed_is_refused(arch: str, slots: int | None, why: str) -> None:
    named = archs.load(arch)
    with pytest.raises(ExportError) as error:
        optimum.files(read_model(named, named.tiny, slots and StaticCache(slots)).graphs[0], named.tiny, {}, {})
    assert one_line(error.value).endswith(why)


def test_a_sliding_rope_that_transformers_4_cannot_be_told_is_refused() -> None:
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ExportError, match="whose sliding attention has a RoPE that transformers 4 cannot be told"):
        optimum.with_old_rope({"rope_parameters": {"sliding_attention": linear, "full_attention": linear}}, {})


@pytest.mark.model
@pytest.mark.skipif(PYTHON not in os.environ, reason=f"{PYTHON} names no Python with optimum-onnx")
@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_the_tokens_are_those_of_transformers(arch: str, tiny_checkpoint, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(arch))
    request = onnx_file.Request(archs.choose(None, checkpoint.config), checkpoint, runtimes=("optimum",))
    made = onnx_file.write(request, tmp_path / "out")
    prompts = [[5, 0, 9, 2, 77, 0, 8, 30, 31, 32, 33, 34], [7, 6, 5, 4]]
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.folder, attn_implementation="eager").eval()
    wanted = []
    for ids in (torch.tensor([p]) for p in prompts):
        options = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20}
        wanted.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist())
    lines = [note.partition("run after from_pretrained: ")[2] for note in made.notes if "optimum" in note]
    assert asked(os.environ[PYTHON], OPTIMUM, made.folder, prompts, 20, *lines)["optimum"] == wanted
