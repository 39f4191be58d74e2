"""InternLM 3 (internlm's modeling_internlm3.py): Llama, with a head size of its own."""

from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder
from llmexport.export.spec import Arch, Mask, Model, causal_lm, decoder_layer

CODE = {
    "AutoConfig": "configuration_internlm3.InternLM3Config",
    "AutoModel": "modeling_internlm3.InternLM3Model",
    "AutoModelForCausalLM": "modeling_internlm3.InternLM3ForCausalLM",
}


def build(config: Config) -> Model:
    config.expect_code(CODE)
    # transformers, whose Llama it is, writes the other names.
    qkv_bias = config.flag("qkv_bias", config.flag("attention_bias"))
    bias = config.flag("bias", config.flag("mlp_bias"))
    d = decoder(config, head_size=128)
    norm = d.norm(1e-5)
    layer = decoder_layer(norm, d.attention(qkv_bias=qkv_bias, out_bias=bias), norm, d.mlp(bias=bias))
    return d.model([(layer, (config.rotary(d.head_size), Mask()))] * d.layers, norm, tied=False)


ARCH = Arch(
    model_types=("internlm3",),
    system="InternLM3",
    adds="a head size of its own",
    reference=causal_lm("InternLM3ForCausalLM", made_by="internlm3", aliases=("LlamaForCausalLM",)),
    build=build,
    names=NAMES,
    ignore=BUFFERS,
    tiny={
        **TINY,
        "bias": False,
        "head_dim": 24,
        "qkv_bias": False,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 50000000.0, "factor": 6.0},
    },
)
