"""What every architecture is tested on: one row a variant. A new architecture adds a row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """An architecture's tiny config with `changes`; `name` is what the tests call it."""

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
)  # fmt: skip
FIRST = tuple({c.arch: c for c in reversed(CASES)}.values())[::-1]  # one case an architecture
