"""Command R and R+ (transformers modeling_cohere.py): attention and MLP side by side, LayerNorm, scaled logits."""

from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder
from llmexport.export.spec import Arch, Mask, Model, Norm, causal_lm, decoder_layer


def build(config: Config) -> Model:
    bias = config.flag("attention_bias")
    d = decoder(config, grouped=False)
    epsilon = config.number("layer_norm_eps", 1e-5)
    norm, heads = (Norm(size, epsilon, statistics="layer") for size in (d.hidden, d.head_size))
    own = {"qk_norm": heads, "qk_norm_over": "each_head"} if config.flag("use_qk_norm") else {}
    attention = d.attention(qkv_bias=bias, out_bias=bias, interleaved=True, **own)
    layer = decoder_layer(norm, attention, None, d.mlp(), parallel=True)
    reads = (config.rotary(d.head_size, 500000.0), Mask())
    return d.model([(layer, reads)] * d.layers, norm, tied=True, logit_scale=config.number("logit_scale", 0.0625))


ARCH = Arch(
    model_types=("cohere",),
    system="Command-R, Command-R+",
    adds="attention and MLP side by side, LayerNorm, scaled logits",
    reference=causal_lm("CohereForCausalLM"),
    build=build,
    names=NAMES,
    ignore=BUFFERS,
    tiny={
        **{k: v for k, v in TINY.items() if k != "rms_norm_eps"},
        "layer_norm_eps": 1e-5,
        "logit_scale": 2.0,
        "use_qk_norm": False,
        "tie_word_embeddings": True,
    },
)
