"""Grok-1, as transformers' Gemma 2 with OLMoE's experts in place of its MLP.

Gemma 2 has Grok's four norms a layer, and its bound on logits of attention: cap tanh(scale q k / cap). Gemma's norms
multiply by 1 + weight, so that theirs is Grok's less one, which float32 holds and 16 bits do not. OLMoE takes the
softmax over all experts and does not divide the weights of those chosen by their sum. Embeddings are multiplied by
embedding_multiplier_scale in place of Gemma's root of the width, and logits by output_multiplier_scale. GELU is the
tanh form, as in xAI's model.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmexport.validate.references import relaid

SOURCE = "transformers Gemma2ForCausalLM with OlmoeSparseMoeBlock"
LAYER = r"model\.layers\.(\d+)\."
NAMES = {
    LAYER + r"attn\.(.*)": r"model.layers.\1.self_attn.\2",
    LAYER + r"moe_block\.gate\.(.*)": r"model.layers.\1.mlp.gate.\2",
    r"(model\.embed_tokens\..*|lm_head\..*)": r"\1",
}
NORMS = {
    LAYER + r"pre_attn_norm\.scale": r"model.layers.\1.input_layernorm.weight",
    LAYER + r"post_attn_norm\.scale": r"model.layers.\1.post_attention_layernorm.weight",
    LAYER + r"pre_moe_norm\.scale": r"model.layers.\1.pre_feedforward_layernorm.weight",
    LAYER + r"post_moe_norm\.scale": r"model.layers.\1.post_feedforward_layernorm.weight",
    r"model\.norm\.scale": r"model.norm.weight",
}


def make(config: Mapping[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype, attention: str | None) -> Any:
    layers, experts, state = config["num_hidden_layers"], config["num_experts"], dict[str, Tensor]()
    for i in range(layers):
        each = [f"model.layers.{i}.moe_block.experts.{e}." for e in range(experts)]
        read = {n: [tensors.pop(f"{e}{n}.weight") for e in each] for n in ("linear", "linear_v", "linear_1")}
        both = [torch.cat(pair) for pair in zip(read["linear"], read["linear_v"], strict=True)]
        state[f"model.layers.{i}.mlp.experts.gate_up_proj"] = torch.stack(both)
        state[f"model.layers.{i}.mlp.experts.down_proj"] = torch.stack(read["linear_1"])
    state |= relaid.taken(tensors, NAMES) | {n: t.float() - 1 for n, t in relaid.taken(tensors, NORMS).items()}
    same: tuple[str, ...] = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
    )
    same += ("num_hidden_layers", "rms_norm_eps", "tie_word_embeddings", "embedding_multiplier_scale")
    like = {
        **{k: config[k] for k in (*same, "attn_output_multiplier", "output_multiplier_scale")},
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "attn_logit_softcapping": config["max_attn_value"],
        "final_logit_softcapping": None,
        "layer_types": ["full_attention"] * layers,
        "experts": {"num_experts": experts, "num_experts_per_tok": config["num_experts_per_tok"]},
    }
    return relaid.loaded(_with_experts(), like, state, dtype, attention)


def _with_experts() -> Any:
    import transformers
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    class GemmaWithExperts(transformers.Gemma2ForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            sizes = {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size}
            olmoe = transformers.OlmoeConfig(
                **sizes, **config.experts, hidden_act="gelu_pytorch_tanh", norm_topk_prob=False
            )
            self.model.embed_tokens.scalar_embed_scale = config.embedding_multiplier_scale
            for layer in self.model.layers:
                layer.mlp = OlmoeSparseMoeBlock(olmoe)
                layer.self_attn.scaling = config.attn_output_multiplier

        def forward(self, *args: Any, **others: Any) -> Any:
            made = super().forward(*args, **others)
            made.logits = made.logits * self.config.output_multiplier_scale
            return made

    return GemmaWithExperts
