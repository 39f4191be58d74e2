"""config.json: every key that can change the numbers is understood, or the export stops and names it."""

import json
import math
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from llmexport.export import archs
from llmexport.export.config import HARMLESS, Config
from llmexport.export.errors import ExportError
from llmexport.export.onnx_file import read_model
from llmexport.export.spec import LinearScaling, Llama3Scaling, Model

CLASSES = {n: transformers.CONFIG_MAPPING[archs.load(n).arch.model_types[0]] for n in archs.names()}
# As published on the hub, written by transformers 4.
PUBLISHED = json.loads("""{
    "gemma-2b": {
        "architectures": ["GemmaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 2,
        "eos_token_id": 1, "head_dim": 256, "hidden_act": "gelu", "hidden_activation": null, "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 16384, "max_position_embeddings": 8192,
        "model_type": "gemma", "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1,
        "pad_token_id": 0, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 10000.0,
        "torch_dtype": "bfloat16", "transformers_version": "4.38.0.dev0", "use_cache": true, "vocab_size": 256000
    },
    "Llama-3.1-8B": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"
        },
        "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.42.3", "use_cache": true, "vocab_size": 128256
    },
    "Llama-2-7b": {
        "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": null, "tie_word_embeddings": false, "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0", "use_cache": true, "vocab_size": 32000
    },
    "linear scaling": {
        "hidden_size": 64, "intermediate_size": 128, "model_type": "llama", "num_attention_heads": 4,
        "num_hidden_layers": 2, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 4.0, "type": "linear"},
        "rope_theta": 20000.0, "vocab_size": 256
    },
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "sliding_window": 4096, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0", "use_cache": true, "vocab_size": 32000
    },
    "Mistral-7B-v0.3": {
        "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.42.0.dev0", "use_cache": true, "vocab_size": 32768
    },
    "Qwen2.5-0.5B-Instruct": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
        "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2",
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936
    }
}""")
# The same, with keys that newer or other trainers wrote beside those, each with the value that changes nothing.
WITH_MORE_KEYS = json.loads("""{
    "SmolLM2-135M": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 0,
        "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536, "is_llama_config": true, "max_position_embeddings": 8192, "model_type": "llama",
        "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_interleaved": false, "rope_scaling": null, "rope_theta": 100000,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": true,
        "vocab_size": 49152
    }
}""")
WITH_MORE_KEYS["Qwen2.5-0.5B"] = PUBLISHED["Qwen2.5-0.5B-Instruct"] | {"use_mrope": False}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def read(arch: str, **changes: Any) -> Model:
    """The architecture's tiny config, changed."""
    return read_model(archs.load(arch), archs.load(arch).arch.tiny | changes)


def refusal(arch: str, **changes: Any) -> str:
    """The one line that says why a changed config is refused."""
    with pytest.raises(ExportError) as error:
        read(arch, **changes)
    line = str(error.value)
    assert len(line.splitlines()) == 1
    return line


@pytest.mark.parametrize("arch", CLASSES)
def test_every_key_that_transformers_writes_is_understood(arch):
    read_model(archs.load(arch), CLASSES[arch]().to_dict())


@pytest.mark.parametrize("arch", CLASSES)
def test_the_tiny_config_means_to_transformers_what_it_means_here(arch):
    tiny = dict(archs.load(arch).arch.tiny)
    assert read_model(archs.load(arch), CLASSES[arch](**tiny).to_dict()) == read(arch)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_reads_as_what_transformers_makes_of_it(name):
    config = PUBLISHED[name]
    named = archs.choose(None, config)
    assert read_model(named, config) == read_model(named, CLASSES[named.name](**config).to_dict())


@pytest.mark.parametrize("name", WITH_MORE_KEYS)
def test_a_key_that_says_what_is_so_anyway_is_understood(name):
    config = WITH_MORE_KEYS[name]
    named = archs.choose(None, config)
    assert read_model(named, config) == read_model(named, CLASSES[named.name](**config).to_dict())


def test_gemma_2b_is_read_to_the_last_number():
    model = read_model(archs.load("gemma"), PUBLISHED["gemma-2b"])
    layer = model.layers[17]
    assert (model.embedding.vocabulary, model.embedding.hidden, model.embedding.scale) == (256000, 2048, 2048**0.5)
    assert (layer.attention.heads, layer.attention.kv_heads, layer.attention.head_size) == (8, 1, 256)
    assert (layer.mlp.intermediate, layer.mlp.activation) == (16384, "gelu_tanh")
    assert (layer.input_norm.epsilon, layer.input_norm.offset, layer.input_norm.rounding) == (1e-6, 1.0, "after_weight")
    assert (len(model.layers), model.tied, model.rotary.theta) == (18, True, 10000.0)


def test_llama_3_1_scales_its_rope():
    model = read_model(archs.load("llama"), PUBLISHED["Llama-3.1-8B"])
    assert (model.rotary.theta, model.rotary.scaling) == (500000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192))


def test_linear_scaling_is_read_from_its_old_name():
    model = read_model(archs.load("llama"), PUBLISHED["linear scaling"])
    assert (model.rotary.theta, model.rotary.scaling) == (20000.0, LinearScaling(4.0))


@pytest.mark.parametrize(("value", "windows"), [(8, {8}), (None, {None})])
def test_mistral_has_a_window_unless_it_is_null(value, windows):
    assert set(read("mistral", sliding_window=value).windows) == windows


def test_mistral_without_the_key_has_transformers_default_window():
    tiny = dict(archs.load("mistral").arch.tiny)
    del tiny["sliding_window"]
    assert set(read_model(archs.load("mistral"), tiny).windows) == {transformers.MistralConfig().sliding_window}


def windows(**changes: Any) -> list[int | None]:
    return list(read("qwen2", **changes).windows)


def test_qwen2_slides_from_max_window_layers_on():
    assert windows(max_window_layers=2) == [None, None, 8]


def test_qwen2_does_not_slide_unless_told_to():
    assert windows(use_sliding_window=False) == [None, None, None]


def test_qwen2_takes_layer_types_before_max_window_layers():
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows(layer_types=kinds) == [8, None, 8]


def test_qwen2_slides_in_all_layers_from_layer_0_on():
    assert windows(max_window_layers=0) == [8, 8, 8]


@pytest.mark.parametrize("arch", CLASSES)
def test_an_unknown_key_is_named_with_its_value(arch):
    assert "attn_logit_softcapping=50.0" in refusal(arch, attn_logit_softcapping=50.0)


def test_all_unknown_keys_are_named():
    line = refusal("llama", zeta=1, alpha=2)
    assert "alpha=2, zeta=1" in line


def test_an_unknown_key_that_is_null_says_nothing():
    assert read("llama", quantization_config=None) == read("llama")


@pytest.mark.parametrize("key", sorted(HARMLESS))
def test_a_harmless_key_changes_nothing(key):
    assert read("llama", **{key: 1}) == read("llama")


@pytest.mark.parametrize("arch", CLASSES)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("partial_rotary_factor", 0.5),
        ("logits_scaling", 8.0),
        ("embedding_multiplier", 12.0),
        ("residual_multiplier", 0.22),
        ("rope_interleaved", True),
        ("query_pre_attn_scalar", 256),
        ("num_local_experts", 8),
        ("auto_map", {"AutoModelForCausalLM": "modeling_other.Other"}),
    ],
)
def test_a_key_of_a_richer_architecture_is_refused(arch, key, value):
    assert key in refusal(arch, **{key: value})


@pytest.mark.parametrize("arch", ["gemma", "llama", "qwen2"])
def test_a_window_is_refused_where_the_architecture_has_none(arch):
    changes = {"use_sliding_window": True, "swa_layers": 1} if arch == "qwen2" else {"sliding_window": 4096}
    assert list(changes)[-1] in refusal(arch, **changes)


@pytest.mark.parametrize(
    ("arch", "changes", "said"),
    [
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True, only False"),
        ("gemma", {"hidden_act": "silu"}, "hidden_act is 'silu', this architecture knows 'gelu'"),
        ("gemma", {"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
        ("llama", {"hidden_act": "relu2"}, "hidden_act is 'relu2'"),
        ("llama", {"hidden_size": 64.0}, "hidden_size is 64.0, expected a positive integer"),
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
        ("llama", {"head_dim": 15}, "even head size, config.json says 15"),
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


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope", "proportional"])
@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
def test_an_unsupported_rope_scaling_is_refused_by_name(kind, key, field):
    changes = {"rope_parameters": None} | {field: {key: kind, "factor": 2.0}}
    assert f"type '{kind}' is not supported" in refusal("llama", **changes)


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "not understood: partial_rotary_factor"),
        ({"rope_type": "default", "factor": 2.0}, "not understood: factor"),
        ({"rope_type": "linear"}, "factor is None, expected a positive number"),
        ({"rope_type": "linear", "factor": 0}, "factor is 0, expected a positive number"),
        ({"rope_type": "linear", "factor": -2.0}, "factor is -2.0, expected a positive number"),
        ({"rope_type": "linear", "factor": "2"}, "factor is '2', expected a positive number"),
        ({"rope_type": "linear", "type": "llama3", "factor": 2.0}, "of types ['linear', 'llama3']: choose one"),
        ({k: v for k, v in LLAMA3.items() if k != "high_freq_factor"}, "high_freq_factor is None"),
        (LLAMA3 | {"attention_factor": 1.0}, "not understood: attention_factor"),
        ({"full_attention": {"rope_type": "default"}}, "not understood: full_attention"),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4', expected a positive number"),
        ([], "must be objects"),
        ("linear", "must be objects"),
    ],
)
def test_rope_parameters_that_are_not_understood_are_refused(rope, said):
    assert said in refusal("llama", rope_parameters=rope)


def test_rope_theta_is_read_from_beside_rope_scaling():
    rotary = read("llama", rope_parameters=None, rope_theta=12345.0).rotary
    assert (rotary.theta, rotary.scaling) == (12345.0, None)


def test_rope_theta_in_rope_parameters_wins_as_in_transformers():
    config = dict(archs.load("llama").arch.tiny) | {"rope_theta": 12345.0}
    assert transformers.LlamaConfig(**config).rope_parameters["rope_theta"] == 500000.0
    assert read_model(archs.load("llama"), config).rotary.theta == 500000.0


def test_rope_parameters_and_rope_scaling_that_disagree_are_refused():
    config = {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    assert transformers.LlamaConfig(**config).rope_parameters["rope_theta"] == 10000.0
    assert "rope_scaling" in refusal("llama", **config)


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


JUNK = [None, True, False, -1, 0, 1, 3, 1.5, -0.5, "", "x", "silu"]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data(), arch=st.sampled_from(sorted(CLASSES)))
def test_any_value_of_any_key_gives_a_model_or_our_error(data, arch):
    keys = [k for k in CLASSES[arch]().to_dict() if k not in HARMLESS]
    key = data.draw(st.sampled_from([*keys, "rope_scaling", "rope_theta", "hidden_activation", "layer_types"]))
    changes = {key: data.draw(st.sampled_from(JUNK))}
    try:
        read(arch, **changes)
    except ExportError as error:
        line = str(error)
    else:
        line = ""
    assert len(line.splitlines()) <= 1


def test_a_key_is_read_with_its_default_where_it_is_absent_or_null():
    config = Config({"null": None})
    assert (config.get("absent", 3), config.get("null", 4)) == (3, 4)


def test_a_key_without_a_default_must_be_there():
    with pytest.raises(ExportError, match="no 'hidden_size'"):
        Config({}).integer("hidden_size")


def test_finish_accepts_a_config_whose_every_key_was_read():
    config = Config({"a": 1, "dtype": "bfloat16"})
    config.get("a")
    config.finish()


def test_the_config_that_came_in_stays_as_it_was():
    config = {**archs.load("llama").arch.tiny, "rope_parameters": dict(LLAMA3)}
    read_model(archs.load("llama"), config)
    assert config["rope_parameters"] == LLAMA3
