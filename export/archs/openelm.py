"""OpenELM (apple/OpenELM-270M modeling_openelm.py): heads and MLP widths of each layer are its own.

Its cache keeps keys that RoPE has not turned yet; here they are turned before, which gives the same logits: a query
and a key meet at the same two positions either way.
"""

from collections.abc import Callable
from typing import Any

from llmexport.export.config import Config
from llmexport.export.decoder import ACTIVATIONS
from llmexport.export.errors import ExportError
from llmexport.export.spec import (
    Arch,
    Attention,
    Embedding,
    Head,
    Mask,
    Mlp,
    Model,
    Norm,
    Rotary,
    causal_lm,
    decoder_layer,
)
from llmexport.export.stack import wired
from llmexport.export.values import as_integer, as_positive, show

CODE = {
    "AutoConfig": "configuration_openelm.OpenELMConfig",
    "AutoModelForCausalLM": "modeling_openelm.OpenELMForCausalLM",
}
LAYER = "transformer.layers.{i}."


def build(config: Config) -> Model:
    config.expect_code(CODE)
    config.expect("normalization_layer_name", "rms_norm")
    config.expect("ffn_with_glu", True)
    # Lengths of tables that grow where they end, and what the lists below were made of.
    config.leave(("max_context_length", "rope_max_length", "num_gqa_groups", "qkv_multipliers"))
    hidden, size = config.length("model_dim"), config.length("head_dim", 128)
    layers, divisor = config.count("num_transformer_layers"), config.integer("ffn_dim_divisor", 256)
    activation = config.choice("activation_fn_name", ACTIVATIONS, "swish")
    norm = Norm(hidden, 1e-6)
    heads_norm = Norm(size, 1e-6) if config.flag("normalize_qk_projections", True) else None
    reads = (Rotary(size, config.number("rope_freq_constant", 10000)), Mask())
    blocks = []
    each = (
        _each(config, "num_query_heads", layers, as_integer),
        _each(config, "num_kv_heads", layers, as_integer),
        _each(config, "ffn_multipliers", layers, as_positive),
    )
    for heads, kv_heads, multiplier in zip(*each, strict=True):
        attention = Attention(hidden, heads, kv_heads, size, fused=True, qk_norm=heads_norm)
        mlp = Mlp(hidden, _divisible(multiplier * hidden, divisor), activation, fused=True)
        blocks.append((decoder_layer(norm, attention, norm, mlp), reads))
    vocabulary, tied = config.length("vocab_size"), config.flag("share_input_output_layers", True)
    config.expect("tie_word_embeddings", tied, True)
    return wired(Embedding(vocabulary, hidden), blocks, Head(norm, vocabulary), tied=tied, static=config.static)


def _each(config: Config, key: str, layers: int, read: Callable[[str, Any], Any]) -> list[Any]:
    """A number for each layer."""
    found = config.get(key)
    if not isinstance(found, list) or len(found) != layers:
        raise ExportError(f"config.json: {key} is {show(found)}, expected a list of {layers} numbers")
    return [read(f"{key}[{i}]", n) for i, n in enumerate(found)]


def _divisible(width: float, divisor: int) -> int:
    """The nearest multiple of the divisor that is at least 0.9 of the width (make_divisible)."""
    found = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return found + divisor if found < 0.9 * width else found


ARCH = Arch(
    model_types=("openelm",),
    system="OpenELM",
    adds="heads and MLP widths of each layer its own, fused q, k, v and gate, up",
    reference=causal_lm("OpenELMForCausalLM", made_by="openelm"),
    build=build,
    names={
        "embedding.": "transformer.token_embeddings.",
        "layers.{i}.self_attn.": LAYER + "attn.",
        "layers.{i}.self_attn.o_proj.": LAYER + "attn.out_proj.",
        "layers.{i}.self_attn_input_norm.": LAYER + "attn_norm.",
        "layers.{i}.mlp.gate_up_proj.": LAYER + "ffn.proj_1.",
        "layers.{i}.mlp.down_proj.": LAYER + "ffn.proj_2.",
        "layers.{i}.mlp_input_norm.": LAYER + "ffn_norm.",
        "head.norm.": "transformer.norm.",
        "head.projection.": "lm_head.",
    },
    base="transformer.",
    tiny={
        "vocab_size": 256,
        "model_dim": 64,
        "head_dim": 16,
        "num_transformer_layers": 3,
        "num_query_heads": [4, 6, 8],
        "num_kv_heads": [2, 3, 2],
        "ffn_multipliers": [0.5, 1.7, 4.0],
        "ffn_dim_divisor": 16,
        "ffn_with_glu": True,
        "activation_fn_name": "swish",
        "normalization_layer_name": "rms_norm",
        "normalize_qk_projections": True,
        "rope_freq_constant": 10000,
        "rope_max_length": 512,
        "max_context_length": 256,
        "share_input_output_layers": True,
    },
)
