"""Mistral 7B (transformers modeling_mistral.py): every layer looks back over one sliding window."""

from llmexport.export.config import Config
from llmexport.export.decoder import ACTIVATIONS, BUFFERS, NAMES, TINY, decoder
from llmexport.export.spec import Arch, Model


def build(config: Config) -> Model:
    window = config.window("sliding_window", absent=4096)
    return decoder(
        config,
        activation=config.choice("hidden_act", ACTIVATIONS, "silu"),
        tied=False,
        windows=(window,) * config.integer("num_hidden_layers"),
    )


ARCH = Arch(
    model_types=("mistral",),
    causal_lm="MistralForCausalLM",
    build=build,
    names=NAMES,
    ignore=BUFFERS,
    tiny={**TINY, "head_dim": 32, "sliding_window": 8},
)
