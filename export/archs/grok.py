"""Grok-1 (xai-org/grok-1 model.py, in JAX): sandwich norms, bounded attention logits, experts without renormalisation.

Names are those of its published conversion to PyTorch (modeling_grok1.py), which computes GELU by erf where the
original, and this, have the tanh form.
"""

from llmexport.export.config import Config
from llmexport.export.decoder import NAMES, TINY, decoder, stacks
from llmexport.export.spec import Arch, Experts, Model, Moe, Router, Span, causal_lm, decoder_layer

CODE = {
    "AutoConfig": "configuration_grok1.Grok1Config",
    "AutoModel": "modeling_grok1.Grok1Model",
    "AutoModelForCausalLM": "modeling_grok1.Grok1ModelForCausalLM",
}
LAYER = "model.layers.{i}."
MOE = LAYER + "moe_block."


def build(config: Config) -> Model:
    config.expect_code(CODE)
    d = decoder(config)
    norm = d.norm(1e-5, rounding="after_weight")
    experts, top_k = config.count("num_experts", 8), config.count("num_experts_per_tok", 2)
    moe = Moe(
        Router(d.hidden, experts, top_k, "softmax"),
        Experts(d.hidden, config.length("intermediate_size", 32768), experts, top_k, "gelu_tanh"),
    )
    attention = d.attention(
        scale=config.number("attn_output_multiplier", 1.0), softcap=config.number("max_attn_value", 30.0)
    )
    layer = decoder_layer(norm, attention, norm, moe, mixer_output_norm=norm, mlp_output_norm=norm)
    return d.model(
        [(layer, (config.rotary(d.head_size), Span()))] * d.layers,
        norm,
        tied=True,
        scale=config.number("embedding_multiplier_scale", 1.0),
        logit_scale=config.number("output_multiplier_scale", 1.0),
    )


ARCH = Arch(
    model_types=("grok-1",),
    system="Grok-1",
    adds="sandwich norms, tanh-bounded scores, 8 experts without renormalisation, multipliers",
    reference=causal_lm("Grok1ModelForCausalLM", made_by="grok"),
    build=build,
    names={
        **NAMES,
        "layers.{i}.self_attn.": LAYER + "attn.",
        "layers.{i}.self_attn_input_norm.weight": LAYER + "pre_attn_norm.scale",
        "layers.{i}.self_attn_output_norm.weight": LAYER + "post_attn_norm.scale",
        "layers.{i}.mlp_input_norm.weight": LAYER + "pre_moe_norm.scale",
        "layers.{i}.mlp_output_norm.weight": LAYER + "post_moe_norm.scale",
        "layers.{i}.mlp.": MOE,
        "layers.{i}.mlp.router.": MOE + "gate.",
        "head.norm.weight": "model.norm.scale",
    },
    stacks=stacks(MOE, "linear", "linear_v", "linear_1"),
    in_parts=True,
    tiny={
        **{k: v for k, v in TINY.items() if k not in ("hidden_act", "rope_parameters")},
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_output_multiplier": 0.3,
        "max_attn_value": 3.0,
        "embedding_multiplier_scale": 5.0,
        "output_multiplier_scale": 0.6,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
)
