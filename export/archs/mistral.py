"""Mistral 7B (transformers modeling_mistral.py): every layer looks back over one sliding window."""

from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder
from llmexport.export.spec import Arch, Mask, Model, causal_lm, decoder_layer


def build(config: Config) -> Model:
    d = decoder(config)
    norm = d.norm()
    layer = decoder_layer(norm, d.attention(), norm, d.mlp())
    reads = (config.rotary(d.head_size), Mask(config.window("sliding_window", absent=4096)))
    return d.model([(layer, reads)] * d.layers, norm, tied=False)


ARCH = Arch(
    model_types=("mistral",),
    reference=causal_lm("MistralForCausalLM"),
    build=build,
    names=NAMES,
    ignore=BUFFERS,
    tiny={**TINY, "head_dim": 32, "sliding_window": 8},
)
