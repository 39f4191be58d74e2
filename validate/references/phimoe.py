"""Phi-3.5-MoE, as transformers' PhimoeForCausalLM with its RoPE mended.

Its class computes RoPE's steps anew without the length of the text, which gives the short factors whatever that is,
beside the magnitude of long texts. Microsoft's modeling_phimoe.py and transformers 4 take the long factors there, which
the decorator of its class has made by then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmexport.validate.references import relaid

SOURCE = "transformers PhimoeForCausalLM with LongRoPE's long factors"


def make(config: Mapping[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype, attention: str | None) -> Any:
    import transformers

    state = relaid.taken(tensors, relaid.SAME)
    model = relaid.loaded(transformers.PhimoeForCausalLM, config, state, dtype, attention)
    rotary = model.model.rotary_emb
    rotary.rope_init_fn = lambda _: (rotary.inv_freq, rotary.attention_scaling)
    return model
