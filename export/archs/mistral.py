"""Mistral 7B (transformers modeling_mistral.py): every layer looks back over one sliding window."""

from llmexport.export.config import Config
from llmexport.export.decoder import ACTIVATIONS, BUFFERS, NAMES, decoder
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
    tiny={
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "sliding_window": 8,
        "tie_word_embeddings": False,
    },
)
