"""Seed-OSS (transformers modeling_seed_oss.py): Llama with biases on q, k and v, and a head size of its own."""

from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder
from llmexport.export.spec import Arch, Mask, Model, causal_lm, decoder_layer


def build(config: Config) -> Model:
    d = decoder(config, head_size=128)
    norm, mlp = d.norm(), d.mlp(bias=config.flag("mlp_bias"))
    attention = d.attention(qkv_bias=config.flag("attention_bias", True), out_bias=config.flag("attention_out_bias"))
    # Of training.
    config.get("residual_dropout", 0.1)
    layer = decoder_layer(norm, attention, norm, mlp)
    return d.model([(layer, (config.rotary(d.head_size), Mask()))] * d.layers, norm, tied=False)


ARCH = Arch(
    model_types=("seed_oss",),
    adds="bias on q, k, v, a head size of its own",
    reference=causal_lm("SeedOssForCausalLM"),
    build=build,
    names=NAMES,
    ignore=BUFFERS,
    tiny={
        **TINY,
        "head_dim": 32,
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
    },
)
