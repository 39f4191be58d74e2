"""Qwen 1.5, 2 and 2.5 (transformers modeling_qwen2.py): bias on q, k and v; upper layers may slide."""

from llmexport.export.config import Config
from llmexport.export.decoder import ACTIVATIONS, BUFFERS, NAMES, TINY, decoder
from llmexport.export.errors import ExportError
from llmexport.export.spec import Arch, Model


def windows(config: Config) -> tuple[int | None, ...]:
    layers = config.integer("num_hidden_layers")
    first = config.integer("max_window_layers", 28, least=0)
    window = config.window("sliding_window", absent=4096)
    if not config.flag("use_sliding_window"):
        window = None
    derived = ["sliding_attention" if window and i >= first else "full_attention" for i in range(layers)]
    kinds = config.get("layer_types", derived)
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ExportError(f"config.json: layer_types must list {layers} kinds of attention, found {kinds!r}")
    choices = {"full_attention": None, "sliding_attention": window}
    unknown = sorted({str(k) for k in kinds} - choices.keys())
    if unknown:
        raise ExportError(f"config.json: layer_types names {', '.join(unknown)}, known are {', '.join(choices)}")
    if window is None and "sliding_attention" in kinds:
        raise ExportError("config.json: layer_types has sliding_attention, but no sliding_window is in use")
    return tuple(choices[k] for k in kinds)


def build(config: Config) -> Model:
    config.expect("use_mrope", False)
    return decoder(
        config,
        activation=config.choice("hidden_act", ACTIVATIONS, "silu"),
        tied=False,
        qkv_bias=True,
        windows=windows(config),
    )


ARCH = Arch(
    model_types=("qwen2",),
    causal_lm="Qwen2ForCausalLM",
    build=build,
    names=NAMES,
    ignore=BUFFERS,
    tiny={
        **TINY,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
)
