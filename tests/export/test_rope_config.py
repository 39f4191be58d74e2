"""RoPE in config.json: every form that was published, and no other."""

import copy
import itertools
import math

import pytest
import torch
import transformers
from arch_cases import DECODERS
from huggingface_hub.errors import StrictDataclassError
from published_configs import PUBLISHED
from tiny_configs import everywhere, placed_layers, read, refusal, rotary
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmexport.export import archs, blocks
from llmexport.export.blocks.context import inverse_frequencies
from llmexport.export.errors import ExportError
from llmexport.export.onnx_file import read_model, read_noted
from llmexport.export.rope import ORIGINAL
from llmexport.export.spec import DynamicScaling, LinearScaling, Llama3Scaling, LongScaling, Rotary, YarnScaling
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import Tolerance

# Architectures whose positions turn queries and keys.
TURNING = sorted({c.arch for c in DECODERS if any(isinstance(s.block, Rotary) for s in read(c.arch).steps)})
# These have keys of their own for it.
SCALED = [a for a in TURNING if a not in ("chatglm", "chatglm_6b", "internlm", "openelm", "qwen")]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 64,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0],
}
MULTI = {"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25}
MAGNITUDE = 0.1 * math.log(32.0) + 1.0  # arXiv 2309.00071, of a factor of 32


def of_llama(**rope: object) -> Rotary:
    return rotary(read("llama", rope_parameters=rope))


def test_llama3_scaling_is_read():
    assert of_llama(**LLAMA3) == Rotary(16, 500000.0, Llama3Scaling(8.0, 1.0, 4.0, 64))


def test_linear_scaling_is_read():
    assert of_llama(rope_type="linear", rope_theta=20000.0, factor=4.0) == Rotary(16, 20000.0, LinearScaling(4.0))


def test_dynamic_scaling_is_read():
    expected = Rotary(16, 20000.0, DynamicScaling(4.0, 512))
    assert of_llama(rope_type="dynamic", rope_theta=20000.0, factor=4.0, **{ORIGINAL: 64}) == expected
    # transformers passes over the original length too.
    theirs = transformers.LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 4.0, ORIGINAL: 64})
    [steps, _] = ROPE_INIT_FUNCTIONS["dynamic"](theirs, torch.device("cpu"), seq_len=2048)
    assert_alike(inverse_frequencies(Rotary(128, 10000.0)), steps)


def test_dynamic_scaling_of_two_dimensions_has_no_base():
    rope = {"rope_type": "dynamic", "factor": 2.0}
    assert "RoPE of type dynamic needs 4 dimensions" in refusal("llama", head_dim=2, rope_parameters=rope)


@pytest.mark.parametrize("factor", [1.1, 2.0, 6.0])
def test_dynamic_steps_are_those_of_transformers_at_every_length(factor):
    rope = {"rope_type": "dynamic", "rope_theta": 50000.0, "factor": factor}
    config = transformers.LlamaConfig(**{**archs.load("llama").tiny, "rope_parameters": rope})
    ours = blocks.module(of_llama(**rope), torch.float32)
    for length in (1, 511, 512, 513, 600, 5000, 200_000):
        steps, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, torch.device("cpu"), seq_len=torch.tensor(length))
        # A step of 0 and more, at the last of so many positions.
        cos, sin = ours(torch.tensor([[1, length - 1]]))
        assert_alike(torch.atan2(sin, cos)[0, 0], steps if length > 512 else ours.steps)


def test_yarn_is_read():
    scaling = YarnScaling(32.0, 64, 32.0, 1.0, truncate=False, magnitude=MAGNITUDE)
    assert of_llama(**YARN) == Rotary(16, 150000.0, scaling)


def test_yarn_has_the_defaults_of_its_paper():
    said = {k: YARN[k] for k in ("rope_type", "rope_theta", "factor", "original_max_position_embeddings")}
    scaling = YarnScaling(32.0, 64, fast=32.0, slow=1.0, truncate=True, magnitude=MAGNITUDE)
    assert of_llama(**said) == Rotary(16, 150000.0, scaling)


def test_a_factor_of_yarn_that_stretches_nothing_scales_nothing():
    assert of_llama(**YARN | {"factor": 1.0}).scaling.magnitude == 1.0


@pytest.mark.parametrize("rope", [YARN, LONG], ids=lambda r: r["rope_type"])
def test_an_attention_factor_is_the_magnitude(rope):
    assert of_llama(**rope, attention_factor=1.25).scaling.magnitude == 1.25


def test_longrope_is_read():
    # 512 positions are 8 times the original 64.
    magnitude = math.sqrt(1 + math.log(8) / math.log(64))
    short, long = tuple(LONG["short_factor"]), tuple(LONG["long_factor"])
    assert of_llama(**LONG) == Rotary(16, 10000.0, LongScaling(short, long, 64, magnitude))


def test_phi_3_5_moe_says_the_magnitudes_of_short_and_of_long_texts():
    short, long = tuple(LONG["short_factor"]), tuple(LONG["long_factor"])
    rope = LONG | {"short_mscale": 1.1, "long_mscale": 1.3}
    assert rotary(read("phimoe", rope_parameters=rope, **{ORIGINAL: 64})).scaling == LongScaling(
        short, long, 64, 1.1, 1.3
    )
    rope["long_mscale"] = 1.1
    assert rotary(read("phimoe", rope_parameters=rope, **{ORIGINAL: None})).scaling == LongScaling(short, long, 64, 1.1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"short_mscale": None}, "RoPE's short_mscale is None, expected a positive number"),
        ({"long_mscale": "1"}, "RoPE's long_mscale is '1', expected a positive number"),
        ({"attention_factor": 1.2}, "not understood: attention_factor"),
        ({"rope_type": "su"}, "type 'su' is not supported here, default, longrope with mscales are"),
        ({ORIGINAL: 32}, f"says {ORIGINAL} twice, 32 and 64"),
    ],
)
def test_another_longrope_of_phi_3_5_moe_is_refused(changes, said):
    rope = LONG | {"short_mscale": 1.1, "long_mscale": 1.3} | changes
    assert said in refusal("phimoe", rope_parameters=rope, **{ORIGINAL: 64})


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_phi_3_calls_longrope_by_its_old_names(name):
    rope = {k: v for k, v in LONG.items() if k != "rope_type"} | {"type": name}
    assert rotary(read("phi3", rope_parameters=rope, original_max_position_embeddings=64)) == of_llama(**LONG)


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_phi_3_knows_longrope_alone(kind):
    rope = LLAMA3 | {"rope_type": kind, ORIGINAL: 512}
    with pytest.raises(StrictDataclassError, match="must be one of"):
        transformers.Phi3Config(rope_parameters=dict(rope))
    assert f"type '{kind}' is not supported here, default, longrope are" in refusal("phi3", rope_parameters=rope)


def test_phi_3_has_the_original_length_beside_longrope():
    rope = {k: v for k, v in LONG.items() if k != ORIGINAL}
    assert rotary(read("phi3", rope_parameters=rope, **{ORIGINAL: 64})).scaling.original_positions == 64
    assert f"says {ORIGINAL} twice, 64 and 512" in refusal("phi3", rope_parameters=LONG)


def test_phi_3_of_an_original_length_within_longrope_alone_is_refused():
    config = dict(archs.load("phi3").tiny) | {"rope_parameters": dict(LONG)}
    del config[ORIGINAL]
    # transformers overwrites it with the default of its class.
    assert transformers.Phi3Config(**copy.deepcopy(config)).rope_parameters[ORIGINAL] == 4096
    with pytest.raises(ExportError, match="twice, 64 and 4096"):
        read_model(archs.load("phi3"), config)


def test_the_original_length_beside_longrope_is_refused_in_other_architectures():
    rope = {k: v for k, v in LONG.items() if k != ORIGINAL}
    config = dict(archs.load("llama").tiny) | {"rope_parameters": rope, ORIGINAL: 64}
    # transformers takes max_position_embeddings.
    assert transformers.LlamaConfig(**copy.deepcopy(config)).rope_parameters[ORIGINAL] == 512
    assert f"{ORIGINAL}=64" in refusal("llama", rope_parameters=rope, **{ORIGINAL: 64})


@pytest.mark.parametrize("rope", [YARN, LONG, LLAMA3], ids=lambda r: r["rope_type"])
def test_the_original_length_that_is_not_said_is_the_longest_one_as_for_transformers(rope):
    said = {k: v for k, v in rope.items() if k != ORIGINAL}
    assert (
        transformers.LlamaConfig(rope_parameters=dict(said), max_position_embeddings=96).rope_parameters[ORIGINAL] == 96
    )
    tiny = dict(archs.load("llama").tiny) | {"rope_parameters": said, "max_position_embeddings": 96}
    model, [note] = read_noted(archs.load("llama"), tiny)
    assert rotary(model).scaling.original_positions == 96
    assert "max_position_embeddings, 96, is taken" in note
    del tiny["max_position_embeddings"]
    with pytest.raises(ExportError, match="no 'max_position_embeddings'"):
        read_model(archs.load("llama"), tiny)


def test_an_attn_factor_is_left_out_as_by_transformers_and_noted():
    config = dict(archs.load("llama").tiny) | {"rope_parameters": YARN | {"attn_factor": 0.5}}
    theirs = transformers.LlamaConfig(**copy.deepcopy(config))
    found = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")[1]
    model, [note] = read_noted(archs.load("llama"), config)
    assert rotary(model).scaling.magnitude == found == MAGNITUDE
    assert "attn_factor 0.5 is left out" in note


@pytest.mark.parametrize(
    "rope",
    [
        YARN | {"finetuned": True},
        YARN | {"partial_rotary_factor": 1.0},
        {"rope_type": "default", "rope_theta": 10000.0, "factor": 1.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0, ORIGINAL: 64},
    ],
)
def test_a_key_of_rope_that_nothing_reads_or_that_changes_nothing_is_passed_over(rope):
    config = transformers.LlamaConfig(**dict(archs.load("llama").tiny) | {"rope_parameters": dict(rope)})
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    assert_alike(inverse_frequencies(of_llama(**rope)), theirs.inv_freq)


@pytest.mark.parametrize("said", [{}, {"rope_theta": 150000.0}, {"rope_scaling": {}}])
def test_gpt_oss_that_says_nothing_of_rope_is_refused(said):
    # transformers fills in YaRN.
    assert transformers.GptOssConfig(**copy.deepcopy(said)).rope_parameters["rope_type"] == "yarn"
    assert "says nothing of RoPE" in refusal("gpt_oss", rope_parameters=None, **said)


def test_a_share_of_a_head_that_leaves_no_dimension_is_refused():
    rope = {"partial_rotary_factor": 0.01}
    assert "even number of dimensions above 0, config.json makes it 0" in refusal("glm4", rope_parameters=rope)


def test_a_share_of_the_head_turns():
    for changes in ({"rope_parameters": {"partial_rotary_factor": 0.25}}, {"partial_rotary_factor": 0.25}):
        model = read("glm4", **{"rope_parameters": {}} | changes)
        assert rotary(model).size == placed_layers(model)[0].mixer.turned == 4


def test_mrope_has_the_sections_of_the_config_or_those_of_the_family():
    assert rotary(read("qwen3_5_moe")).sections == (2, 1, 1)
    assert rotary(read("qwen3_5_moe", head_dim=256, rope_parameters=MULTI)).sections == (11, 11, 10)


@pytest.mark.parametrize("sections", [[2, 1, 2], [4], [2, 2], [1, 1, 1, 1], [0, 0, 0]])
def test_sections_of_mrope_that_do_not_make_a_head_are_refused(sections):
    line = refusal("qwen3_5_moe", rope_parameters=MULTI | {"mrope_section": sections})
    assert f"mrope_section is {sections}: 3 numbers of sum 4 are expected" in line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mrope_section": 4}, "mrope_section is 4, expected a list of sizes"),
        ({"mrope_section": [2, 1, "1"]}, "mrope_section is [2, 1, '1'], expected a list of sizes"),
        ({"mrope_section": [2, 3, -1]}, "mrope_section is [2, 3, -1], expected a list of sizes"),
        ({"mrope_interleaved": False}, "mrope_interleaved is not true"),
    ],
)
def test_another_layout_of_mrope_is_refused(changes, said):
    assert said in refusal("qwen3_5_moe", rope_parameters=MULTI | {"mrope_section": [2, 1, 1]} | changes)


@pytest.mark.parametrize("arch", [a for a in TURNING if not a.startswith("qwen3_5")])
def test_sections_are_refused_where_a_token_has_one_position(arch):
    assert "mrope_section" in refusal(arch, rope_parameters=everywhere(arch, {"mrope_section": [4, 2, 2]}))


def test_gemma_3_has_a_rope_for_each_kind_of_layer():
    found = [next(b for b in layer.reads if isinstance(b, Rotary)) for layer in placed_layers(read("gemma3_text"))]
    local, scaled = Rotary(32, 10000.0), Rotary(32, 1000000.0, LinearScaling(8.0))
    assert found == [local, scaled, local]


def test_gemma_3_of_the_first_release_scales_full_layers_alone():
    old = {"rope_theta": 500000, "rope_local_base_freq": 20000, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    layers = placed_layers(read("gemma3_text", rope_parameters=None, **old))
    found = [next(b for b in layer.reads if isinstance(b, Rotary)) for layer in layers]
    assert found[:2] == [Rotary(32, 20000.0), Rotary(32, 500000.0, LinearScaling(8.0))]
    config = transformers.Gemma3TextConfig(**archs.load("gemma3_text").tiny | {"rope_parameters": None} | old)
    assert placed_layers(read_model(archs.load("gemma3_text"), config.to_dict())) == layers


BOTH = {"sliding_attention": {"rope_type": "default"}, "full_attention": {"rope_type": "default"}}


def test_gemma_3_looks_for_the_theta_of_each_kind_at_its_own_place():
    outer = {"rope_parameters": BOTH, "rope_theta": 500000.0, "rope_local_base_freq": 20000.0}
    layers = placed_layers(read("gemma3_text", **outer))
    found = [next(b for b in layer.reads if isinstance(b, Rotary)) for layer in layers]
    assert found[:2] == [Rotary(32, 20000.0), Rotary(32, 500000.0)]
    config = transformers.Gemma3TextConfig(**copy.deepcopy(dict(archs.load("gemma3_text").tiny) | outer))
    assert {k: v["rope_theta"] for k, v in config.rope_parameters.items()} == {
        "sliding_attention": 20000.0,
        "full_attention": 500000.0,
    }


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_theta": 1e6},
        BOTH | {"rope_theta": 777.0},
        BOTH | {"chunked_attention": {"rope_type": "default"}},
        {"full_attention": {"rope_type": "default"}},
        BOTH | {"full_attention": None},
    ],
)
def test_gemma_3_is_refused_unless_rope_parameters_are_of_its_two_kinds(rope):
    assert "one object each for sliding_attention and full_attention alone" in refusal(
        "gemma3_text", rope_parameters=rope
    )


@pytest.mark.parametrize("rope", [YARN, LLAMA3, LONG], ids=lambda r: r["rope_type"])
def test_gemma_3_of_a_rope_that_none_is_published_with_is_refused(rope):
    line = refusal("gemma3_text", rope_parameters=BOTH | {"full_attention": rope})
    assert f"type '{rope['rope_type']}' is not supported here, default, linear are" in line


@pytest.mark.parametrize("kind", ["ntk", "proportional", "mrope", ""])
def test_an_unsupported_rope_scaling_is_refused_by_name_in_every_architecture(kind):
    keys, fields = ("rope_type", "type"), ("rope_parameters", "rope_scaling")
    for arch, key, field in itertools.product(SCALED, keys, fields):
        rope, said = {key: kind, "factor": 2.0}, f"type '{kind}' is not supported"
        if (arch, kind) == ("gemma4_text", "proportional"):
            continue
        if field == "rope_parameters":
            rope = everywhere(arch, rope)
        elif arch == "gemma4_text":
            said = "config.json has no 'rope_parameters'"
        elif arch in ("gemma3_text", "olmo3") and key == "type":
            said = f"of types ['default', '{kind}']: choose one"
        assert said in refusal(arch, **{"rope_parameters": None, field: rope}), (arch, key, field)


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "not understood: partial_rotary_factor"),
        ({"rope_type": "default", "factor": 2.0}, "not understood: factor"),
        ({"rope_type": "linear"}, "factor is None, expected a positive number"),
        ({"rope_type": "dynamic"}, "factor is None, expected a positive number"),
        ({"rope_type": "linear", "factor": 0}, "factor is 0, expected a positive number"),
        ({"rope_type": "linear", "factor": -2.0}, "factor is -2.0, expected a positive number"),
        ({"rope_type": "linear", "factor": "2"}, "factor is '2', expected a positive number"),
        ({"rope_type": "linear", "type": "llama3", "factor": 2.0}, "of types ['linear', 'llama3']: choose one"),
        ({k: v for k, v in LLAMA3.items() if k != "high_freq_factor"}, "high_freq_factor is None"),
        (LLAMA3 | {"attention_factor": 1.0}, "not understood: attention_factor"),
        ({k: v for k, v in YARN.items() if k != "factor"}, "factor is None, expected a positive number"),
        (YARN | {ORIGINAL: None}, "original_max_position_embeddings is None"),
        (YARN | {"truncate": 1}, "truncate is 1, expected true or false"),
        (YARN | {"beta_fast": -1}, "beta_fast is -1, expected a positive number"),
        (YARN | {"mscale": -1.0, "mscale_all_dim": 1.0}, "RoPE's mscale is -1.0, expected a positive number"),
        (LLAMA3 | {"attn_factor": 1.0}, "not understood: attn_factor"),
        (YARN | {"attention_factor": 0}, "attention_factor is 0, expected a positive number"),
        (LONG | {"short_factor": [1.0] * 7}, "short_factor must list 8 numbers"),
        (LONG | {"long_factor": None}, "long_factor must list 8 numbers"),
        (LONG | {"long_factor": [0.0] * 8}, "long_factor is 0.0, expected a positive number"),
        (LONG | {ORIGINAL: None}, "original_max_position_embeddings is None"),
        (LONG | {"original_max_position_embeddings": 1}, "embeddings is 1, expected an integer of at least 2"),
        ({"rope_theta": None}, "rope_theta is None, expected a positive number"),
        ({"rope_theta": 1.0}, "rope_theta is 1.0, expected a number above 1"),
        (YARN | {"rope_theta": 0.5}, "rope_theta is 0.5, expected a number above 1"),
        (YARN | {"beta_fast": 5e-324}, "beta_fast is 5e-324, expected a number from 1e-30 to 1e+30"),
        ({"rope_type": None}, "type None is not supported"),
        ({"full_attention": {"rope_type": "default"}}, "not understood: full_attention"),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4', expected a positive number"),
        ([], "must be objects"),
        ("linear", "must be objects"),
    ],
)
def test_rope_parameters_that_are_not_understood_are_refused(rope, said):
    assert said in refusal("llama", rope_parameters=rope)


def test_rope_theta_is_read_from_beside_rope_scaling():
    assert rotary(read("llama", rope_parameters=None, rope_theta=12345.0)) == Rotary(16, 12345.0)


def test_a_theta_that_is_said_twice_is_read_once():
    assert rotary(read("llama", rope_theta=500000.0)) == rotary(read("llama"))


def test_two_thetas_that_disagree_are_refused():
    config = copy.deepcopy(dict(archs.load("llama").tiny)) | {"rope_theta": 12345.0}
    # transformers passes over one of them in silence.
    assert transformers.LlamaConfig(**config).rope_parameters["rope_theta"] == 500000.0
    assert "rope_theta twice, 500000.0 and 12345.0" in refusal("llama", rope_theta=12345.0)


def test_rope_parameters_and_rope_scaling_that_disagree_are_refused():
    config = {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    assert transformers.LlamaConfig(**config).rope_parameters["rope_theta"] == 10000.0
    assert "rope_scaling" in refusal("llama", **config)


def assert_alike(steps: torch.Tensor, expected: torch.Tensor) -> None:
    # Powers, quotients and one product: a few roundings of fp32, relative to each step as compared in ratios.
    eps = torch.finfo(torch.float32).eps
    ratios = (steps.double() / expected.double()).numpy()
    assert compare(torch.ones(len(steps)).numpy(), ratios).excess(Tolerance(4 * eps, 4 * eps)) <= 1


# Every type of RoPE, as some published model has it.
TURNED = {
    "linear scaling": "linear",
    "Llama-3.1-8B": "llama3",
    "gpt-oss-20b": "yarn",
    "Phi-3-mini-128k-instruct": "longrope",
}


@pytest.mark.parametrize("name", TURNED)
def test_frequencies_are_those_of_transformers(name):
    config = copy.deepcopy(PUBLISHED[name])
    found = rotary(read_model(archs.choose(None, config), config))
    theirs = transformers.CONFIG_MAPPING[config["model_type"]](**config)
    beyond = {"seq_len": 131072} if isinstance(found.scaling, LongScaling) else {}
    expected, magnitude = ROPE_INIT_FUNCTIONS[TURNED[name]](theirs, torch.device("cpu"), **beyond)
    steps = inverse_frequencies(found)
    steps = steps[1] if beyond else steps
    assert_alike(steps, expected)
    assert getattr(found.scaling, "magnitude", 1.0) == magnitude
