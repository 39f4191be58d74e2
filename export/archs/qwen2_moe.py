"""Qwen1.5-MoE and Qwen2-MoE (transformers modeling_qwen2_moe.py): routed experts beside a gated shared one."""

from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder, stacks
from llmexport.export.spec import Arch, Experts, Mask, Mlp, Model, Moe, Router, SharedExpert, causal_lm, decoder_layer

MOE = "model.layers.{i}.mlp."


def build(config: Config) -> Model:
    d = decoder(config)
    norm = d.norm()
    activation = d.activation()
    experts, top_k = config.count("num_experts", 60), config.count("num_experts_per_tok", 4)
    renormalise = config.flag("norm_topk_prob")
    moe = Moe(
        Router(d.hidden, experts, top_k, "softmax", renormalise=renormalise),
        Experts(d.hidden, config.length("moe_intermediate_size", 1408), experts, top_k, activation),
        SharedExpert(Mlp(d.hidden, config.length("shared_expert_intermediate_size", 5632), activation), gated=True),
    )
    dense, step = config.layer_set("mlp_only_layers", ()), config.integer("decoder_sparse_step", 1)
    attention = d.attention(qkv_bias=config.flag("qkv_bias", True))
    rotary = config.rotary(d.head_size)
    plain = d.mlp(activation=activation)
    layers = []
    for i, mask in enumerate(masks(config, d.layers)):
        mlp = plain if i in dense or (i + 1) % step else moe
        layers.append((decoder_layer(norm, attention, norm, mlp), (rotary, mask)))
    return d.model(layers, norm, tied=False)


def masks(config: Config, layers: int) -> tuple[Mask, ...]:
    """The mask of every layer: every other one below max_window_layers slides, if any do."""
    last = config.integer("max_window_layers", 28, least=0)
    if not config.flag("use_sliding_window"):
        config.get("sliding_window", None)
        return config.layer_types({"full_attention": Mask()}, ["full_attention"] * layers)
    derived = ["sliding_attention" if (i + 1) % 2 and i < last else "full_attention" for i in range(layers)]
    window = config.integer("sliding_window", 4096)
    return config.layer_types({"full_attention": Mask(), "sliding_attention": Mask(window)}, derived)


ARCH = Arch(
    model_types=("qwen2_moe",),
    system="Qwen1.5-MoE, Qwen2-MoE",
    adds="routed experts beside a gated shared one",
    reference=causal_lm("Qwen2MoeForCausalLM"),
    build=build,
    names={
        **NAMES,
        "layers.{i}.mlp.router.": MOE + "gate.",
        "layers.{i}.mlp.shared_expert.gate.": MOE + "shared_expert_gate.",
    },
    stacks=stacks(MOE),
    in_parts=True,
    ignore=BUFFERS,
    tiny={
        **TINY,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "norm_topk_prob": False,
        "mlp_only_layers": [1],
    },
)
