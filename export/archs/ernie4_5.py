"""ERNIE 4.5, dense (transformers modeling_ernie4_5.py): Llama with interleaved RoPE."""

from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder
from llmexport.export.spec import Arch, Mask, Model, causal_lm, decoder_layer

# Baidu's code, which transformers took over under names without the second underscore.
CODE = {
    "AutoConfig": "configuration_ernie4_5.Ernie4_5_Config",
    "AutoModel": "modeling_ernie4_5.Ernie4_5_Model",
    "AutoModelForCausalLM": "modeling_ernie4_5.Ernie4_5_ForCausalLM",
}


def build(config: Config) -> Model:
    config.expect_code(CODE)
    bias = config.flag("use_bias")
    d = decoder(config, head_size=128)
    norm = d.norm(1e-5)
    layer = decoder_layer(norm, d.attention(qkv_bias=bias, out_bias=bias, interleaved=True), norm, d.mlp(bias=bias))
    return d.model([(layer, (config.rotary(d.head_size, 500000.0), Mask()))] * d.layers, norm, tied=True)


ARCH = Arch(
    model_types=("ernie4_5",),
    adds="interleaved RoPE",
    reference=causal_lm("Ernie4_5ForCausalLM", aliases=("Ernie4_5_ForCausalLM",)),
    build=build,
    names=NAMES,
    ignore=BUFFERS,
    tiny={**TINY, "head_dim": 32, "use_bias": False, "tie_word_embeddings": True},
)
