"""Checkpoints whose mathematics are those of a class of transformers, once their tensors are split and renamed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# What configs of Llama's kin call as Llama does, and the names of a checkpoint that has Llama's.
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "rms_norm_eps",
    "tie_word_embeddings",
)
SAME = {"(.*)": r"\1"}


class Unread(Exception):
    """A checkpoint is not what a reference takes it for."""


def taken(tensors: dict[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors that `names` renames, taken out: a pattern of the whole name (regex) -> the new one (re.sub)."""
    made: dict[str, Tensor] = {}
    for name in [*tensors]:
        for pattern, new in names.items():
            if re.fullmatch(pattern, name):
                made[re.sub(pattern, new, name)] = tensors.pop(name)
                break
    return made


def rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE in the words of transformers 5, from these or from those of versions before it."""
    said = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = said.pop("type", "default")
    return {"rope_type": kind, **said, "rope_theta": float((config.get("rope_parameters") or config)["rope_theta"])}


def split(tensors: dict[str, Tensor], name: str, sizes: list[int], new: list[str]) -> dict[str, Tensor]:
    """A matrix, and its bias if it has one, cut along its rows."""
    made: dict[str, Tensor] = {}
    for end in (".weight", ".bias"):
        if end == ".weight" or name + end in tensors:
            made |= {n + end: t for n, t in zip(new, tensors.pop(name + end).split(sizes), strict=True)}
    return made


def loaded(
    model_class: Any,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    attention: str | None,
) -> Any:
    """A model of transformers with these tensors, all of which it has. Raises Unread if it lacks one or has others."""
    model, told = model_class.from_pretrained(
        None,
        config=model_class.config_class(**{"pad_token_id": None, **config}),
        state_dict={n: t.contiguous() for n, t in tensors.items()},
        dtype=dtype,
        attn_implementation=attention,
        output_loading_info=True,
    )
    tied = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    if wrong := {*told["missing_keys"]} - tied | {*told["unexpected_keys"]} | {*map(str, told["mismatched_keys"])}:
        raise Unread(f"{model_class.__name__} and the checkpoint differ in {', '.join(sorted(wrong)[:3])}")
    return model.eval()
