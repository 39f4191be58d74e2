"""InternLM 2 and 2.5 (internlm's modeling_internlm2.py): Llama, with q, k and v in one matrix, group by group."""

from llmexport.export.config import Config
from llmexport.export.decoder import TINY, decoder
from llmexport.export.spec import Arch, Mask, Model, causal_lm, decoder_layer

CODE = {
    "AutoConfig": "configuration_internlm2.InternLM2Config",
    "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
    "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
}
LAYER = "model.layers.{i}."


def build(config: Config) -> Model:
    config.expect_code(CODE)
    bias = config.flag("bias", True)
    d = decoder(config, grouped=False)
    norm = d.norm()
    attention = d.attention(qkv_bias=bias, out_bias=bias, fused=True, grouped=True)
    layer = decoder_layer(norm, attention, norm, d.mlp())
    return d.model([(layer, (config.rotary(d.head_size), Mask()))] * d.layers, norm, tied=False)


ARCH = Arch(
    model_types=("internlm2",),
    system="InternLM2",
    adds="q, k, v fused group by group",
    reference=causal_lm("InternLM2ForCausalLM", made_by="internlm2"),
    build=build,
    names={
        "embedding.": "model.tok_embeddings.",
        "layers.{i}.self_attn_input_norm.": LAYER + "attention_norm.",
        "layers.{i}.self_attn.qkv_proj.": LAYER + "attention.wqkv.",
        "layers.{i}.self_attn.o_proj.": LAYER + "attention.wo.",
        "layers.{i}.mlp_input_norm.": LAYER + "ffn_norm.",
        "layers.{i}.mlp.gate_proj.": LAYER + "feed_forward.w1.",
        "layers.{i}.mlp.up_proj.": LAYER + "feed_forward.w3.",
        "layers.{i}.mlp.down_proj.": LAYER + "feed_forward.w2.",
        "head.norm.": "model.norm.",
        "head.projection.": "output.",
    },
    ignore=("model.layers.*.attention.rotary_emb.inv_freq",),
    tiny={
        **TINY,
        "bias": False,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1000000.0, "factor": 2.0},
    },
)
