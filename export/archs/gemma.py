"""Gemma 1 (transformers modeling_gemma.py): 1 + weight norms in fp32, scaled embeddings, GELU-tanh, tied head."""

from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder
from llmexport.export.spec import Arch, Mask, Model, causal_lm, decoder_layer


def build(config: Config) -> Model:
    config.expect("use_bidirectional_attention", False, None)
    # "gelu" is what the first release wrote; the tanh form was always meant.
    activations = {"gelu": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
    if config.has("hidden_activation"):
        config.choice("hidden_activation", activations)
    bias = config.flag("attention_bias")
    d = decoder(config, head_size=256)
    norm = d.norm(offset=1.0, rounding="after_weight")
    mlp = d.mlp(activation=config.choice("hidden_act", activations, "gelu_pytorch_tanh"))
    layer = decoder_layer(norm, d.attention(qkv_bias=bias, out_bias=bias), norm, mlp)
    reads = (config.rotary(d.head_size), Mask())
    return d.model([(layer, reads)] * d.layers, norm, tied=True, scale=d.hidden**0.5)


ARCH = Arch(
    model_types=("gemma",),
    system="Gemma",
    adds="1 + weight norms in fp32, scaled embeddings, MQA, GELU-tanh",
    reference=causal_lm("GemmaForCausalLM"),
    build=build,
    names=NAMES,
    ignore=BUFFERS,
    tiny={
        **TINY,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "hidden_act": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": True,
    },
)
