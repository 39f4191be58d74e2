"""Phi-3.5-MoE (transformers modeling_phimoe.py): experts that a sparse mixer chooses, LayerNorm, biases, LongRoPE.

transformers 5 turns long texts by the short factors; here they turn by the long ones, as in Microsoft's code.
"""

from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder, stacks
from llmexport.export.rope import ORIGINAL
from llmexport.export.spec import Arch, Experts, Mask, Model, Moe, Router, causal_lm, decoder_layer

MOE = "model.layers.{i}.block_sparse_moe."
ROPE = {"default": "default", "longrope": "longrope with mscales"}
# Microsoft's code, which transformers took over.
CODE = {
    "AutoConfig": "configuration_phimoe.PhiMoEConfig",
    "AutoModelForCausalLM": "modeling_phimoe.PhiMoEForCausalLM",
}


def build(config: Config) -> Model:
    config.expect_code(CODE)
    # Of training alone.
    config.leave(("input_jitter_noise",))
    # The mixer makes two choices, whatever is said.
    config.expect("num_experts_per_tok", 2)
    d = decoder(config)
    norm, bias = d.norm(1e-5, statistics="layer", bias=True), config.flag("attention_bias")
    original = config.integer(ORIGINAL) if config.has(ORIGINAL) else None
    rotary = config.rotary(d.head_size, 1000000.0, types=ROPE, original=original)
    experts, jitter = config.count("num_local_experts", 16, least=2), config.number("router_jitter_noise", 0.01)
    moe = Moe(
        Router(d.hidden, experts, 2, "sparse_mixer", jitter=jitter),
        Experts(d.hidden, config.length("intermediate_size"), experts, 2, d.activation()),
    )
    layer = decoder_layer(norm, d.attention(qkv_bias=bias, out_bias=bias), norm, moe)
    reads = (rotary, Mask(config.window("sliding_window", absent=None)))
    return d.model([(layer, reads)] * d.layers, norm, tied=False, head_bias=config.flag("lm_head_bias"))


ARCH = Arch(
    model_types=("phimoe",),
    adds="experts of a sparse mixer, LayerNorm, a bias on attention and head, LongRoPE with magnitudes",
    reference=causal_lm("PhimoeForCausalLM", made_by="phimoe", aliases=("PhiMoEForCausalLM",)),
    build=build,
    names={
        **NAMES,
        "layers.{i}.mlp.": MOE,
        "layers.{i}.mlp.router.": MOE + "gate.",
        "head.bias": "lm_head.bias",
    },
    stacks=stacks(MOE, "w1", "w3", "w2"),
    in_parts=True,
    ignore=BUFFERS,
    tiny={
        **TINY,
        "attention_bias": True,
        "lm_head_bias": True,
        "num_local_experts": 6,
        # Large, so that tiny experts are within it.
        "router_jitter_noise": 0.2,
        "sliding_window": None,
    },
)
