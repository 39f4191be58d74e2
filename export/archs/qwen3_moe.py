"""Qwen3-MoE (transformers modeling_qwen3_moe.py): Qwen3's attention, routed experts without a shared one."""

from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder, stacks
from llmexport.export.errors import ExportError
from llmexport.export.spec import Arch, Experts, Mask, Model, Moe, Norm, Router, causal_lm, decoder_layer

MOE = "model.layers.{i}.mlp."


def build(config: Config) -> Model:
    d = decoder(config, head_size=128)
    norm, bias, activation = d.norm(), config.flag("attention_bias"), d.activation()
    # What trainers wrote beside, and nothing reads: the blocks are these whatever it says.
    config.expect("qkv_bias", bias)
    config.expect("use_qk_norm", True)
    config.expect("shared_expert_intermediate_size", 0)
    config.get("max_window_layers", None)
    experts, top_k = count(config), config.count("num_experts_per_tok", 8)
    moe = Moe(
        Router(d.hidden, experts, top_k, "softmax", renormalise=config.flag("norm_topk_prob")),
        Experts(d.hidden, config.length("moe_intermediate_size", 768), experts, top_k, activation),
    )
    dense, step = config.layer_set("mlp_only_layers", ()), config.integer("decoder_sparse_step", 1)
    plain = d.mlp(activation=activation)
    attention = d.attention(qkv_bias=bias, out_bias=bias, qk_norm=Norm(d.head_size, norm.epsilon))
    window = config.window("sliding_window", absent=4096) if config.flag("use_sliding_window") else None
    reads = (config.rotary(d.head_size), Mask(window))
    layers = []
    for i in range(d.layers):
        mlp = plain if i in dense or (i + 1) % step else moe
        layers.append((decoder_layer(norm, attention, norm, mlp), reads))
    return d.model(layers, norm, tied=False)


def count(config: Config) -> int:
    """How many experts there are; transformers 5 writes num_local_experts."""
    name, older = "num_local_experts", "num_experts"
    found = config.count(name if config.has(name) else older, 128)
    if config.has(name) and config.has(older) and config.count(older) != found:
        raise ExportError(f"config.json: {older} and {name} differ: remove one")
    return found


ARCH = Arch(
    model_types=("qwen3_moe",),
    adds="q and k norms, experts, softmax over all",
    reference=causal_lm("Qwen3MoeForCausalLM"),
    build=build,
    names={**NAMES, "layers.{i}.mlp.router.": MOE + "gate."},
    stacks=stacks(MOE),
    in_parts=True,
    ignore=BUFFERS,
    tiny={
        **TINY,
        "head_dim": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "attention_bias": False,
    },
)
