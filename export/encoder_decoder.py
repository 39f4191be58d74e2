"""An encoder that reads a text, and a decoder that goes on from it: two graphs of one model."""

from __future__ import annotations

import dataclasses
from typing import Any

from llmexport.export.spec import (
    SEQUENCE,
    SOURCE,
    SOURCE_IDS,
    SOURCE_PADDING,
    TOTAL,
    Attention,
    BidirectionalMask,
    CrossAttention,
    CrossKeys,
    CrossMask,
    Embedding,
    Graph,
    Head,
    Layer,
    Mask,
    Mlp,
    Model,
    Norm,
    Port,
    RelativeBias,
    Sublayer,
    cross_keys,
)
from llmexport.export.wiring import Wiring

ALONG_SOURCE = (SOURCE_IDS.shape[0], SOURCE)
STEP_IDS = Port("decoder_input_ids", (SOURCE_IDS.shape[0], SEQUENCE), "int64", "tokens")
STEP_PADDING = Port("decoder_attention_mask", (SOURCE_IDS.shape[0], TOTAL), "int64", "padding")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What both sides of such a model have in common, and how many layers each has."""

    vocabulary: int
    norm: Norm
    mlp: Mlp
    heads: int
    head_size: int
    buckets: int
    distance: int
    encoder_layers: int
    decoder_layers: int

    @property
    def hidden(self) -> int:
        return self.norm.size


def paired(sizes: Sizes, head: Head, *, mlp: str) -> Model:
    """Both graphs, of layers without a bias that norm what they read and share one relative bias (modeling_t5.py).

    `mlp` is the name of that sublayer. The tables of words are one, and the head a matrix of its own.
    """
    tables = {f"{side}.embedding.weight": "embedding.weight" for side in ("encoder", "decoder")}
    return Model((_encoder(sizes, mlp), _decoder(sizes, head, mlp)), tables)


def _attention(sizes: Sizes, **fields: Any) -> Attention:
    heads = sizes.heads
    return Attention(sizes.hidden, heads, heads, sizes.head_size, rotated=0, scale=1.0, biased=True, **fields)


def _encoder(sizes: Sizes, mlp: str) -> Graph:
    wiring = Wiring("encoder")
    wiring.take(SOURCE_IDS, SOURCE_PADDING)
    table = Embedding(sizes.vocabulary, sizes.hidden, axes=ALONG_SOURCE)
    (hidden,) = wiring.place("embedding", table, ["hidden.0"], path="encoder.embedding.")
    wiring.place("mask", BidirectionalMask(SOURCE))
    bias = RelativeBias(sizes.heads, sizes.buckets, sizes.distance, both_ways=True)
    wiring.place("relative_bias", bias, path="encoder.relative_bias.")
    norm = dataclasses.replace(sizes.norm, axes=ALONG_SOURCE)
    attention = _attention(sizes, cached=False, axes=ALONG_SOURCE)
    wide = dataclasses.replace(sizes.mlp, axes=ALONG_SOURCE)
    layer = Layer((Sublayer("self_attn", attention, norm), Sublayer(mlp, wide, norm)))
    for i in range(sizes.encoder_layers):
        gives, path = [f"hidden.{i + 1}"], f"encoder.layers.{i}."
        (hidden,) = wiring.place(f"layers.{i}", layer, gives, path=path, hidden=hidden)
    wiring.place("norm", norm, ["encoded"], path="encoder.norm.", hidden=hidden)
    keys = CrossKeys(sizes.hidden, sizes.heads, sizes.head_size)
    for i in range(sizes.decoder_layers):
        ports = cross_keys(sizes.heads, sizes.head_size, f".{i}")
        wiring.place(f"cross.{i}", keys, [p.name for p in ports], path=f"decoder.layers.{i}.cross_attn.")
        wiring.give(*ports)
    return wiring.done()


def _decoder(sizes: Sizes, head: Head, mlp: str) -> Graph:
    wiring, padding = Wiring("decoder"), CrossMask().inputs[0]
    wiring.take(STEP_IDS, STEP_PADDING, padding)
    wiring.take(*(p for i in range(sizes.decoder_layers) for p in cross_keys(sizes.heads, sizes.head_size, f".{i}")))
    table = Embedding(sizes.vocabulary, sizes.hidden)
    (hidden,) = wiring.place("embedding", table, ["hidden.0"], path="decoder.embedding.", input_ids=STEP_IDS.name)
    wiring.place("mask", Mask(), attention_mask=STEP_PADDING.name, input_ids=STEP_IDS.name)
    bias = RelativeBias(sizes.heads, sizes.buckets, sizes.distance)
    wiring.place("relative_bias", bias, path="decoder.relative_bias.")
    wiring.place("cross_mask", CrossMask())
    cross = CrossAttention(sizes.hidden, sizes.heads, sizes.head_size, scale=1.0)
    sublayers = (
        Sublayer("self_attn", _attention(sizes), sizes.norm),
        Sublayer("cross_attn", cross, sizes.norm),
        Sublayer(mlp, sizes.mlp, sizes.norm),
    )
    for i in range(sizes.decoder_layers):
        gives, path = [f"hidden.{i + 1}"], f"decoder.layers.{i}."
        seen: dict[str, Any] = {f"cross_{n}": f"cross_{n}.{i}" for n in ("key", "value")}
        (hidden,) = wiring.place(f"layers.{i}", Layer(sublayers), gives, state=f"{i}", path=path, hidden=hidden, **seen)
    wiring.place("head", head, hidden=hidden)
    wiring.give(*head.outputs)
    return wiring.done()
