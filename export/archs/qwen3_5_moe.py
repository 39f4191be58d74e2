"""Qwen3.5-MoE (transformers modeling_qwen3_5_moe.py): Qwen3.5 with many small experts beside a gated shared one."""

from llmexport.export.archs.qwen3_5 import AHEAD, TINY_HYBRID, hybrid, multimodal
from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, decoder, stacks
from llmexport.export.spec import Arch, Experts, Mlp, Model, Moe, Router, SharedExpert, causal_lm

MOE = "model.layers.{i}.mlp."


def build(config: Config) -> Model:
    d = decoder(config, head_size=256)
    activation = d.activation()
    experts, top_k = config.count("num_experts", 256), config.count("num_experts_per_tok", 8)
    moe = Moe(
        Router(d.hidden, experts, top_k, "softmax", renormalise=True),
        Experts(d.hidden, config.length("moe_intermediate_size", 512), experts, top_k, activation),
        SharedExpert(Mlp(d.hidden, config.length("shared_expert_intermediate_size", 512), activation), gated=True),
    )
    return hybrid(d, moe)


ARCH = Arch(
    model_types=("qwen3_5_moe_text",),
    system="Qwen3.5-MoE",
    adds="gated delta nets, gated attention, mRoPE, shared expert; vision: packed patches",
    reference=causal_lm("Qwen3_5MoeForCausalLM"),
    build=build,
    names={
        **NAMES,
        "layers.{i}.mlp.router.": MOE + "gate.",
        "layers.{i}.mlp.shared_expert.gate.": MOE + "shared_expert_gate.",
    },
    stacks=stacks(MOE),
    ignore=(*AHEAD, *BUFFERS),
    multimodal=multimodal("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration"),
    tiny={
        **{k: v for k, v in TINY_HYBRID.items() if k != "intermediate_size"},
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
)
