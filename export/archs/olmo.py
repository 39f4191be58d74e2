"""OLMo 1 (transformers modeling_olmo.py): LayerNorm without parameters, q, k and v clipped."""

from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder
from llmexport.export.spec import Arch, Mask, Model, Norm, causal_lm, decoder_layer

EPSILON = 1e-5  # fixed in the model file


def build(config: Config) -> Model:
    bias = config.flag("attention_bias")
    d = decoder(config, grouped=False)
    norm = Norm(d.hidden, EPSILON, statistics="layer", weighted=False)
    clip = config.number("clip_qkv") if config.get("clip_qkv", None) is not None else None
    layer = decoder_layer(norm, d.attention(qkv_bias=bias, out_bias=bias, clip=clip), norm, d.mlp())
    return d.model([(layer, (config.rotary(d.head_size), Mask()))] * d.layers, norm, tied=False)


ARCH = Arch(
    model_types=("olmo",),
    system="OLMo",
    adds="LayerNorm without parameters, clipped q, k, v",
    reference=causal_lm("OlmoForCausalLM"),
    build=build,
    names=NAMES,
    ignore=BUFFERS,
    tiny={
        **{k: v for k, v in TINY.items() if k != "rms_norm_eps"},
        "attention_bias": False,
        "clip_qkv": 0.5,
        "pad_token_id": 0,
        "eos_token_id": 1,
    },
)
