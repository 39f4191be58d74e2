"""Yuan 2.0 (IEITYuan/Yuan2-2B-hf yuan_hf_model.py): queries and keys of filtered hidden states, SiLU on up.

Its code hides what is before an <eod> within a row from what follows; here a row is one text.
"""

from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder
from llmexport.export.spec import (
    Arch,
    FilteredAttention,
    LocalizedFilter,
    Mask,
    Model,
    Norm,
    Presence,
    causal_lm,
    decoder_layer,
)

CODE = {"AutoConfig": "configuration_yuan.YuanConfig", "AutoModelForCausalLM": "yuan_hf_model.YuanForCausalLM"}
# What training does, and how texts in one row are told apart.
TRAINING = ("dropout", "use_loss_mask", "eod_token", "reset_attention_mask", "reset_position_ids")


def build(config: Config) -> Model:
    config.expect_code(CODE)
    config.expect("causal_mask", True)
    config.leave(TRAINING)
    d = decoder(config, grouped=False)
    norm = d.norm()
    # The filter's epsilon is its class's own.
    own = LocalizedFilter(Norm(d.hidden, 1e-6))
    attention = FilteredAttention(d.hidden, d.heads, d.kv_heads, d.head_size, filter=own)
    layer = decoder_layer(norm, attention, norm, d.mlp())
    return d.model([(layer, (config.rotary(d.head_size), Mask(), Presence()))] * d.layers, norm, tied=False)


ARCH = Arch(
    model_types=("yuan",),
    system="Yuan 2.0",
    adds="localized filtering before q and k, with a state; heads split across q and k; SiLU on up",
    reference=causal_lm("YuanForCausalLM", made_by="yuan"),
    build=build,
    names={
        **NAMES,
        "layers.{i}.mlp.gate_proj.": "model.layers.{i}.mlp.up_proj.",
        "layers.{i}.mlp.up_proj.": "model.layers.{i}.mlp.gate_proj.",
    },
    ignore=BUFFERS,
    tiny={
        **{k: v for k, v in TINY.items() if k not in ("num_key_value_heads", "rope_parameters")},
        "causal_mask": True,
        "eod_token": 255,
        "reset_attention_mask": True,
        "reset_position_ids": True,
        "use_loss_mask": False,
    },
)
