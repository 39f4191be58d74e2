"""Phi-3 and Phi-3.5 (transformers modeling_phi3.py): fused projections, sliding window, LongRoPE."""

from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder
from llmexport.export.spec import Arch, Mask, Model, causal_lm, decoder_layer

# The first releases called LongRoPE by other names.
ROPE = {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}
# Microsoft's code, which transformers took over.
CODE = {
    "AutoConfig": "configuration_phi3.Phi3Config",
    "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    "AutoTokenizer": "Xenova/gpt-4o",
}


def build(config: Config) -> Model:
    d = decoder(config, grouped=False)
    # LongRoPE's configs say it; without it, the context was never stretched.
    original = config.integer("original_max_position_embeddings", 4096)
    rotary = config.rotary(d.head_size, partial=1.0, types=ROPE, original=original)
    norm = d.norm(1e-5)
    config.expect("attention_bias", False)
    config.expect_code(CODE)
    layer = decoder_layer(norm, d.attention(fused=True, rotated=rotary.size), norm, d.mlp(fused=True))
    reads = (rotary, Mask(config.window("sliding_window", absent=None)))
    return d.model([(layer, reads)] * d.layers, norm, tied=False)


ARCH = Arch(
    model_types=("phi3",),
    system="Phi-3",
    adds="fused projections, LongRoPE",
    reference=causal_lm("Phi3ForCausalLM"),
    build=build,
    names=NAMES,
    ignore=BUFFERS,
    tiny={
        **TINY,
        "sliding_window": 8,
        "original_max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
