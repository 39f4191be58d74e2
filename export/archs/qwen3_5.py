"""Qwen3.5 (transformers modeling_qwen3_5.py): three gated delta nets to a gated full attention, mRoPE on a quarter."""

from llmexport.export.archs.qwen2 import SEEING
from llmexport.export.archs.towers.qwen3_5 import TOWER
from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, Decoder, decoder
from llmexport.export.spec import (
    Arch,
    GatedDeltaNet,
    Mask,
    Mlp,
    Model,
    Moe,
    Multimodal,
    Norm,
    Presence,
    causal_lm,
    decoder_layer,
)

# Layers that predict further tokens, which are no part of the language model.
AHEAD = ("mtp.*",)


def build(config: Config) -> Model:
    d = decoder(config, head_size=256)
    return hybrid(d, d.mlp())


def hybrid(d: Decoder, mlp: Mlp | Moe) -> Model:
    """The layers of this family around its `mlp`."""
    config, norm = d.config, d.norm(offset=1.0, rounding="after_weight")
    config.expect("hidden_act", "silu")
    linear = GatedDeltaNet(
        d.hidden,
        key_heads=config.count("linear_num_key_heads", 16),
        key_size=config.length("linear_key_head_dim", 128),
        value_heads=config.count("linear_num_value_heads", 32),
        value_size=config.length("linear_value_head_dim", 128),
        kernel=config.count("linear_conv_kernel_dim", 4, least=2),
        epsilon=norm.epsilon,
    )
    bias = config.flag("attention_bias")
    rotary = config.rotary(d.head_size, partial=0.25, sections=(11, 11, 10))
    full = d.attention(
        qkv_bias=bias,
        out_bias=bias,
        rotated=rotary.size,
        qk_norm=Norm(d.head_size, norm.epsilon, 1.0, "after_weight"),
        output_gate=True,
    )
    # True of every model of this family; the state of the delta rule is fp32 whatever the dtype.
    config.expect("attn_output_gate", True)
    config.expect("mamba_ssm_dtype", "float32")
    config.expect("mlp_only_layers", [])
    # The delta nets' gate, by vLLM's names.
    config.choice("output_gate_type", {"silu": None, "swish": None}, "silu")
    config.leave(("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"))
    interval = config.integer("full_attention_interval", 4)
    derived = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(d.layers)]
    kinds = {
        "linear_attention": (decoder_layer(norm, linear, norm, mlp), (Presence(),)),
        "full_attention": (decoder_layer(norm, full, norm, mlp), (rotary, Mask())),
    }
    return d.model(config.layer_types(kinds, derived), norm, tied=False)


def multimodal(model_type: str, architecture: str) -> tuple[Multimodal]:
    return (
        Multimodal(
            model_type=model_type,
            architecture=architecture,
            names={"model.": "model.language_model."},
            tower=TOWER,
            left_out=("model.visual.*",),
            ignore=AHEAD,
            harmless=SEEING,
        ),
    )


TINY_HYBRID = {
    **TINY,
    "num_hidden_layers": 4,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}

ARCH = Arch(
    model_types=("qwen3_5_text",),
    adds="gated delta nets as Qwen3.5-MoE, with a dense MLP",
    reference=causal_lm("Qwen3_5ForCausalLM"),
    build=build,
    names=NAMES,
    ignore=(*AHEAD, *BUFFERS),
    multimodal=multimodal("qwen3_5", "Qwen3_5ForConditionalGeneration"),
    tiny=TINY_HYBRID,
)
