"""DeBERTa (transformers modeling_deberta.py): an encoder whose attention has vectors apart for distances."""

from llmexport.export.config import Config
from llmexport.export.disentangled import IGNORE, NAMES, OLDER, TINY, encoder
from llmexport.export.spec import Arch, Model, Reference


def build(config: Config) -> Model:
    config.expect("talking_head", False)
    return encoder(config, fused=True)


SELF = "deberta.encoder.layer.{i}.attention.self."
ARCH = Arch(
    model_types=("deberta",),
    system="DeBERTa",
    adds="encoder: disentangled attention of words and distances, norms on sums",
    reference=Reference("DebertaForMaskedLM", {"logits": "logits"}, recast=True),
    build=build,
    names={
        **NAMES,
        "layers.{i}.self_attn.qkv_proj.": f"{SELF}in_proj.",
        "layers.{i}.self_attn.q_bias": f"{SELF}q_bias",
        "layers.{i}.self_attn.v_bias": f"{SELF}v_bias",
        "layers.{i}.self_attn.position_k_proj.": f"{SELF}pos_proj.",
        "layers.{i}.self_attn.position_q_proj.": f"{SELF}pos_q_proj.",
    },
    base="deberta.",
    older=OLDER,
    ignore=IGNORE,
    tiny=TINY,
)
