"""What every architecture is tested on: one row a variant. A new architecture adds a row."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from llmexport.export import archs
from llmexport.export.config import Config


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
    Case("qwen2_moe", "qwen2_moe"),
    Case("qwen2_moe", "qwen2_moe-sliding", {
        "use_sliding_window": True, "sliding_window": 8, "norm_topk_prob": True, "decoder_sparse_step": 2,
        "mlp_only_layers": [],
    }),
    Case("bert", "bert"),
    Case("bert", "bert-relu-untied", {
        "hidden_act": "relu", "tie_word_embeddings": False, "layer_norm_eps": 0.1, "type_vocab_size": 1,
    }),
)  # fmt: skip
MATRIX = 4096  # bytes that the matrices of tiny models have at least, and their norms, biases and convolutions have not
PRIMARY = ("gemma", "glm4", "gpt_oss", "llama4", "qwen3_5_moe")  # the families that the project exists for
# Families that are tested whole in every session: each form of a block occurs in one of them. The first case of every
# other one meets transformers in every session (`every_family`), and its other tests are slow.
EVERY_TIME = frozenset({
    "bert", "cohere", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt_oss", "llama", "llama4", "mistral",
    "mixtral", "olmo", "olmo2", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_5", "qwen3_5_moe",
})  # fmt: skip
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


def carries(case: Case) -> bool:
    """Whether a step of the model reads what earlier ones left, as a decoder's does and an encoder's does not."""
    arch = archs.load(case.arch)
    return any(g.carried for g in arch.build(Config({**arch.tiny, **case.changes})).graphs)


DECODERS, ENCODERS = ([c for c in CASES if carries(c) is carried] for carried in (True, False))


def others_slow(all_of_them: Sequence[Any], at_once: Collection[Any]) -> list[Any]:
    """The parameters of a test that runs those `at_once` in every session, and the others where slow tests run."""
    slow = [p if isinstance(p, tuple) else (p,) for p in all_of_them]
    marked = [pytest.param(*p, marks=pytest.mark.slow) for p in slow]
    return [p if p in at_once else other for p, other in zip(all_of_them, marked, strict=True)]
