"""Command R7B and A (transformers modeling_cohere2.py): Cohere with three sliding layers to a full one without RoPE."""

from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder
from llmexport.export.spec import Arch, Mask, Model, Norm, causal_lm, decoder_layer

# Switches of the code that it was trained with.
TRAINED = {
    "order_of_interleaved_layers": "local_attn_first",
    "position_embedding_type": "rope_gptj",
    "rotary_pct": 1.0,
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_parallel_embedding": False,
}


def build(config: Config) -> Model:
    bias = config.flag("attention_bias")
    d = decoder(config, grouped=False)
    norm = Norm(d.hidden, config.number("layer_norm_eps", 1e-5), statistics="layer")
    mlp, pattern = d.mlp(), config.integer("sliding_window_pattern", 4)
    turns, straight = (
        decoder_layer(
            norm, d.attention(qkv_bias=bias, out_bias=bias, interleaved=True, rotated=r), None, mlp, parallel=True
        )
        for r in (None, 0)
    )
    slides = (config.rotary(d.head_size), Mask(config.integer("sliding_window", 4096)))
    kinds = {"sliding_attention": (turns, slides), "full_attention": (straight, (Mask(),))}
    derived = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(d.layers)]
    for key, value in TRAINED.items():
        config.expect(key, value)
    # What says again how many layers there are to a full one.
    for key in ("layer_switch", "_sliding_window_pattern"):
        config.expect(key, pattern, None)
    layers = config.layer_types(kinds, derived)
    return d.model(layers, norm, tied=True, logit_scale=config.number("logit_scale", 0.0625))


ARCH = Arch(
    model_types=("cohere2",),
    adds="Cohere's parallel layers, sliding ones with RoPE, full ones without",
    reference=causal_lm("Cohere2ForCausalLM"),
    build=build,
    names=NAMES,
    ignore=BUFFERS,
    tiny={
        **{k: v for k, v in TINY.items() if k != "rms_norm_eps"},
        "layer_norm_eps": 1e-5,
        "logit_scale": 2.0,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
    },
)
