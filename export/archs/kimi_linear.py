"""Kimi Linear (transformers modeling_kimi_linear.py): three Kimi delta nets to an attention over latents without
RoPE, experts chosen as DeepSeek V3's."""

from typing import Any

from llmexport.export.archs.deepseek_v3 import latent_attention
from llmexport.export.config import Config
from llmexport.export.decoder import NAMES, TINY, Decoder, decoder, stacks
from llmexport.export.errors import ExportError
from llmexport.export.spec import (
    Arch,
    Experts,
    KimiDeltaAttention,
    Mask,
    Model,
    Moe,
    Presence,
    Router,
    SharedExpert,
    causal_lm,
    decoder_layer,
)
from llmexport.export.values import show

ATTENTION, MOE = "model.layers.{i}.self_attn.", "model.layers.{i}.block_sparse_moe."
# Moonshot's code, which transformers took over.
CODE = {
    "AutoConfig": "configuration_kimi.KimiLinearConfig",
    "AutoModel": "modeling_kimi.KimiLinearModel",
    "AutoModelForCausalLM": "modeling_kimi.KimiLinearForCausalLM",
}
# Nothing turns, and what of a head would is no head's size; modules that guess more tokens are no layers; groups of
# experts are said by how many there are.
HARMLESS = ("head_dim", "num_nextn_predict_layers", "rope_theta", "use_grouped_topk")


def build(config: Config) -> Model:
    config.expect_code(CODE)
    config.leave(HARMLESS)
    for key in ("rope_parameters", "rope_scaling"):
        config.expect(key, None)
    config.expect("mla_use_nope", True)
    config.expect("moe_layer_freq", 1)
    d = decoder(config)
    config.expect("num_key_value_heads", d.heads)
    config.expect("hidden_act", "silu")
    norm, dense, moe = d.norm(1e-5), d.mlp(), experts(d)
    linear, derived = linear_attention(d, norm.epsilon)
    full = latent_attention(d, None, turned=False)
    first = config.integer("first_k_dense_replace", 1, least=0)
    mlps = ["dense" if i < first else "sparse" for i in range(d.layers)]
    if config.get("mlp_layer_types", mlps) != mlps:
        raise ExportError("config.json: mlp_layer_types and first_k_dense_replace differ: remove one")
    mixers = {"linear_attention": (linear, (Presence(),)), "full_attention": (full, (Mask(),))}
    layers = []
    for (mixer, reads), kind in zip(config.layer_types(mixers, derived), mlps, strict=True):
        layers.append((decoder_layer(norm, mixer, norm, dense if kind == "dense" else moe), reads))
    return d.model(layers, norm, tied=False)


def linear_attention(d: Decoder, epsilon: float) -> tuple[KimiDeltaAttention, list[str]]:
    """The delta net, and the kind of every layer where the config does not list them."""
    said: Any = d.config.get("linear_attn_config", {})
    known = {"head_dim", "num_heads", "short_conv_kernel_size", "kda_layers", "full_attn_layers"}
    if not isinstance(said, dict) or not said.keys() <= known:
        raise ExportError(f"config.json: linear_attn_config is {show(said)}, expected {', '.join(sorted(known))}")
    own = Config({key: value for key, value in said.items() if key not in ("kda_layers", "full_attn_layers")})
    config = d.config
    heads = own.count("num_heads", config.count("linear_num_heads", 32))
    size = own.length("head_dim", config.length("linear_head_dim", 128))
    kernel = own.count("short_conv_kernel_size", config.count("linear_conv_kernel_dim", 4, least=2), least=2)
    net = KimiDeltaAttention(d.hidden, heads, size, kernel, epsilon)
    if "kda_layers" not in said or "full_attn_layers" not in said:
        return net, ["full_attention" if i and i % 4 == 0 else "linear_attention" for i in range(d.layers)]
    full, delta = said["full_attn_layers"], said["kda_layers"]
    # They are counted from 1.
    every = list(range(1, d.layers + 1))
    listed = isinstance(full, list) and isinstance(delta, list)
    if not listed or sorted([*full, *delta], key=str) != sorted(every, key=str):
        raise ExportError(
            f"config.json: full_attn_layers {show(full)} and kda_layers {show(delta)} must be layers 1 to {d.layers}"
        )
    return net, ["full_attention" if i in full else "linear_attention" for i in every]


def experts(d: Decoder) -> Moe:
    """As DeepSeek V3's, by names of their own."""
    config = d.config
    config.expect("moe_router_activation_func", "sigmoid")
    count, top_k = config.count("num_experts", 256), config.count("num_experts_per_token", 8)
    width = config.length("moe_intermediate_size", 1024)
    router = Router(
        *(d.hidden, count, top_k, "sigmoid"),
        renormalise=config.flag("moe_renormalize", True),
        correction=True,
        groups=config.count("num_expert_group", 1),
        groups_kept=config.count("topk_group", 1),
        scale=config.number("routed_scaling_factor", 2.446),
        wide=True,
    )
    shared = SharedExpert(d.mlp(width * config.count("num_shared_experts", 1), "silu"))
    return Moe(router, Experts(d.hidden, width, count, top_k, "silu"), shared)


ARCH = Arch(
    model_types=("kimi_linear",),
    system="Kimi",
    adds="Kimi delta nets (KDA) beside attention over latents without RoPE",
    reference=causal_lm("KimiLinearForCausalLM"),
    build=build,
    names={
        **NAMES,
        "layers.{i}.linear_attn.": ATTENTION,
        "layers.{i}.mlp.router.": MOE + "gate.",
        "layers.{i}.mlp.router.correction": MOE + "gate.e_score_correction_bias",
        "layers.{i}.mlp.experts.": MOE + "experts.",
        "layers.{i}.mlp.shared_expert.": MOE + "shared_experts.",
    },
    stacks=stacks(MOE, "w1", "w3", "w2"),
    in_parts=True,
    # transformers saves dense layers by the name of those with experts.
    older={f".mlp.{n}_proj.weight": f".block_sparse_moe.{n}_proj.weight" for n in ("gate", "up", "down")},
    tiny={
        **{k: v for k, v in TINY.items() if k not in ("rope_parameters", "max_position_embeddings")},
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "model_max_length": 512,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 20,
        "num_experts": 8,
        "num_experts_per_token": 3,
        "moe_intermediate_size": 32,
        "linear_attn_config": {
            "head_dim": 16,
            "num_heads": 3,
            "short_conv_kernel_size": 4,
            "kda_layers": [1, 2, 4],
            "full_attn_layers": [3],
        },
    },
)
