"""StarCoder2 (transformers modeling_starcoder2.py): RoPE, grouped keys, LayerNorms with a bias and a plain MLP."""

from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, PLAIN, TINY, decoder
from llmexport.export.spec import Arch, Mask, Model, Norm, causal_lm, decoder_layer


def build(config: Config) -> Model:
    d = decoder(config)
    # What the trainer calls by names of its own; softmax is in 32 bits in every graph here.
    config.expect("norm_type", "layer_norm")
    config.expect("mlp_type", "default")
    config.expect("scale_attn_weights", True)
    for key in ("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"):
        config.flag(key, True)
    epsilon, bias = config.number("norm_epsilon", 1e-5), config.flag("use_bias", True)
    config.expect("layer_norm_epsilon", epsilon)
    norm = Norm(d.hidden, epsilon, statistics="layer", bias=True)
    activation = config.choice("hidden_act", PLAIN, "gelu_pytorch_tanh")
    mlp = d.mlp(activation=activation, bias=bias, gated=False)
    layer = decoder_layer(norm, d.attention(qkv_bias=bias, out_bias=bias), norm, mlp)
    reads = (config.rotary(d.head_size), Mask(config.window("sliding_window", absent=None)))
    return d.model([(layer, reads)] * d.layers, norm, tied=True)


ARCH = Arch(
    model_types=("starcoder2",),
    adds="sliding window, LayerNorms with a bias, a plain MLP",
    reference=causal_lm("Starcoder2ForCausalLM"),
    build=build,
    names={
        **NAMES,
        "layers.{i}.mlp.up_proj.": "model.layers.{i}.mlp.c_fc.",
        "layers.{i}.mlp.down_proj.": "model.layers.{i}.mlp.c_proj.",
    },
    ignore=BUFFERS,
    tiny={
        **{k: v for k, v in TINY.items() if k != "rms_norm_eps"},
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": 1e-5,
        "use_bias": True,
        "sliding_window": 8,
        "tie_word_embeddings": True,
    },
)
