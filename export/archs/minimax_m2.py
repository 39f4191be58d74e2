"""MiniMax M2 (transformers modeling_minimax_m2.py): many experts that a correction chooses, q and k normed over all
heads, RoPE over half a head."""

from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder, stacks
from llmexport.export.errors import ExportError
from llmexport.export.spec import Arch, Experts, Mask, Model, Moe, Router, causal_lm, decoder_layer
from llmexport.export.values import show

MOE = "model.layers.{i}.block_sparse_moe."
CODE = {
    "AutoConfig": "configuration_minimax_m2.MiniMaxM2Config",
    "AutoModelForCausalLM": "modeling_minimax_m2.MiniMaxM2ForCausalLM",
}
# How it was trained, and layers that guess further tokens, which no published checkpoint holds.
UNUSED = ("use_mtp", "num_mtp_modules", "mtp_transformer_layers", "max_model_len")


def build(config: Config) -> Model:
    config.expect_code(CODE)
    config.leave(UNUSED)
    for key, value in {"use_qk_norm": True, "qk_norm_type": "per_layer", "use_routing_bias": True}.items():
        config.expect(key, value)
    config.expect("scoring_func", "sigmoid")
    config.expect("shared_intermediate_size", 0)
    d = decoder(config, head_size=128)
    config.expect("attn_type_list", [1] * d.layers)
    norm, activation = d.norm(), d.activation()
    share = config.integer("rotary_dim", d.head_size) / d.head_size
    rotary = config.rotary(d.head_size, 5000000.0, partial=share)
    if config.has("rotary_dim") and rotary.size != config.integer("rotary_dim"):
        raise ExportError(f"config.json: rotary_dim is {show(config.get('rotary_dim'))}, RoPE turns {rotary.size}")
    experts, top_k = config.count("num_local_experts", 256), config.count("num_experts_per_tok", 8)
    moe = Moe(
        Router(d.hidden, experts, top_k, "sigmoid", renormalise=True, correction=True),
        Experts(d.hidden, config.length("intermediate_size", 1536), experts, top_k, activation),
    )
    attention = d.attention(rotated=rotary.size, qk_norm=norm, qk_norm_over="all_heads")
    layer = decoder_layer(norm, attention, norm, moe)
    return d.model([(layer, (rotary, Mask()))] * d.layers, norm, tied=False)


ARCH = Arch(
    model_types=("minimax_m2",),
    adds="experts chosen with a correction, q and k normed over all heads, RoPE over half a head",
    reference=causal_lm("MiniMaxM2ForCausalLM"),
    build=build,
    names={
        **NAMES,
        "layers.{i}.mlp.": MOE,
        "layers.{i}.mlp.router.": MOE + "gate.",
        "layers.{i}.mlp.router.correction": MOE + "e_score_correction_bias",
    },
    stacks=stacks(MOE, "w1", "w3", "w2"),
    in_parts=True,
    ignore=BUFFERS,
    tiny={
        **TINY,
        "head_dim": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0, "partial_rotary_factor": 0.5},
    },
)
