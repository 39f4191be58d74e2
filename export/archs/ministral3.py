"""Ministral 3 and Devstral 2 (transformers modeling_ministral3.py): YaRN, and queries scaled by their position."""

import dataclasses

from llmexport.export.archs.mistral import ARCH as MISTRAL
from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder
from llmexport.export.rope import ORIGINAL, beside
from llmexport.export.spec import Arch, Mask, Model, Temperature, causal_lm, decoder_layer
from llmexport.export.values import as_integer, as_positive

BETA = "llama_4_scaling_beta"


def build(config: Config) -> Model:
    # Without, transformers takes the whole stretch of one release.
    config.get("rope_parameters")
    d = decoder(config, head_size=128)
    norm = d.norm(1e-5)
    rotary = config.rotary(d.head_size, others=(BETA, "max_position_embeddings"))
    interval = as_integer(f"RoPE's {ORIGINAL}", beside(config, ORIGINAL))
    scaled = Temperature(interval, as_positive(f"RoPE's {BETA}", beside(config, BETA)), placed=True)
    layer = decoder_layer(norm, d.attention(temperature=True), norm, d.mlp())
    reads = (rotary, scaled, Mask(config.window("sliding_window", absent=None)))
    return d.model([(layer, reads)] * d.layers, norm, tied=False)


ARCH = Arch(
    model_types=("ministral3",),
    adds="YaRN, a temperature of queries by their position",
    reference=causal_lm("Ministral3ForCausalLM"),
    build=build,
    names=NAMES,
    ignore=BUFFERS,
    multimodal=tuple(dataclasses.replace(m, text_types=("ministral3",)) for m in MISTRAL.multimodal),
    tiny={
        **TINY,
        "head_dim": 32,
        "pad_token_id": 0,
        "sliding_window": None,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.5,
        },
    },
)
