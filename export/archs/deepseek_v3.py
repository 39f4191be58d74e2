"""DeepSeek V3 and R1, and Kimi K2 (transformers modeling_deepseek_v3.py): attention over latents, experts in groups."""

from typing import Any

from llmexport.export.config import Config
from llmexport.export.decoder import AHEAD, BUFFERS, NAMES, TINY, Decoder, decoder, stacks
from llmexport.export.rope import of_logits
from llmexport.export.spec import (
    Arch,
    Experts,
    LatentAttention,
    Mask,
    Model,
    Moe,
    Router,
    SharedExpert,
    causal_lm,
    decoder_layer,
)

MOE = "model.layers.{i}.mlp."
# DeepSeek's code, which transformers took over, and which Kimi K2 brings too.
CODE = {
    "AutoConfig": "configuration_deepseek.DeepseekV3Config",
    "AutoModel": "modeling_deepseek.DeepseekV3Model",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
}
# How it was trained, and modules that guess more tokens, which follow the layers.
HARMLESS = ("aux_loss_alpha", "ep_size", "num_mtp_layers", "num_nextn_predict_layers", "seq_aux")
MOE_NAMES = {
    **NAMES,
    "layers.{i}.mlp.router.": MOE + "gate.",
    "layers.{i}.mlp.router.correction": MOE + "gate.e_score_correction_bias",
    "layers.{i}.mlp.shared_expert.": MOE + "shared_experts.",
}
MOE_STACKS = stacks(MOE)
# What the tiny configs of models with latents share.
TINY_LATENT = {
    **TINY,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "moe_intermediate_size": 32,
}


def build(config: Config) -> Model:
    config.expect_code(CODE)
    config.leave(HARMLESS)
    d = sizes(config)
    norm = d.norm()
    attention = latent_attention(d, 1536, **rotation(config))
    dense, moe = d.mlp(), experts(d, groups=(config.count("n_group", 8), config.count("topk_group", 4)))
    config.expect("moe_layer_freq", 1)
    first = config.integer("first_k_dense_replace", 3, least=0)
    reads = (config.rotary(attention.rope_size), Mask())
    layers = [decoder_layer(norm, attention, norm, dense if i < first else moe) for i in range(d.layers)]
    return d.model([(layer, reads) for layer in layers], norm, tied=False)


def sizes(config: Config) -> Decoder:
    """The sizes, of which those of heads are said elsewhere."""
    d = decoder(config)
    config.expect("num_key_value_heads", d.heads)
    config.expect("head_dim", config.length("qk_rope_head_dim", 64), None)
    return d


def rotation(config: Config) -> dict[str, bool]:
    """How RoPE turns: the cache of transformers has neighbours apart."""
    return {"parted": config.flag("rope_interleave", True)}


def latent_attention(d: Decoder, query: int | None, own: int = 128, value: int = 128, **fields: Any) -> LatentAttention:
    """The sizes of the queries' latent, of what of a key is each head's own, and of a value are for configs that do not
    say."""
    config = d.config
    own, turned = config.length("qk_nope_head_dim", own), config.length("qk_rope_head_dim", 64)
    config.expect("qk_head_dim", own + turned)
    return LatentAttention(
        d.hidden,
        d.heads,
        own,
        turned,
        config.length("v_head_dim", value),
        config.length("kv_lora_rank", 512),
        config.length_or_none("q_lora_rank", query),
        (own + turned) ** -0.5 * of_logits(config),
        bias=config.flag("attention_bias"),
        **fields,
    )


def experts(
    d: Decoder, groups: tuple[int, int], scale: float = 2.5, count: int = 256, top_k: int = 8, width: int = 2048
) -> Moe:
    """Experts that are chosen by the sigmoid of their logit and a correction.

    `groups`: how many there are, and how many a token may choose from. Other numbers are for configs that do not say.
    """
    config = d.config
    config.expect("scoring_func", "sigmoid")
    config.expect("topk_method", "noaux_tc")
    count, top_k = config.count("n_routed_experts", count), config.count("num_experts_per_tok", top_k)
    width, activation = config.length("moe_intermediate_size", width), d.activation()
    router = Router(
        d.hidden,
        count,
        top_k,
        "sigmoid",
        renormalise=config.flag("norm_topk_prob", True),
        correction=True,
        groups=groups[0],
        groups_kept=groups[1],
        scale=config.number("routed_scaling_factor", scale),
        wide=True,
    )
    shared = SharedExpert(d.mlp(width * config.count("n_shared_experts", 1), activation))
    return Moe(router, Experts(d.hidden, width, count, top_k, activation), shared)


ARCH = Arch(
    model_types=("deepseek_v3", "kimi_k2"),
    system="DeepSeek V3, R1, Kimi K2",
    adds="attention over latents (MLA), experts in groups with a correction, YaRN's mscale",
    reference=causal_lm("DeepseekV3ForCausalLM"),
    build=build,
    names=MOE_NAMES,
    stacks=MOE_STACKS,
    in_parts=True,
    ignore=BUFFERS,
    ahead=AHEAD,
    tiny={
        **TINY_LATENT,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "mscale": 1.0}
        | {"mscale_all_dim": 0.707, "original_max_position_embeddings": 64},
    },
)
