"""config.json: every key that can change the numbers is understood, or the export stops and names it."""

import math

import pytest
import transformers
from tiny_configs import one_line, placed_layers, read, refusal, windows

from llmexport.export import archs
from llmexport.export.config import Config
from llmexport.export.errors import ExportError
from llmexport.export.keys import ANY, CAUSAL
from llmexport.export.onnx_file import read_model
from llmexport.export.spec import Experts, Moe, Mxfp4, Plain, Rotary

ARCHS = archs.names()
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
# A head that turns by other RoPE types than the tiny one's, in the words of transformers 5.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(("value", "window"), [(8, 8), (None, None)])
def test_mistral_has_a_window_unless_it_is_null(value, window):
    assert windows(read("mistral", sliding_window=value)) == [window] * 3


def test_mistral_without_the_key_has_transformers_default_window():
    tiny = dict(archs.load("mistral").tiny)
    del tiny["sliding_window"]
    found = windows(read_model(archs.load("mistral"), tiny))
    assert found == [transformers.MistralConfig().sliding_window] * 3


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_qwen_slides_from_max_window_layers_on(arch):
    sliding = {"use_sliding_window": True, "sliding_window": 8}
    assert windows(read(arch, **sliding, max_window_layers=2)) == [None, None, 8]
    assert windows(read(arch, **sliding, max_window_layers=0)) == [8, 8, 8]


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "qwen2_moe"])
def test_qwen_does_not_slide_unless_told_to(arch):
    assert windows(read(arch, use_sliding_window=False, sliding_window=8, max_window_layers=0)) == [None, None, None]


def test_qwen2_moe_slides_in_every_other_layer_below_max_window_layers():
    sliding = {"use_sliding_window": True, "sliding_window": 8}
    assert windows(read("qwen2_moe", **sliding)) == [8, None, 8]
    assert windows(read("qwen2_moe", **sliding, max_window_layers=2)) == [8, None, None]


@pytest.mark.parametrize("arch", ["qwen2", "gemma2", "gemma3_text", "gpt_oss"])
def test_layer_types_decide_before_what_they_follow_from(arch):
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    assert windows(read(arch, layer_types=kinds)) == [8, None, None]


def test_gemma_3_says_after_how_many_layers_one_is_full():
    tiny = {k: v for k, v in archs.load("gemma3_text").tiny.items() if k != "layer_types"}
    model = read_model(archs.load("gemma3_text"), {**tiny, "num_hidden_layers": 5, "sliding_window_pattern": 2})
    assert windows(model) == [8, None, 8, None, 8]


def test_the_pattern_that_transformers_writes_and_does_not_read_must_agree():
    pattern = {"layer_types": None, "_sliding_window_pattern": 2}
    assert transformers.Gemma3TextConfig(**pattern).layer_types[:6] == ["sliding_attention"] * 5 + ["full_attention"]
    assert "_sliding_window_pattern is 2, only 6" in refusal("gemma3_text", **pattern)
    assert read("gemma3_text", sliding_window_pattern=2, **pattern)


def test_llama_4_turns_where_no_rope_layers_is_1():
    layers = placed_layers(read("llama4", no_rope_layers=[0, 1, 1, 0]))
    assert [layer.mixer.turned for layer in layers] == [0, 16, 16, 0]
    assert [any(isinstance(b, Rotary) for b in layer.reads) for layer in layers] == [False, True, True, False]


@pytest.mark.parametrize("found", [None, []])
def test_llama_4_goes_without_rope_in_every_fourth_layer_unless_told(found):
    layers = placed_layers(read("llama4", no_rope_layers=found, num_hidden_layers=8))
    assert [layer.mixer.turned > 0 for layer in layers] == [True, True, True, False] * 2


@pytest.mark.parametrize(
    ("arch", "changes", "sparse"),
    [
        ("llama4", {}, [1, 3]),
        ("llama4", {"interleave_moe_layer_step": 1}, [0, 1, 2, 3]),
        ("llama4", {"moe_layers": [2]}, [2]),
        ("llama4", {"moe_layers": []}, []),
        ("qwen2_moe", {}, [0, 2]),
        ("qwen2_moe", {"mlp_only_layers": [], "decoder_sparse_step": 2}, [1]),
        ("mixtral", {}, [0, 1, 2]),
    ],
)
def test_experts_are_in_the_layers_that_the_config_says(arch, changes, sparse):
    layers = placed_layers(read(arch, **changes))
    assert [i for i, layer in enumerate(layers) if isinstance(layer.mlp, Moe)] == sparse


def experts(**changes) -> Experts:
    [found] = {layer.mlp.experts for layer in placed_layers(read("gpt_oss", **changes))}
    return found


def test_mxfp4_experts_are_packed_and_as_nn_linear_keeps_them():
    sizes = {"hidden_size": 64, "intermediate_size": 32}
    plain, packed = experts(**sizes), experts(**sizes, quantization_config=MXFP4)
    assert (plain.storage, plain.transposed) == (Plain(), True)
    assert (packed.storage, packed.transposed) == (Mxfp4(), False)


def test_mxfp4_that_was_undone_is_not_packed():
    assert experts(quantization_config=MXFP4 | {"dequantize": True}) == experts()


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 48}, {"intermediate_size": 40}, {"hidden_size": 80, "intermediate_size": 40}]
)
def test_mxfp4_experts_of_sizes_that_no_block_divides_are_refused(changes):
    line = refusal("gpt_oss", quantization_config=MXFP4, **changes)
    assert all(f"{key} {value}" in line for key, value in changes.items())
    assert "MXFP4 packs 32 values a block" in line


@pytest.mark.parametrize("arch", ARCHS)
def test_an_unknown_key_is_named_with_its_value(arch):
    assert "attn_logit_cap=50.0" in refusal(arch, attn_logit_cap=50.0)


def test_all_unknown_keys_are_named():
    line = refusal("llama", zeta=1, alpha=2)
    assert "alpha=2, zeta=1" in line


def test_an_unknown_key_that_is_null_says_nothing():
    assert read("llama", quantization_config=None) == read("llama")


@pytest.mark.parametrize("key", sorted(ANY | CAUSAL))
def test_a_harmless_key_changes_nothing(key):
    assert read("llama", **{key: 1}) == read("llama")


def test_what_is_harmless_in_any_model_is_harmless_in_an_encoder():
    assert all(read("bert", **{key: 1}) == read("bert") for key in ANY)


@pytest.mark.parametrize("key", sorted(CAUSAL))
def test_what_is_harmless_in_a_decoder_alone_is_read_or_refused_in_an_encoder(key):
    if key == "max_position_embeddings":
        assert read("bert", **{key: 1}) != read("bert")
    else:
        assert f"{key}=1" in refusal("bert", **{key: 1})


QWEN3_5 = ("qwen3_5", "qwen3_5_moe")
# What some architectures know, each with a value that is not their tiny config's.
RICHER = {
    "quantization_config": ({"quant_method": "aqlm", "bits": 4}, ()),
    "partial_rotary_factor": (0.75, ("glm", "glm4", "glm4_moe", "minimax_m2", "phi3", "qwen3_next", *QWEN3_5)),
    "attn_logit_softcapping": (50.0, ("gemma2",)),
    "final_logit_softcapping": (50.0, ("gemma2", "gemma4_text")),
    "logits_scaling": (8.0, ("granite",)),
    "embedding_multiplier": (8.0, ("granite",)),
    "residual_multiplier": (0.5, ("granite",)),
    "rope_interleaved": (True, ()),
    "query_pre_attn_scalar": (256, ("gemma2", "gemma3_text")),
    "num_local_experts": (16, ("gpt_oss", "llama4", "minimax_m2", "mixtral", "phimoe", "qwen3_moe")),
    "num_experts": (16, ("qwen2_moe", "qwen3_5_moe", "qwen3_next", "grok", "kimi_linear")),
    "clip_qkv": (8.0, ("olmo",)),
    "swiglu_limit": (5.0, ("gpt_oss",)),
    "auto_map": ({"AutoModelForCausalLM": "modeling_other.Other"}, ()),
}


@pytest.mark.parametrize("key", RICHER)
def test_a_key_of_a_richer_architecture_is_refused_in_every_other(key):
    value, knowing = RICHER[key]
    for arch in set(ARCHS) - set(knowing):
        assert key in refusal(arch, **{key: value}), arch


@pytest.mark.parametrize(("arch", "key"), [(arch, key) for key, (_, knowing) in RICHER.items() for arch in knowing])
def test_a_key_that_an_architecture_knows_changes_its_model(arch, key):
    own = {"rope_parameters": {"mrope_section": [4, 4, 4]}} if arch in QWEN3_5 else {"rope_parameters": {}}
    changes = own if key == "partial_rotary_factor" else {}
    assert read(arch, **changes, **{key: RICHER[key][0]}) != read(arch)


@pytest.mark.parametrize("arch", [a for a in ARCHS if a != "gpt_oss"])
def test_mxfp4_is_refused_where_no_experts_are_known_to_be_stored_so(arch):
    assert "quantization_config" in refusal(arch, quantization_config=MXFP4)


def test_gpt_oss_in_few_bits_otherwise_is_what_it_is_in_16():
    """What its tensors are is asked of the checkpoint."""
    assert read("gpt_oss", quantization_config={"quant_method": "fp8"}) == read("gpt_oss")


@pytest.mark.parametrize("found", [{"quant_method": "aqlm"}, {"bits": 4}, {}, "mxfp4", ["mxfp4"], True])
def test_gpt_oss_is_refused_in_any_other_quantisation(found):
    line = refusal("gpt_oss", quantization_config=found)
    assert "quantization_config says that the weights are quantised" in line
    assert "only unquantised weights or mxfp4 can be exported here" in line


@pytest.mark.parametrize("arch", ["gemma", "glm", "glm4", "llama", "olmo", "qwen2", *QWEN3_5])
def test_a_window_is_refused_where_the_architecture_has_none(arch):
    changes = {"use_sliding_window": True, "swa_layers": 1} if arch == "qwen2" else {"sliding_window": 4096}
    assert list(changes)[-1] in refusal(arch, **changes)


ROUTED = ["gpt_oss", "llama4", "mixtral", "qwen2_moe", "qwen3_5_moe"]
TYPED = ["gemma2", "gemma3_text", "gemma4_text", "gpt_oss", "llama4", "qwen2", "qwen2_moe", "qwen3", *QWEN3_5]


@pytest.mark.parametrize("arch", ROUTED)
def test_more_experts_a_token_than_there_are_is_refused(arch):
    assert "num_experts_per_tok is 99, there are" in refusal(arch, num_experts_per_tok=99)


@pytest.mark.parametrize("arch", TYPED)
@pytest.mark.parametrize("kinds", [["full_attention"], ["full_attention"] * 9, [], "full_attention", {"0": 1}])
def test_layer_types_of_another_number_of_layers_are_refused(arch, kinds):
    layers = len(placed_layers(read(arch)))
    assert f"layer_types must list {layers} kinds" in refusal(arch, layer_types=kinds)


@pytest.mark.parametrize("arch", TYPED)
@pytest.mark.parametrize("kind", ["mamba", "", None, 7])
def test_an_unknown_kind_of_layer_is_refused_by_name(arch, kind):
    kinds = [*["full_attention"] * (len(placed_layers(read(arch))) - 1), kind]
    assert f"layer_types names {kind}, known are" in refusal(arch, layer_types=kinds)


@pytest.mark.parametrize(
    ("arch", "changes", "said"),
    [
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True, only False"),
        ("gemma", {"hidden_act": "silu"}, "hidden_act is 'silu', this architecture knows 'gelu'"),
        ("gemma", {"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
        ("llama", {"hidden_act": "relu2"}, "hidden_act is 'relu2'"),
        ("llama", {"hidden_size": 64.5}, "hidden_size is 64.5, expected a positive integer"),
        ("llama", {"hidden_size": "64"}, "hidden_size is '64', expected a positive integer"),
        ("llama", {"hidden_size": None}, "no 'hidden_size'"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers is True, expected a positive integer"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a positive integer"),
        ("llama", {"vocab_size": -1}, "vocab_size is -1, expected a positive integer"),
        ("llama", {"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6', expected a positive number"),
        ("llama", {"rms_norm_eps": True}, "rms_norm_eps is True, expected a positive number"),
        ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true or false"),
        ("llama", {"attention_bias": 0}, "attention_bias is 0, expected true or false"),
        ("llama", {"num_key_value_heads": 3}, "4 attention heads are not a multiple of 3 key/value heads"),
        ("llama", {"head_dim": 15}, "even head size, config.json makes it 15"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "not understood: partial_rotary_factor"),
        ("glm4", {"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor is 1.5, a share"),
        ("glm4", {"partial_rotary_factor": 0.25}, "says partial_rotary_factor twice, 0.5 and 0.25"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu', this architecture knows"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0, expected a positive number"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping is -1.0, expected a positive number"),
        ("gemma2", {"sliding_window": 0}, "sliding_window is 0, expected a positive integer"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0, only None"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True, only False"),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all', only None"),
        (
            "gemma4_text",
            {"layer_types": ["full_attention", *["sliding_attention"] * 2]},
            "the last layer of this model",
        ),
        ("gemma4_text", {"num_kv_shared_layers": 1}, "num_kv_shared_layers is 1, which leaves no full_attention"),
        ("gemma4_text", {"num_kv_shared_layers": 9}, "num_kv_shared_layers is 9, which leaves no full_attention"),
        ("gemma4_text", {"per_layer_config": {"1": {"head_dim": 64}}}, "expected head_dim and num_key_value_heads"),
        ("gemma4_text", {"per_layer_config": {"2": {"hidden_size": 64}}}, "of layers 2, one for all"),
        ("gemma4_text", {"per_layer_config": {"2": 64}}, "of layers 2, one for all"),
        ("gemma4_text", {"per_layer_config": [{"head_dim": 64}]}, "of layers 2, one for all"),
        ("gemma4_text", {"global_head_dim": 64}, "global_head_dim=64"),
        ("gemma4_text", {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 9}, "is 9, vocab_size is 256"),
        ("gemma4_text", {"enable_moe_block": True}, "no 'num_experts'"),
        ("gpt_oss", {"sliding_window": None}, "sliding_window is null"),
        ("gpt_oss", {"sliding_window": 2**32 + 2}, "sliding_window is 4294967298, at most 2147483647 is supported"),
        ("gemma2", {"sliding_window": 2**31}, "sliding_window is 2147483648, at most 2147483647 is supported"),
        ("gemma2", {"sliding_window": None}, "sliding_window is null"),
        ("gemma3_text", {"sliding_window": None}, "sliding_window is null"),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": None}, "sliding_window is null"),
        ("llama4", {"attention_chunk_size": None}, "attention_chunk_size is null"),
        ("glm", {"head_dim": None}, "head_dim is null"),
        ("llama", {"vocab_size": 2**62}, "vocab_size is 4611686018427387904, at most 1048576 is supported"),
        ("llama", {"num_hidden_layers": 10**8}, "num_hidden_layers is 100000000, at most 4096 is supported"),
        ("mixtral", {"num_local_experts": 2**40}, "num_local_experts is 1099511627776, at most 4096 is supported"),
        ("gpt_oss", {"experts_per_token": 1}, "experts_per_token and num_experts_per_tok differ"),
        ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act is 'gelu', only 'silu'"),
        ("gpt_oss", {"swiglu_limit": 0}, "swiglu_limit is 0, expected a positive number"),
        ("llama4", {"moe_layers": [1, 4]}, "moe_layers is [1, 4], expected numbers of layers from 0 to 3"),
        ("llama4", {"moe_layers": [-1]}, "moe_layers is [-1], expected"),
        ("llama4", {"moe_layers": [True]}, "moe_layers is [True], expected"),
        ("llama4", {"moe_layers": "all"}, "moe_layers is 'all', expected"),
        ("llama4", {"no_rope_layers": [1, 1, 1]}, "no_rope_layers must list 4 times 0 or 1"),
        ("llama4", {"no_rope_layers": [1, 1, 1, 2]}, "no_rope_layers must list 4 times 0 or 1"),
        ("llama4", {"no_rope_layers": [1, 1, 1, "0"]}, "no_rope_layers must list 4 times 0 or 1"),
        ("llama4", {"no_rope_layers": 4}, "no_rope_layers must list 4 times 0 or 1"),
        ("llama4", {"attn_temperature_tuning": "4"}, "attn_temperature_tuning is '4', expected true or false"),
        ("llama4", {"attn_temperature_tuning": -1}, "attn_temperature_tuning is -1, expected an integer of at least 0"),
        (
            "qwen3_5_moe",
            {"output_gate_type": "sigmoid"},
            "output_gate_type is 'sigmoid', this architecture knows 'silu'",
        ),
        ("phi3", {"auto_map": {"AutoConfig": "a/b--other.Phi3Config"}}, "auto_map is {'AutoConfig'"),
        ("phimoe", {"num_experts_per_tok": 1}, "num_experts_per_tok is 1, only 2"),
        ("phimoe", {"num_local_experts": 1}, "num_local_experts is 1, expected an integer of at least 2"),
        ("phimoe", {"router_jitter_noise": 0.0}, "router_jitter_noise is 0.0, expected a positive number"),
        ("phimoe", {"auto_map": {"AutoConfig": "configuration_slimmoe.PhiMoEConfig"}}, "auto_map is {'AutoConfig'"),
        ("llama4", {"nope_layer_interval": 3}, "nope_layer_interval is 3, only 4"),
        ("qwen2_moe", {"mlp_only_layers": [3]}, "mlp_only_layers is [3], expected numbers of layers from 0 to 2"),
        ("qwen3_5_moe", {"linear_num_value_heads": 3}, "3 value heads are not a multiple of 2 key heads"),
        (
            "qwen3_5_moe",
            {"linear_conv_kernel_dim": 1},
            "linear_conv_kernel_dim is 1, expected an integer of at least 2",
        ),
        ("qwen3_5_moe", {"attn_output_gate": False}, "attn_output_gate is False, only True"),
        ("qwen3_5_moe", {"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype is 'bfloat16', only 'float32'"),
        ("qwen3_5_moe", {"mlp_only_layers": [1]}, "mlp_only_layers is [1], only []"),
        ("qwen3_5_moe", {"hidden_act": "gelu"}, "hidden_act is 'gelu', only 'silu'"),
        ("olmo", {"clip_qkv": 0}, "clip_qkv is 0, expected a positive number"),
        ("phi3", {"attention_bias": True}, "attention_bias is True, only False"),
        ("phi3", {"auto_map": {"AutoModelForCausalLM": "modeling_other.Other"}}, "auto_map is {'AutoModelForCausalLM'"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0, expected a positive integer"),
        ("mistral", {"sliding_window": False}, "sliding_window is False, expected a positive integer"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types must list 3 kinds of attention"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types names chunked_attention"),
        (
            "qwen2",
            {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 3},
            "no sliding_window is in use",
        ),
    ],
)
def test_a_value_that_is_not_understood_is_refused(arch, changes, said):
    assert said in refusal(arch, **changes)


@pytest.mark.parametrize("found", [5, True, 0, "", "GemmaForCausalLM", {"GemmaForCausalLM": 1}, [], [5], [["x"]]])
def test_architectures_that_are_no_list_with_ours_are_refused(found):
    with pytest.raises(ExportError) as error:
        archs.choose(None, {"model_type": "gemma", "architectures": found})
    assert "exports ['GemmaForCausalLM']" in one_line(error.value)


@pytest.mark.parametrize(
    "changes",
    [{"hidden_act": ["silu"]}, {"hidden_act": {}}, {"rope_parameters": {"rope_type": ["llama3"]}}],
)
def test_a_list_or_an_object_in_place_of_a_name_is_refused(changes):
    refusal("llama", **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": math.nan},
        {"rms_norm_eps": -1.0},
        {"rope_parameters": {"rope_theta": math.inf}},
        {"rope_parameters": {"rope_theta": 0}},
        {"rope_parameters": {"rope_theta": -1.0}},
        {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64.5}},
    ],
)
def test_a_number_that_no_model_can_have_is_refused(changes):
    refusal("llama", **changes)


def test_an_integer_beyond_all_floats_is_refused():
    refusal("llama", rms_norm_eps=10**400)


def test_a_key_with_a_line_break_is_refused_in_one_line():
    refusal("llama", **{"weird\nkey": 1})


def test_a_long_value_is_cut():
    assert len(refusal("llama", quantization_config={"modules": [f"model.layers.{i}" for i in range(999)]})) < 500


def test_a_key_that_is_absent_has_its_default():
    assert Config({}).get("absent", 3) == 3


def test_null_is_read_where_it_is_the_default_and_refused_elsewhere():
    config = Config({"null": None})
    assert config.get("null", None) is None
    with pytest.raises(ExportError, match="null is null, which means nothing here: write its value"):
        config.get("null", 4)


def test_a_key_without_a_default_must_be_there():
    with pytest.raises(ExportError, match="no 'hidden_size'"):
        Config({}).integer("hidden_size")


def test_finish_accepts_a_config_whose_every_key_was_read():
    config = Config({"a": 1, "dtype": "bfloat16"})
    config.get("a")
    config.finish(causal=True)


def test_the_config_that_came_in_stays_as_it_was():
    config = {**archs.load("llama").tiny, "rope_parameters": dict(LLAMA3)}
    read_model(archs.load("llama"), config)
    assert config["rope_parameters"] == LLAMA3
