"""Baichuan and Baichuan 2 (baichuan-inc's modeling_baichuan.py): 7B turns by RoPE, 13B has ALiBi in its place."""

from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder
from llmexport.export.spec import Alibi, Arch, Mask, Model, causal_lm, decoder_layer

CODE = {
    "AutoConfig": "configuration_baichuan.BaichuanConfig",
    "AutoModel": "modeling_baichuan.BaichuanForCausalLM",
    "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
}
FIRST = {
    "AutoConfig": "configuration_baichuan.BaiChuanConfig",
    "AutoModelForCausalLM": "modeling_baichuan.BaiChuanForCausalLM",
}


def build(config: Config) -> Model:
    config.expect_code(FIRST if config.get("architectures", None) == ["BaiChuanForCausalLM"] else CODE)
    d = decoder(config, grouped=False)
    # Only configs of models with RoPE say for how many positions it is, only those of Baichuan 2 weigh a loss on the
    # sizes of its logits, which its NormHead bounds.
    turns, normed = config.has("max_position_embeddings"), config.has("z_loss_weight")
    config.leave(("z_loss_weight",))
    norm = d.norm()
    attention = d.attention(fused=True, rotated=None if turns else 0, biased=not turns)
    layer = decoder_layer(norm, attention, norm, d.mlp())
    reads = (config.rotary(d.head_size), Mask()) if turns else (Mask(), Alibi(d.heads))
    return d.model([(layer, reads)] * d.layers, norm, tied=False, normed=normed)


ARCH = Arch(
    model_types=("baichuan",),
    system="Baichuan",
    adds="fused q, k, v; ALiBi (13B); a head of rows of length one (2)",
    reference=causal_lm("BaichuanForCausalLM", made_by="baichuan", aliases=("BaiChuanForCausalLM",)),
    build=build,
    names={**NAMES, "layers.{i}.self_attn.qkv_proj.": "model.layers.{i}.self_attn.W_pack."},
    ignore=BUFFERS,
    tiny={
        **{
            k: v
            for k, v in TINY.items()
            if k not in ("num_key_value_heads", "rope_parameters", "max_position_embeddings")
        },
        "hidden_size": 96,
        "num_attention_heads": 6,
        "model_max_length": 512,
        "z_loss_weight": 0,
    },
)
