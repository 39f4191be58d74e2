"""DeBERTa 2 and 3 (transformers modeling_deberta_v2.py): distances in logarithmic buckets, read as words are."""

from llmexport.export.config import Config
from llmexport.export.disentangled import IGNORE, NAMES, OLDER, TINY, encoder
from llmexport.export.spec import Arch, Model, Reference


def build(config: Config) -> Model:
    # The layer of a convolution that v2-xlarge and v2-xxlarge have.
    config.expect("conv_kernel_size", 0)
    said = config.integer("position_buckets", -1, least=-1)
    buckets = config.length("position_buckets") if said > 0 else 0
    normed = config.choice("norm_rel_ebd", {"none": False, "layer_norm": True}, "none")
    return encoder(config, fused=False, buckets=buckets, shared=config.flag("share_att_key"), normed=normed)


SELF = "deberta.encoder.layer.{i}.attention.self."
ARCH = Arch(
    model_types=("deberta-v2",),
    system="DeBERTa v2",
    adds="as DeBERTa, with logarithmic distances that share the matrices of words",
    reference=Reference("DebertaV2ForMaskedLM", {"logits": "logits"}),
    build=build,
    names={
        **NAMES,
        "layers.{i}.self_attn.q_proj.": f"{SELF}query_proj.",
        "layers.{i}.self_attn.k_proj.": f"{SELF}key_proj.",
        "layers.{i}.self_attn.v_proj.": f"{SELF}value_proj.",
        "layers.{i}.self_attn.position_k_proj.": f"{SELF}pos_key_proj.",
        "layers.{i}.self_attn.position_q_proj.": f"{SELF}pos_query_proj.",
    },
    base="deberta.",
    older=OLDER,
    ignore=IGNORE,
    tiny={**TINY, "position_buckets": 16, "norm_rel_ebd": "layer_norm", "share_att_key": True},
)
