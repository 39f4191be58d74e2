"""What every architecture is tested on: one row a variant. A new architecture adds a row."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from llmexport.export import archs
from llmexport.export.config import Config
from llmexport.export.spec import PAST, Use


@dataclass(frozen=True)
class Case:
    """An architecture's tiny config with `changes`, those of a `vision_config` in its own; `name` is what the tests
    call it."""

    arch: str
    name: str
    changes: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("gemma", "gemma"),
    Case("gemma", "gemma-gqa", {"num_key_value_heads": 2, "num_attention_heads": 6}),
    Case("llama", "llama"),
    Case("llama", "llama-plain-bias-tied", {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4,
    }),
    Case("llama", "llama-linear-rope", {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    }),
    Case("mistral", "mistral"),
    Case("mistral", "mistral-no-window", {"sliding_window": None}),
    Case("qwen2", "qwen2"),
    Case("qwen2", "qwen2-full", {"use_sliding_window": False, "tie_word_embeddings": False}),
    Case("glm4", "glm4"),
    Case("glm4", "glm4-no-bias", {"attention_bias": False, "num_key_value_heads": 1}),
    Case("gpt_oss", "gpt_oss"),
    Case("gpt_oss", "gpt_oss-many-experts", {
        "num_local_experts": 16, "num_experts_per_tok": 4, "attention_bias": False, "num_key_value_heads": 4,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    }),
    Case("llama4", "llama4"),
    Case("llama4", "llama4-maverick", {
        "use_qk_norm": False, "num_local_experts": 8, "num_experts_per_tok": 2, "moe_layers": [0, 3],
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "attention_bias": True,
        "attn_temperature_tuning": False, "no_rope_layers": [1, 0, 1, 0],
    }),
    Case("qwen3_5", "qwen3_5"),
    Case("qwen3_5", "qwen3_5-tied", {
        "tie_word_embeddings": True, "linear_num_value_heads": 6, "num_key_value_heads": 1,
    }),
    Case("qwen3_5_moe", "qwen3_5_moe"),
    Case("qwen3_5_moe", "qwen3_5_moe-other-heads", {
        "linear_num_key_heads": 4, "linear_value_head_dim": 32, "linear_conv_kernel_dim": 3, "attention_bias": True,
        "num_experts": 16, "num_experts_per_tok": 4, "layer_types": ["full_attention", "linear_attention"] * 2,
    }),
    Case("olmo2", "olmo2", {"num_key_value_heads": 2}),
    Case("cohere", "cohere"),
    Case("cohere", "cohere-qk-norm", {"use_qk_norm": True, "attention_bias": True}),
    Case("glm", "glm"),
    Case("gemma2", "gemma2"),
    Case("gemma2", "gemma2-no-caps", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    Case("gemma3_text", "gemma3_text"),
    Case("gemma4_text", "gemma4_text"),
    Case("gemma4_text", "gemma4_text-experts", {
        "enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 32,
        "attention_k_eq_v": False, "use_bidirectional_attention": "vision", "final_logit_softcapping": None,
    }),
    Case("gemma4_text", "gemma4_text-shared-keys", {
        "hidden_size_per_layer_input": 16, "num_hidden_layers": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"], "num_kv_shared_layers": 3,
        "per_layer_config": {"1": {"head_dim": 64}, "3": {"head_dim": 64}, "4": {"head_dim": 64}},
        "use_double_wide_mlp": True, "attention_k_eq_v": False, "num_key_value_heads": 1,
    }),
    Case("qwen3", "qwen3"),
    Case("phi3", "phi3"),
    # generate makes the cache anew where the factors change, so no prompt of the tests crosses that point.
    Case("phi3", "phi3-longrope-long", {
        "original_max_position_embeddings": 24, "max_position_embeddings": 512, "sliding_window": None,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 24,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], "long_factor": [1.0, 2, 3, 4, 5, 6, 7, 8],
        },
    }),
    Case("phi3", "phi3-longrope-short", {
        "original_max_position_embeddings": 400, "max_position_embeddings": 512, "sliding_window": None,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 400,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], "long_factor": [1.0, 2, 3, 4, 5, 6, 7, 8],
        },
    }),
    Case("olmo", "olmo"),
    Case("olmo", "olmo-no-clip", {"clip_qkv": None, "num_key_value_heads": 4}),
    Case("mixtral", "mixtral"),
    Case("phimoe", "phimoe"),
    # As phi3's, no prompt crosses the point where the factors change.
    Case("phimoe", "phimoe-long-plain", {
        "original_max_position_embeddings": 24, "attention_bias": False, "lm_head_bias": False, "sliding_window": 8,
        "num_local_experts": 16, "router_jitter_noise": 0.01,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 24,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], "long_factor": [1.0, 2, 3, 4, 5, 6, 7, 8],
            "short_mscale": 1.1, "long_mscale": 1.25,
        },
    }),
    Case("phimoe", "phimoe-short", {
        "original_max_position_embeddings": 400,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 400,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], "long_factor": [1.0, 2, 3, 4, 5, 6, 7, 8],
            "short_mscale": 1.1, "long_mscale": 1.25,
        },
    }),
    Case("qwen2_moe", "qwen2_moe"),
    Case("qwen2_moe", "qwen2_moe-sliding", {
        "use_sliding_window": True, "sliding_window": 8, "norm_topk_prob": True, "decoder_sparse_step": 2,
        "mlp_only_layers": [],
    }),
    Case("qwen3_moe", "qwen3_moe"),
    Case("olmo3", "olmo3"),
    Case("granite", "granite"),
    Case("smollm3", "smollm3"),
    Case("seed_oss", "seed_oss"),
    Case("ernie4_5", "ernie4_5"),
    Case("hunyuan_v1_dense", "hunyuan_v1_dense"),
    Case("cohere2", "cohere2"),
    Case("glm4_moe", "glm4_moe"),
    Case("minimax_m2", "minimax_m2"),
    Case("qwen3_next", "qwen3_next"),
    Case("ministral3", "ministral3"),
    Case("rwkv", "rwkv"),
    Case("rwkv", "rwkv-not-rescaled", {"rescale_every": 0, "intermediate_size": None}),
    Case("rwkv7", "rwkv7"),
    Case("rwkv7", "rwkv7-tied-plain-norms", {
        "norm_first": False, "norm_bias": False, "tie_word_embeddings": True, "head_dim": 32,
        "intermediate_size": None, "hidden_ratio": 2.5, "num_hidden_layers": 2,
    }),
    Case("deepseek_v2", "deepseek_v2"),
    Case("deepseek_v2", "deepseek_v2-lite-bias", {
        "topk_method": "greedy", "n_group": 1, "topk_group": 1, "q_lora_rank": None, "attention_bias": True,
        "mlp_bias": True, "routed_scaling_factor": 1.0,
    }),
    Case("deepseek_v3", "deepseek_v3"),
    Case("deepseek_v3", "deepseek_v3-no-groups-bias", {
        "n_group": 1, "topk_group": 1, "q_lora_rank": None, "attention_bias": True, "rope_interleave": False,
        "norm_topk_prob": False, "first_k_dense_replace": 0, "n_shared_experts": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    }),
    Case("glm4_moe_lite", "glm4_moe_lite"),
    Case("glm4_moe_lite", "glm4_moe_lite-halves", {
        "rope_interleave": False, "q_lora_rank": None, "attention_bias": True, "n_group": 2,
        "mlp_layer_types": ["sparse", "dense", "sparse"],
    }),
    Case("kimi_linear", "kimi_linear"),
    Case("bert", "bert"),
    Case("bert", "bert-relu-untied", {
        "hidden_act": "relu", "tie_word_embeddings": False, "layer_norm_eps": 0.1, "type_vocab_size": 1,
    }),
    Case("gpt2", "gpt2"),
    Case("gpt2", "gpt2-scales-untied", {
        "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True,
        "n_inner": 96, "activation_function": "relu", "tie_word_embeddings": False,
    }),
    Case("t5", "t5"),
    Case("t5", "t5-gated-unscaled", {
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_layers": 2,
    }),
    Case("openai_gpt", "openai_gpt"),
    Case("gpt_neo", "gpt_neo"),
    Case("opt", "opt"),
    Case("opt", "opt-350m", {"do_layer_norm_before": False, "word_embed_proj_dim": 48}),
    Case("opt", "opt-galactica", {
        "activation_function": "gelu", "enable_bias": False, "layer_norm_elementwise_affine": False,
    }),
    Case("starcoder2", "starcoder2"),
    Case("deberta", "deberta"),
    Case("deberta", "deberta-placed-types", {
        "position_biased_input": True, "type_vocab_size": 3, "pos_att_type": ["c2p"], "tie_word_embeddings": False,
    }),
    Case("deberta_v2", "deberta_v2"),
    Case("deberta_v2", "deberta_v2-apart", {
        "share_att_key": False, "norm_rel_ebd": "none", "position_buckets": -1, "max_relative_positions": -1,
    }),
    Case("bloom", "bloom"),
    Case("bloom", "bloom-normed-residual", {
        "apply_residual_connection_post_layernorm": True, "tie_word_embeddings": False, "n_head": 8,
    }),
    Case("falcon", "falcon"),
    Case("falcon", "falcon-40b", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    Case("falcon", "falcon-11b", {
        "new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1,
        "tie_word_embeddings": False,
    }),
    Case("falcon", "falcon-rw", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    Case("gpt_neox", "gpt_neox"),
    Case("gpt_neox", "gpt_neox-serial", {
        "use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_fast", "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    }),
    Case("phi", "phi"),
    Case("phi", "phi-qk-norm", {"qk_layernorm": True, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    Case("stablelm", "stablelm"),
    Case("stablelm", "stablelm-12b", {"qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": False}),
    Case("baichuan", "baichuan"),
    Case("baichuan", "baichuan-rope", {"max_position_embeddings": 512}),
    Case("internlm", "internlm"),
    Case("internlm", "internlm-no-bias", {"bias": False, "rotary": {"base": 10000, "type": "origin"}}),
    Case("internlm2", "internlm2"),
    Case("internlm3", "internlm3"),
    Case("internlm3", "internlm3-bias", {"bias": True, "qkv_bias": True}),
    Case("qwen", "qwen"),
    Case("chatglm", "chatglm"),
    Case("chatglm", "chatglm-no-bias", {"add_qkv_bias": False, "multi_query_group_num": 1}),
    Case("chatglm_6b", "chatglm_6b"),
    Case("internlm2", "internlm2-bias", {
        "bias": True, "num_key_value_heads": 4, "max_position_embeddings": 24,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.5},
    }),
    Case("grok", "grok"),
    Case("openelm", "openelm"),
    Case("yuan", "yuan"),
)  # fmt: skip
MATRIX = 4096  # bytes that the matrices of tiny models have at least, and their norms, biases and convolutions have not
# Graphs of these compute with weights alone, norms of rows and of a table, and are built with their weights inside.
COMPUTED = ("baichuan", "deberta", "deberta_v2")
UNBOUND = "cannot be done where it is bound: build the engine with its weights inside$"
SLOTS = 96  # of static caches: more than any tiny window or what tests write; one number, as traces are then shared
FEW_MATRICES = ("openelm",)  # each layer is a block of its own, of four matrices
# Families whose caches hold latents, and no keys and values.
LATENTS = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_linear")
PRIMARY = ("gemma", "glm4", "gpt_oss", "llama4", "qwen3_5_moe")  # the families that the project exists for
# Families that are tested whole in every session. The first case of every other one meets its reference in each
# (`every_family`), and its other tests are slow.
EVERY_TIME = frozenset({
    "bert", "cohere", "gemma", "gemma2", "gemma3_text", "glm4", "gpt_oss", "llama", "llama4", "mistral", "phi3",
    "qwen2", "qwen2_moe", "qwen3_5", "qwen3_5_moe",
})  # fmt: skip
# Architectures whose checkpoints a class of transformers loads as they are.
IN_TRANSFORMERS = [n for n in archs.names() if not archs.load(n).reference.made_by]
# One case an architecture, and those of the families of EVERY_TIME.
FIRST = tuple({c.arch: c for c in reversed(CASES)}.values())[::-1]
FIRST_EVERY_TIME = tuple(c for c in FIRST if c.arch in EVERY_TIME)
# Those whose multimodal checkpoints are exported whole: the text model, and what sees.
TOWERS = tuple(c for c in FIRST if any(m.tower for m in archs.load(c.arch).multimodal))
# Every session tries the one half of them in fp16 and the other in bf16; slow tests try both in both.
IN_FP16, IN_BF16 = FIRST[::2], FIRST[1::2]
# Each of them in one dtype, and every dtype in some.
ONCE = tuple((case, ("float32", "bfloat16", "float16", "float32")[i % 4]) for i, case in enumerate(FIRST))


def in_each_dtype(
    cases: Sequence[Case], dtypes: Sequence[str] = ("float32", "float16", "bfloat16")
) -> list[tuple[Case, str]]:
    """Each case in each dtype; of a family that is not tested whole in every session, the first one in one dtype."""
    once = {c: d if d in dtypes else dtypes[0] for c, d in ONCE}
    return [(c, d) for d in dtypes for c in cases if c.arch in EVERY_TIME or once.get(c) == d]


def carries(case: Case) -> tuple[bool, ...]:
    """Of each graph, whether a step of it reads what earlier ones left, as a decoder's does and an encoder's does
    not."""
    arch = archs.load(case.arch)
    return tuple(bool(g.carried) for g in arch.build(Config({**arch.tiny, **case.changes})).graphs)


# An encoder and a decoder of one model are two graphs; of all others the text model is one.
CARRIES = {c: carries(c) for c in CASES}
DECODERS, ENCODERS, PAIRS = ([c for c in CASES if CARRIES[c] == kind] for kind in ((True,), (False,), (False, True)))
OF_ONE_GRAPH = tuple(c for c in FIRST if c not in PAIRS)


def keeps_keys(case: Case) -> bool:
    """Whether a layer keeps something of each token, and not states of one size alone."""
    arch = archs.load(case.arch)
    graphs = arch.build(Config({**arch.tiny, **case.changes})).graphs
    return any(PAST in p.shape for g in graphs for p in g.assembly.inputs if p.name in g.carried)


KEYED = [c for c in DECODERS if keeps_keys(c)]


def reads(case: Case, use: Use) -> bool:
    """Whether a block of the model reads a value of this use."""
    arch = archs.load(case.arch)
    steps = arch.build(Config({**arch.tiny, **case.changes})).steps
    return any(p.use == use for s in steps for p in s.block.inputs)


def others_slow(all_of_them: Sequence[Any], at_once: Collection[Any]) -> list[Any]:
    """The parameters of a test that runs those `at_once` in every session, and the others where slow tests run."""
    slow = [p if isinstance(p, tuple) else (p,) for p in all_of_them]
    marked = [pytest.param(*p, marks=pytest.mark.slow) for p in slow]
    return [p if p in at_once else other for p, other in zip(all_of_them, marked, strict=True)]
