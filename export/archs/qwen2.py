"""Qwen 1.5, 2 and 2.5 (transformers modeling_qwen2.py): bias on q, k and v; upper layers may slide."""

from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder
from llmexport.export.errors import ExportError
from llmexport.export.rope import ORIGINAL
from llmexport.export.spec import Arch, Mask, Model, Multimodal, causal_lm, decoder_layer
from llmexport.export.values import as_integer

# What the configs of models that see have beside the keys of their text model.
SEEING = (
    "image_token_id",
    "video_token_id",
    "vision_config",
    "vision_end_token_id",
    "vision_start_token_id",
    "vision_token_id",
)


def masks(config: Config) -> tuple[Mask, ...]:
    """The mask of every layer: those from max_window_layers on slide, if any do."""
    layers = config.count("num_hidden_layers")
    first = config.integer("max_window_layers", 28, least=0)
    window = config.window("sliding_window", absent=4096)
    if not config.flag("use_sliding_window"):
        window = None
    derived = ["sliding_attention" if window and i >= first else "full_attention" for i in range(layers)]
    slides = config.layer_types({"full_attention": False, "sliding_attention": True}, derived)
    if window is None and any(slides):
        raise ExportError("config.json: layer_types has sliding_attention, but no sliding_window is in use")
    return tuple(Mask(window if s else None) for s in slides)


def note_chunks(config: Config) -> None:
    """Notes what a config asks for beyond the length that the model was trained at, which transformers leaves out."""
    found = config.get("dual_chunk_attention_config", None)
    if found is None:
        return
    length = as_integer(
        f"dual_chunk_attention_config's {ORIGINAL}", found.get(ORIGINAL) if isinstance(found, dict) else found
    )
    config.notes.append(
        f"config.json: dual_chunk_attention_config is left out, as transformers does: right up to {length} tokens"
    )


def build(config: Config) -> Model:
    config.expect("use_mrope", False)
    note_chunks(config)
    d = decoder(config)
    norm = d.norm()
    layer = decoder_layer(norm, d.attention(qkv_bias=True), norm, d.mlp())
    rotary = config.rotary(d.head_size)
    return d.model([(layer, (rotary, mask)) for mask in masks(config)], norm, tied=False)


ARCH = Arch(
    model_types=("qwen2",),
    system="Qwen1.5, Qwen2",
    adds="bias on q, k, v; sliding window in the upper layers",
    reference=causal_lm("Qwen2ForCausalLM"),
    build=build,
    names=NAMES,
    ignore=BUFFERS,
    multimodal=tuple(
        Multimodal(
            model_type=kind,
            architecture=architecture,
            names={},
            other_names=({"model.": "model.language_model."},),
            left_out=("visual.*",),
            ignore=("model.visual.*",),
            harmless=SEEING,
            flat=True,
            sections=True,
            text_types=(f"{kind}_text",),
            defaults={"max_window_layers": 80, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0},
        )
        for kind, architecture in (
            ("qwen2_vl", "Qwen2VLForConditionalGeneration"),
            ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
        )
    ),
    tiny={
        **TINY,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
)
