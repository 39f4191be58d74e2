"""Gemma 3, text (transformers modeling_gemma3.py): five sliding layers to a full one, each kind with its own RoPE;
with its tower the tokens of a picture see each other."""

from llmexport.export.archs.gemma2 import ACTIVATIONS, NORMS
from llmexport.export.archs.towers.gemma3 import TOWER
from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder
from llmexport.export.spec import Arch, Mask, Model, Multimodal, Norm, causal_lm, decoder_layer

# transformers reads some keys of other kinds from beside the kinds of layer, where nobody writes them.
ROPE = {"default": "default", "linear": "linear"}


def build(config: Config) -> Model:
    config.expect("use_bidirectional_attention", False, None)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        config.expect(key, None)
    bias = config.flag("attention_bias")
    d = decoder(config, head_size=256)
    norm = d.norm(offset=1.0, rounding="after_weight")
    mlp = d.mlp(activation=config.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"))
    attention = d.attention(
        qkv_bias=bias,
        out_bias=bias,
        scale=config.number("query_pre_attn_scalar", 256) ** -0.5,
        qk_norm=Norm(d.head_size, norm.epsilon, 1.0, "after_weight"),
    )
    block = decoder_layer(norm, attention, norm, mlp, mixer_output_norm=norm, mlp_output_norm=norm)
    local = config.rotary(
        d.head_size, 10000.0, types=ROPE, layer_kind="sliding_attention", theta_key="rope_local_base_freq"
    )
    sees = config.splice is not None
    slides = (local, Mask(config.integer("sliding_window", 4096), pictures=sees))
    full = (config.rotary(d.head_size, 1000000.0, types=ROPE, layer_kind="full_attention"), Mask(pictures=sees))
    pattern = config.integer("sliding_window_pattern", 6)
    # Written by transformers beside layer_types, and not read again.
    config.expect("_sliding_window_pattern", pattern, None)
    derived = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(d.layers)]
    reads = config.layer_types({"sliding_attention": slides, "full_attention": full}, derived)
    return d.model([(block, r) for r in reads], norm, tied=True, scale=d.hidden**0.5)


ARCH = Arch(
    model_types=("gemma3_text",),
    adds="q and k norms, a RoPE for each kind of layer; vision: pictures of one size, seen both ways",
    reference=causal_lm("Gemma3ForCausalLM"),
    build=build,
    names={**NAMES, **NORMS},
    ignore=BUFFERS,
    multimodal=(
        Multimodal(
            model_type="gemma3",
            architecture="Gemma3ForConditionalGeneration",
            names={"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
            other_names=({"model.": "model.language_model."},),
            tower=TOWER,
            left_out=tuple(f"{m}{n}.*" for m in ("", "model.") for n in ("vision_tower", "multi_modal_projector")),
            ignore=tuple(f"{m}vision_tower.{n}head.*" for m in ("", "model.") for n in ("", "vision_model.")),
            harmless=(
                "boi_token_index",
                "eoi_token_index",
                "image_token_index",
                "mm_tokens_per_image",
                "vision_config",
            ),
            # The first release says what differs from the class alone.
            defaults={
                "vocab_size": 262208,
                "hidden_size": 2304,
                "intermediate_size": 9216,
                "num_hidden_layers": 26,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "max_position_embeddings": 131072,
            },
        ),
    ),
    # transformers issue 36822 (4B) and pull request 36832 (12B), onnxruntime issue 26732 (270M).
    overflows_float16="published Gemma 3 checkpoints overflow float16 and give nan",
    tiny={
        **{k: v for k, v in TINY.items() if k not in ("hidden_act", "rope_parameters")},
        "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 24,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
        },
        "tie_word_embeddings": True,
    },
)
