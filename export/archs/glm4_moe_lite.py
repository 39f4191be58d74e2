"""GLM-4.7-Flash (transformers modeling_glm4_moe_lite.py): DeepSeek V3's layers, of which the config lists the kinds."""

from llmexport.export.archs.deepseek_v3 import (
    HARMLESS,
    MOE_NAMES,
    MOE_STACKS,
    TINY_LATENT,
    experts,
    latent_attention,
    rotation,
    sizes,
)
from llmexport.export.config import Config
from llmexport.export.decoder import AHEAD, BUFFERS
from llmexport.export.errors import ExportError
from llmexport.export.spec import Arch, Mask, Model, causal_lm, decoder_layer
from llmexport.export.values import show

KINDS = ("dense", "sparse")


def build(config: Config) -> Model:
    config.leave(HARMLESS)
    d = sizes(config)
    norm = d.norm(1e-5)
    attention = latent_attention(d, 768, value=256, own=192, **rotation(config))
    groups = (config.count("n_group", 1), config.count("topk_group", 1))
    mlps = {"dense": d.mlp(), "sparse": experts(d, groups, scale=1.8, count=64, top_k=4, width=1536)}
    reads = (config.rotary(attention.rope_size), Mask())
    layers = [decoder_layer(norm, attention, norm, mlps[kind]) for kind in kinds(config, d.layers)]
    return d.model([(layer, reads) for layer in layers], norm, tied=False)


def kinds(config: Config, layers: int) -> list[str]:
    """Which layers have one MLP and which have experts."""
    found = config.get("mlp_layer_types", ["dense"] + ["sparse"] * (layers - 1))
    if not isinstance(found, list) or len(found) != layers or any(k not in KINDS for k in found):
        known = " or ".join(KINDS)
        raise ExportError(f"config.json: mlp_layer_types must list {layers} layers as {known}, found {show(found)}")
    # transformers does not read it, vLLM reads nothing else.
    config.expect("first_k_dense_replace", (found + ["sparse"]).index("sparse"))
    config.expect("moe_layer_freq", 1)
    return found


ARCH = Arch(
    model_types=("glm4_moe_lite",),
    adds="attention over latents (MLA), experts chosen with a correction",
    reference=causal_lm("Glm4MoeLiteForCausalLM"),
    build=build,
    names=MOE_NAMES,
    stacks=MOE_STACKS,
    in_parts=True,
    ignore=BUFFERS,
    ahead=AHEAD,
    tiny={
        **TINY_LATENT,
        "num_experts_per_tok": 3,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.8,
        "norm_topk_prob": True,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "partial_rotary_factor": 1.0},
    },
)
