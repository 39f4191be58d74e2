"""Mixtral (transformers modeling_mixtral.py): experts in every layer, softmax over all, the best renormalised."""

from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder, stacks
from llmexport.export.spec import Arch, Experts, Mask, Model, Moe, Router, causal_lm, decoder_layer

MOE = "model.layers.{i}.block_sparse_moe."


def build(config: Config) -> Model:
    d = decoder(config)
    norm = d.norm(1e-5)
    experts, top_k = config.count("num_local_experts", 8), config.count("num_experts_per_tok", 2)
    moe = Moe(
        Router(d.hidden, experts, top_k, "softmax", renormalise=True),
        Experts(d.hidden, config.length("intermediate_size"), experts, top_k, d.activation()),
    )
    reads = (config.rotary(d.head_size, 1000000.0), Mask(config.window("sliding_window", absent=None)))
    return d.model([(decoder_layer(norm, d.attention(), norm, moe), reads)] * d.layers, norm, tied=False)


ARCH = Arch(
    model_types=("mixtral",),
    system="Mixtral",
    adds="experts, softmax over all and renormalised",
    reference=causal_lm("MixtralForCausalLM"),
    build=build,
    names={
        **NAMES,
        "layers.{i}.mlp.": MOE,
        "layers.{i}.mlp.router.": MOE + "gate.",
    },
    stacks=stacks(MOE, "w1", "w3", "w2"),
    in_parts=True,
    ignore=BUFFERS,
    tiny={**TINY, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
)
