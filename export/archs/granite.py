"""Granite 3 (transformers modeling_granite.py): Llama, its embeddings, residuals, scores and logits multiplied."""

import dataclasses

from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder
from llmexport.export.spec import Arch, Layer, Mask, Model, causal_lm, decoder_layer


def build(config: Config) -> Model:
    bias = config.flag("attention_bias")
    d = decoder(config, grouped=False)
    norm = d.norm()
    attention = d.attention(qkv_bias=bias, out_bias=bias, scale=config.number("attention_multiplier", 1.0))
    plain = decoder_layer(norm, attention, norm, d.mlp(bias=config.flag("mlp_bias")))
    residual = config.number("residual_multiplier", 1.0)
    layer = Layer(tuple(dataclasses.replace(s, scale=residual) for s in plain.sublayers))
    return d.model(
        [(layer, (config.rotary(d.head_size), Mask()))] * d.layers,
        norm,
        tied=False,
        scale=config.number("embedding_multiplier", 1.0),
        logit_scale=1 / config.number("logits_scaling", 1.0),
    )


ARCH = Arch(
    model_types=("granite",),
    adds="multipliers of embeddings, residuals, scores and logits",
    reference=causal_lm("GraniteForCausalLM"),
    build=build,
    names=NAMES,
    ignore=BUFFERS,
    tiny={
        **TINY,
        "attention_bias": False,
        "mlp_bias": False,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.125,
        "logits_scaling": 0.5,
        "tie_word_embeddings": True,
    },
)
