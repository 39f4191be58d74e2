"""What the configs of DeBERTa 1 and 2 say in the same words, and the blocks that follow from it."""

from __future__ import annotations

from types import MappingProxyType

from llmexport.export.config import Config
from llmexport.export.decoder import PLAIN, head_size
from llmexport.export.encoder import names as names_of_bert
from llmexport.export.errors import ExportError
from llmexport.export.spec import (
    DisentangledAttention,
    Embedding,
    Head,
    Layer,
    Mlp,
    Model,
    Norm,
    RelativePositions,
    Sublayer,
)
from llmexport.export.stack import wired
from llmexport.export.values import show

HEAD, PUBLISHED = "cls.predictions.", "lm_predictions.lm_head."
# What the head for masked tokens is called in the checkpoints that the authors published.
OLDER = MappingProxyType(
    {f"{HEAD}transform.{of}.{n}": f"{PUBLISHED}{of}.{n}" for of in ("dense", "LayerNorm") for n in ("weight", "bias")}
    | {f"{HEAD}bias": f"{PUBLISHED}bias"}
)
NAMES = MappingProxyType(
    {
        **names_of_bert("deberta."),
        "relative_positions.": "deberta.encoder.rel_embeddings.",
        "relative_positions.norm.": "deberta.encoder.LayerNorm.",
        "head.transform.": f"{HEAD}transform.dense.",
        "head.norm.": f"{HEAD}transform.LayerNorm.",
        "head.projection.": f"{HEAD}decoder.",
        "head.bias": f"{HEAD}bias",
    }
)
# Tensors of published checkpoints that no head for masked tokens reads: absolute positions may be left, too.
IGNORE = (
    "deberta.embeddings.position_embeddings.weight",
    "deberta.embeddings.position_ids",
    "deberta.embeddings.word_embeddings._weight",
    "cls.predictions.bias",
    "mask_predictions.*",
    "pooler.dense.*",
)
TINY = MappingProxyType(
    {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-7,
        "max_position_embeddings": 320,
        "max_relative_positions": 48,
        "relative_attention": True,
        "position_biased_input": False,
        "pos_att_type": ["p2c", "c2p"],
        "type_vocab_size": 0,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
    }
)


def encoder(config: Config, *, fused: bool, buckets: int = 0, shared: bool = False, normed: bool = False) -> Model:
    """An encoder whose layers norm their sums, with a head for masked tokens (modeling_deberta.py).

    `buckets` of distances are logarithmic, 0 means that all are told apart; `shared` and `fused` are those of
    DisentangledAttention; `normed`: the vectors of distances have a norm.
    """
    hidden, heads = config.length("hidden_size"), config.count("num_attention_heads")
    size, kinds = head_size(hidden, heads), position_kinds(config)
    config.expect("embedding_size", hidden)
    config.expect("attention_head_size", size)
    config.get("padding_idx", None)
    activation = config.choice("hidden_act", PLAIN, "gelu")
    norm = Norm(hidden, config.number("layer_norm_eps", 1e-7), statistics="layer", bias=True)
    positions = config.length("max_position_embeddings", 512)
    apart = config.integer("max_relative_positions", -1, least=-1)
    most = config.length("max_relative_positions") if apart > 0 else positions
    if buckets and not 4 <= buckets < 2 * (most - 1):
        raise ExportError(
            f"config.json: position_buckets is {buckets}, distances are told apart up to {most}: expected 4 or more, "
            f"and less than {2 * (most - 1)}"
        )
    placed, span = config.flag("relative_attention") and kinds, buckets or most
    attention = DisentangledAttention(
        hidden, heads, size, span, (size * (1 + len(kinds))) ** -0.5,
        to_position=bool(placed and "c2p" in kinds), from_position=bool(placed and "p2c" in kinds),
        shared=shared, fused=fused,
    )  # fmt: skip
    mlp = Mlp(hidden, config.length("intermediate_size"), activation, bias=True, gated=False)
    layer = Layer((Sublayer("self_attn", attention, sum_norm=norm), Sublayer("mlp", mlp, sum_norm=norm)))
    relative = RelativePositions(span, hidden, most if buckets else 0, norm if normed else None)
    vocabulary, types = config.length("vocab_size"), config.count("type_vocab_size", 0, least=0)
    absolute = positions if config.flag("position_biased_input", True) else 0
    embedding = Embedding(vocabulary, hidden, types=types, positions=absolute, norm=norm, masked=True)
    layers = [(layer, (relative,) if placed else ())] * config.count("num_hidden_layers")
    head = Head(norm, vocabulary, transform=activation, bias=True)
    # The later head of transformers always reads the table of words.
    tied, legacy = config.flag("tie_word_embeddings", True), config.flag("legacy", True)
    return wired(embedding, layers, head, tied=tied or not legacy, static=config.static)


def position_kinds(config: Config) -> tuple[str, ...]:
    """What distances say: c2p of a query, p2c of a key."""
    said = config.get("pos_att_type", None)
    kinds = said.lower().split("|") if isinstance(said, str) else said or []
    kinds = [k.strip() if isinstance(k, str) else k for k in kinds] if isinstance(kinds, list) else [None]
    if not all(k in ("c2p", "p2c") for k in kinds) or len({*kinds}) < len(kinds):
        raise ExportError(f"config.json: pos_att_type is {show(said)}, this architecture knows 'c2p' and 'p2c'")
    return tuple(kinds)
