"""Qwen3 (transformers modeling_qwen3.py): RMSNorm on every head of q and k; upper layers may slide."""

from llmexport.export.archs.qwen2 import SEEING, masks, note_chunks
from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder
from llmexport.export.spec import Arch, Model, Multimodal, Norm, causal_lm, decoder_layer


def build(config: Config) -> Model:
    note_chunks(config)
    d = decoder(config, head_size=128)
    bias = config.flag("attention_bias")
    norm = d.norm()
    attention = d.attention(qkv_bias=bias, out_bias=bias, qk_norm=Norm(d.head_size, norm.epsilon))
    layer = decoder_layer(norm, attention, norm, d.mlp())
    rotary = config.rotary(d.head_size)
    return d.model([(layer, (rotary, mask)) for mask in masks(config)], norm, tied=False)


ARCH = Arch(
    model_types=("qwen3",),
    adds="q and k norms",
    reference=causal_lm("Qwen3ForCausalLM"),
    build=build,
    names=NAMES,
    ignore=BUFFERS,
    multimodal=(
        Multimodal(
            model_type="qwen3_vl",
            architecture="Qwen3VLForConditionalGeneration",
            names={"model.": "model.language_model."},
            left_out=("model.visual.*",),
            harmless=SEEING,
            sections=True,
            absent=("use_sliding_window", "layer_types"),
            text_types=("qwen3_vl_text",),
            defaults={"rope_theta": 500000.0},
        ),
    ),
    tiny={**TINY, "head_dim": 16, "attention_bias": False, "use_sliding_window": False},
)
