"""GPT-Neo (transformers modeling_gpt_neo.py), GPT-3's pattern: layers that see a window among those that see all."""

from collections.abc import Iterator
from typing import Any

from llmexport.export.archs.gpt2 import NAMES
from llmexport.export.config import Config
from llmexport.export.decoder import PLAIN, head_size
from llmexport.export.errors import ExportError
from llmexport.export.spec import Arch, Attention, Embedding, Head, Mask, Mlp, Model, Norm, causal_lm, decoder_layer
from llmexport.export.stack import wired
from llmexport.export.values import show, whole


def build(config: Config) -> Model:
    hidden, heads, layers = config.length("hidden_size"), config.count("num_heads"), config.count("num_layers")
    norm = Norm(hidden, config.number("layer_norm_epsilon", 1e-5), statistics="layer", bias=True)
    # Logits are not scaled.
    attention = Attention(hidden, heads, heads, head_size(hidden, heads), out_bias=True, rotated=0, scale=1.0)
    inner = config.length("intermediate_size") if config.has("intermediate_size") else 4 * hidden
    mlp = Mlp(hidden, inner, config.choice("activation_function", PLAIN, "gelu_new"), bias=True, gated=False)
    masks = {"global": Mask(), "local": Mask(config.integer("window_size", 256))}
    layer = decoder_layer(norm, attention, norm, mlp)
    placed = [(layer, (masks[kind],)) for kind in kinds(config, layers)]
    vocabulary, tied = config.length("vocab_size"), config.flag("tie_word_embeddings", True)
    embedding = Embedding(vocabulary, hidden, positions=config.length("max_position_embeddings"), offset=0)
    return wired(embedding, placed, Head(norm, vocabulary), tied=tied, static=config.static)


def kinds(config: Config, layers: int) -> list[str]:
    """What each layer sees: `attention_types` are lists of kinds, each with how often it comes."""
    said = config.get("attention_types", [[["global", "local"], 12]])
    try:
        found = list(repeated(said, layers))
    except (TypeError, ValueError):
        found = []
    if len(found) != layers or {*found} - {"global", "local"}:
        raise ExportError(
            f"config.json: attention_types is {show(said)}, expected [[[kinds], times], ...] that make {layers} layers "
            "of 'global' and 'local'"
        )
    config.expect("attention_layers", found)
    return found


def repeated(said: Any, layers: int) -> Iterator[str]:
    for names, times in said:
        if type(whole(times)) is not int or not 0 <= times <= layers or not all(isinstance(n, str) for n in names):
            raise ValueError(times)
        yield from list(names) * int(times)


ARCH = Arch(
    model_types=("gpt_neo",),
    system="GPT-3",
    adds="windows in every other layer, unscaled logits, learned positions, LayerNorms with a bias",
    reference=causal_lm("GPTNeoForCausalLM"),
    build=build,
    names={
        **NAMES,
        "layers.{i}.self_attn.": "transformer.h.{i}.attn.attention.",
        "layers.{i}.self_attn.o_proj.": "transformer.h.{i}.attn.attention.out_proj.",
    },
    base="transformer.",
    # The mask, and what it fills with.
    ignore=("transformer.h.*.attn.attention.bias", "transformer.h.*.attn.attention.masked_bias"),
    tiny={
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": None,
        "num_layers": 3,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1], [["global"], 1]],
        "window_size": 8,
        "max_position_embeddings": 512,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
)
