"""SmolLM3 (transformers modeling_smollm3.py): Llama with every fourth layer without RoPE."""

from llmexport.export.archs.llama4 import rotated
from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder
from llmexport.export.spec import Arch, Mask, Model, causal_lm, decoder_layer


def build(config: Config) -> Model:
    bias = config.flag("attention_bias")
    d = decoder(config)
    norm, mlp = d.norm(), d.mlp(bias=config.flag("mlp_bias"))
    rotary, turning = config.rotary(d.head_size, 2000000.0), rotated(config, d.layers)
    # Nothing reads it: layers without RoPE are the ones that slide, if any do.
    config.get("max_window_layers", None)
    window = config.window("sliding_window", absent=None) if config.flag("use_sliding_window") else None
    kinds = {"full_attention": Mask(), **({"sliding_attention": Mask(window)} if window else {})}
    derived = ["sliding_attention" if window and not turn else "full_attention" for turn in turning]
    layers = []
    for mask, turn in zip(config.layer_types(kinds, derived), turning, strict=True):
        attention = d.attention(qkv_bias=bias, out_bias=bias, rotated=None if turn else 0)
        layers.append((decoder_layer(norm, attention, norm, mlp), (rotary, mask) if turn else (mask,)))
    return d.model(layers, norm, tied=True)


ARCH = Arch(
    model_types=("smollm3",),
    adds="layers without RoPE",
    reference=causal_lm("SmolLM3ForCausalLM"),
    build=build,
    names=NAMES,
    ignore=BUFFERS,
    tiny={
        **TINY,
        "attention_bias": False,
        "mlp_bias": False,
        "no_rope_layers": [1, 0, 1],
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
    },
)
