"""Keys of config.json that are passed over: they change nothing here, and nothing in transformers."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from arch_cases import DECODERS, FIRST, IN_TRANSFORMERS
from tiny_configs import read, read_whole, refusal

from llmexport.export import archs
from llmexport.export.errors import ExportError
from llmexport.export.keys import CAUSAL, NEUTRAL, NEUTRAL_CAUSAL
from llmexport.export.onnx_file import read_noted

# As published checkpoints have them, where nothing in the architecture reads them.
WRITTEN = [
    ("llama", {"unsloth_fixed": True, "unsloth_version": "2026.3.3", "unsloth_tokenizer": "x"}),
    ("llama", {"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}}),
    ("llama", {"max_sequence_length": 2048, "neftune_noise_alpha": 5, "tokenizer_model_max_length": 2048}),
    ("llama", {"use_flash_attn": True, "name": "x", "is_causal": True}),
    ("llama", {"layer_types": ["full_attention"] * 3}),
    ("llama", {"use_sliding_window": False, "max_window_layers": 2}),
    ("qwen3", {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 2}),
    ("llama", {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1}),
    ("mistral", {"attention_bias": False, "mlp_bias": False, "layer_types": ["sliding_attention"] * 3}),
    ("mistral", {"sliding_window_size": 8}),
    ("gemma2", {"sliding_window_size": 8, "_attn_implementation": "eager", "attn_implementation": "eager"}),
    ("phi3", {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False}),
    ("qwen3", {"num_labels": 2, "language_model_only": False, "mlp_only_layers": [], "num_experts": 0}),
    ("gpt2", {"hidden_size": 64, "n_ctx": 512, "n_special": 0, "predict_special_tokens": True, "pruned_heads": {}}),
    ("qwen3", {"num_hidden_layers": 3.0, "head_dim": 16.0}),
]


@pytest.mark.parametrize(("arch", "keys"), WRITTEN)
def test_bookkeeping_is_passed_over(arch, keys):
    assert read(arch, **keys) == read(arch)


@pytest.mark.parametrize(("arch", "keys"), WRITTEN[:-1])
def test_transformers_computes_the_same_with_it(arch, keys):
    tiny = dict(archs.load(arch).tiny) | {"attn_implementation": "eager"}
    configs = [transformers.CONFIG_MAPPING[arch](**copy.deepcopy(tiny | k)) for k in ({}, keys)]
    torch.manual_seed(0)
    first, second = (transformers.AutoModelForCausalLM.from_config(c).eval() for c in configs)
    second.load_state_dict(first.state_dict())
    ids = torch.randint(3, 256, (1, 20))
    with torch.no_grad():
        assert torch.equal(first(ids).logits, second(ids).logits)


def passes_over(arch: str, key: str, value: object) -> bool:
    try:
        return read(arch, **{key: value}) == read(arch)
    except ExportError:
        return False


@pytest.mark.parametrize("arch", [c.arch for c in FIRST if c in DECODERS and c.arch in IN_TRANSFORMERS])
def test_transformers_computes_the_same_decoder_whatever_its_config_says_of_encoders(arch):
    said = {"is_decoder": False, "add_cross_attention": True, "is_encoder_decoder": True}
    said |= {"cross_attention_hidden_size": 48, "tie_encoder_decoder": True, "max_position_embeddings": 511}
    assert said.keys() == CAUSAL
    # Who has a table of positions reads how long it is, and GPT-2 whether it has cross-attention.
    said = {k: v for k, v in said.items() if passes_over(arch, k, v)}
    model_class = getattr(transformers, archs.load(arch).reference.model_class)
    tiny = dict(archs.load(arch).tiny) | {"attn_implementation": "eager"}
    first, second = (model_class(model_class.config_class(**copy.deepcopy(tiny | k))).eval() for k in ({}, said))
    second.load_state_dict(first.state_dict())
    ids, carries = torch.randint(3, 256, (1, 20)), archs.load(arch).reference.state or "past_key_values"
    made = []
    with torch.no_grad():
        # GPT has no cache.
        for model in (first, second):
            carried = {carries: getattr(model(ids[:, :15]), carries, None)}
            made.append(model(ids[:, 15:], **carried).logits)
    assert torch.equal(*made)


@pytest.mark.parametrize("key", NEUTRAL | NEUTRAL_CAUSAL)
def test_a_feature_at_the_value_that_changes_nothing_is_passed_over(key):
    arch = "mixtral" if key in ("mlp_bias", "attention_bias", "rope_interleaved") else "llama"
    for value in (NEUTRAL | NEUTRAL_CAUSAL)[key]:
        assert read(arch, **{key: value}) == read(arch)


@pytest.mark.parametrize(
    ("arch", "keys", "said"),
    [
        *(("mistral", {key: other}, f"{key}={other!r}") for key, other in (
            ("mlp_bias", True), ("lm_head_bias", True), ("full_attn_mod", 2), ("interpolate_factor", True),
            ("language_model_only", True), ("is_causal", False), ("use_qk_norm", True), ("logit_scale", 0.0625),
            ("num_experts", 8), ("mlp_bias", 0), ("output_gate_type", "silu"), ("unsloth", True),
        )),
        ("gemma2", {"sliding_window_size": 9}, "sliding_window_size=9"),
        ("gpt2", {"hidden_size": 65}, "hidden_size=65"),
        ("llama", {"sliding_window_size": 8}, "sliding_window_size=8"),
        ("llama", {"sliding_window": 8}, "sliding_window=8"),
        ("llama", {"sliding_window": 8, "use_sliding_window": True}, "sliding_window=8, use_sliding_window=True"),
        # The cache of transformers slides by it, though a prefill does not.
        ("llama", {"sliding_window": 8, "use_sliding_window": False}, "sliding_window=8"),
        # transformers takes it for false.
        ("llama", {"is_causal": None}, "is_causal=None"),
        # Which has its window whatever the switch says.
        ("mistral", {"use_sliding_window": False}, "use_sliding_window=False"),
        ("llama", {"layer_types": ["sliding_attention"] * 3}, "all 3 layers are full_attention"),
        ("llama", {"layer_types": ["full_attention"] * 2}, "all 3 layers are full_attention"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "all 3 layers are sliding_attention"),
    ],
)  # fmt: skip
def test_at_any_other_value_it_is_refused(arch, keys, said):
    assert said in refusal(arch, **keys)


def test_no_refusal_advises_to_edit_a_published_file():
    line = refusal("llama", attn_logit_cap=50.0)
    assert "remove" not in line
    assert "report the checkpoint" in line


@pytest.mark.parametrize("gate", ["silu", "swish"])
def test_qwen_3_5_knows_the_gate_that_it_has(gate):
    for arch in ("qwen3_5", "qwen3_5_moe"):
        assert read(arch, output_gate_type=gate) == read(arch)
        assert read_whole(arch, {"language_model_only": False}) == read(arch)


@pytest.mark.parametrize(("number", "flag"), [(4, True), (1, True), (0, False), (4.0, True)])
def test_llama_4_of_the_first_release_says_its_temperature_by_a_number(number, flag):
    assert read("llama4", attn_temperature_tuning=number) == read("llama4", attn_temperature_tuning=flag)


def test_phi_3_saved_from_the_hub_names_the_repository_of_its_code():
    code = {"AutoConfig": "microsoft/Phi-3-mini-4k-instruct--configuration_phi3.Phi3Config"}
    assert read("phi3", auto_map=code) == read("phi3")


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_dual_chunks_are_left_out_with_a_note(arch):
    config = dict(archs.load(arch).tiny)
    chunks = {"chunk_size": 64, "local_size": 8, "original_max_position_embeddings": 256}
    model, [note] = read_noted(archs.load(arch), config | {"dual_chunk_attention_config": chunks})
    assert model == read(arch)
    assert "right up to 256 tokens" in note
    assert "original_max_position_embeddings is 7, " not in refusal(arch, dual_chunk_attention_config={"x": 7})
