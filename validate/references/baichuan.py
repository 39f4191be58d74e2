"""Baichuan, as transformers' LlamaForCausalLM.

W_pack is [3C, C]: the rows of q, of k and of v, one after the other. With RoPE (7B) the rest is Llama. 13B has ALiBi in
its place: q and k do not turn, which is RoPE at position 0 (cos 1, sin 0), and what is added to the logits is
slope(head) * (key - query) where a query may see a key, the least number elsewhere; Llama adds a mask that is given in
four dimensions as it is. Published code adds slope * key: a softmax does not change with what all keys of a query have
in common. NormHead (Baichuan 2) divides each row of lm_head by its L2 norm before it multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmexport.validate.references import relaid

SOURCE = "transformers LlamaForCausalLM, re-laid out"


def make(config: Mapping[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype, attention: str | None) -> Any:
    import transformers

    hidden = config["hidden_size"]
    state: dict[str, Tensor] = {}
    for i in range(config["num_hidden_layers"]):
        name = f"model.layers.{i}.self_attn."
        state |= relaid.split(tensors, name + "W_pack", [hidden] * 3, [name + f"{n}_proj" for n in "qkv"])
    state |= relaid.taken(tensors, relaid.SAME)
    if "z_loss_weight" in config:
        state["lm_head.weight"] = torch.nn.functional.normalize(state["lm_head.weight"].float()).to(dtype)
    turns = "max_position_embeddings" in config
    kind = transformers.LlamaForCausalLM if turns else _with_alibi()
    return relaid.loaded(kind, {k: config[k] for k in relaid.SIZES}, state, dtype, attention)


def _with_alibi() -> Any:
    import transformers

    class LlamaWithAlibi(transformers.LlamaForCausalLM):
        def forward(
            self,
            input_ids: Tensor,
            attention_mask: Tensor | None = None,
            position_ids: Tensor | None = None,
            past_key_values: Any = None,
            **others: Any,
        ) -> Any:
            total = input_ids.shape[1] + (past_key_values.get_seq_length() if past_key_values is not None else 0)
            real = torch.ones(len(input_ids), total) if attention_mask is None else attention_mask
            return super().forward(
                input_ids=input_ids,
                attention_mask=self._alibi(real.bool(), input_ids.shape[1]),
                position_ids=torch.zeros_like(input_ids),
                past_key_values=past_key_values,
                **others,
            )

        def _alibi(self, real: Tensor, tokens: int) -> Tensor:
            """What is added to the logits [B, H, T, S], where keys [B, S] are real; the queries are the last ones."""
            slopes = torch.tensor(_slopes(self.config.num_attention_heads), dtype=torch.float64)
            # A row's texts are as far apart as its real tokens.
            place = real.long().cumsum(-1)
            far = (place[:, None, :] - place[:, -tokens:, None])[:, None] * slopes[:, None, None]
            slots = torch.arange(real.shape[1])
            before = slots <= slots[-tokens:, None]
            # Padding sees itself, as everywhere: a softmax over nothing is no number.
            seen = real[:, None] & before | (slots == slots[-tokens:, None])
            dtype = self.dtype
            return far.to(dtype).masked_fill(~seen[:, None], torch.finfo(dtype).min)

    return LlamaWithAlibi


def _slopes(heads: int) -> list[float]:
    """Press et al., arXiv 2108.12409: 2 ** (-8 i / n) for a power of two; of 2n every other one for the rest."""
    whole = 2 ** int(math.log2(heads))
    made = [2.0 ** (-8.0 * (i + 1) / whole) for i in range(whole)]
    return made + [2.0 ** (-4.0 * (i + 1) / whole) for i in range(0, 2 * (heads - whole), 2)]
