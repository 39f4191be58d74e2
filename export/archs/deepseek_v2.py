"""DeepSeek V2, V2-Lite and Coder V2 (transformers modeling_deepseek_v2.py): attention over latents, experts of which
the best by softmax are taken, or the best of the best groups."""

from llmexport.export.archs.deepseek_v3 import HARMLESS, MOE_NAMES, MOE_STACKS, TINY_LATENT, latent_attention, sizes
from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, Decoder
from llmexport.export.spec import Arch, Experts, Mask, Model, Moe, Router, SharedExpert, causal_lm, decoder_layer

# DeepSeek's code, which transformers took over.
CODE = {
    "AutoConfig": "configuration_deepseek.DeepseekV2Config",
    "AutoModel": "modeling_deepseek.DeepseekV2Model",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
}
GROUPS = ("n_group", "topk_group")


def build(config: Config) -> Model:
    config.expect_code(CODE)
    config.leave(HARMLESS)
    d = sizes(config)
    norm, bias = d.norm(), config.flag("mlp_bias")
    attention = latent_attention(d, 1536, interleaved=True)
    dense, moe = d.mlp(bias=bias), experts(d, bias)
    config.expect("moe_layer_freq", 1)
    first = config.integer("first_k_dense_replace", 0, least=0)
    reads = (config.rotary(attention.rope_size), Mask())
    layers = [decoder_layer(norm, attention, norm, dense if i < first else moe) for i in range(d.layers)]
    return d.model([(layer, reads) for layer in layers], norm, tied=False)


def experts(d: Decoder, bias: bool) -> Moe:
    config = d.config
    config.expect("scoring_func", "softmax")
    # DeepSeek's code divides by the sum where this is true, transformers does not.
    config.expect("norm_topk_prob", False)
    count, top_k = config.count("n_routed_experts", 64), config.count("num_experts_per_tok")
    width, activation = config.length("moe_intermediate_size", 1407), d.activation()
    grouped = config.choice("topk_method", {"greedy": False, "group_limited_greedy": True}, "greedy")
    # Where experts are not grouped, nothing reads how many groups there are.
    config.leave(GROUPS)
    groups, kept = map(config.count, GROUPS) if grouped else (1, 1)
    router = Router(
        d.hidden,
        count,
        top_k,
        "softmax",
        groups=groups,
        groups_kept=kept,
        group_best=1,
        scale=config.number("routed_scaling_factor", 1.0),
        wide=True,
    )
    shared = SharedExpert(d.mlp(width * config.count("n_shared_experts", 2), activation, bias=bias))
    return Moe(router, Experts(d.hidden, width, count, top_k, activation), shared)


ARCH = Arch(
    model_types=("deepseek_v2",),
    system="DeepSeek V2",
    adds="attention over latents (MLA), experts of the best groups",
    reference=causal_lm("DeepseekV2ForCausalLM"),
    build=build,
    names=MOE_NAMES,
    stacks=MOE_STACKS,
    in_parts=True,
    ignore=BUFFERS,
    tiny={
        **TINY_LATENT,
        "num_experts_per_tok": 2,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 2,
        "routed_scaling_factor": 16.0,
        "first_k_dense_replace": 1,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 64,
        },
    },
)
