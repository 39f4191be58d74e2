"""A stack of layers between an embedding and a head, as one graph: decoders and encoders."""

from __future__ import annotations

from collections.abc import Iterable

from llmexport.export.assembly import HEAD, TABLE
from llmexport.export.errors import ExportError
from llmexport.export.spec import (
    ONLY,
    Attention,
    Block,
    DeltaTimeMix,
    Embedding,
    Head,
    Layer,
    Model,
    PerLayerEmbedding,
    Splice,
)
from llmexport.export.static import StaticCache, with_slots
from llmexport.export.wiring import Wiring

# What such graphs take besides their states, in this order.
TOKENS = ("input_ids", "position_ids", "attention_mask", "token_type_ids")


def wired(
    embedding: Embedding,
    layers: Iterable[tuple[Layer, tuple[Block, ...]]],
    head: Head,
    *,
    tied: bool,
    static: StaticCache | None = None,
    splice: Splice | None = None,
    told: PerLayerEmbedding | None = None,
) -> Model:
    """Tokens and past states to logits and present states.

    `layers` are the blocks and the context that each reads; `tied`: the head's projection is the embedding table, and
    its bias, if it has one, the one that stands beside it. `static`: what a static cache keeps; `splice` puts pictures
    into the text, which an earlier graph has seen; `told` is what every layer reads of its own. A layer that borrows
    keys and values reads those of the last one before it that lends them and has its context; layers behind the first
    DeltaTimeMix read its values. Raises ExportError if there is no cache that could have slots, or if no word stands
    for a picture.
    """
    layers, wiring = list(layers), Wiring("decoder" if splice else ONLY)
    if static is not None:
        if not any(block.states for block, _ in layers):
            raise ExportError("--cache static: this model reads a row at once and keeps no cache: leave --cache out")
        layers = [with_slots(block, reads, static) for block, reads in layers]
    shared = [b for _, reads in layers for b in reads]
    ports = {p.name: p for b in (embedding, *shared) for p in b.inputs}
    wiring.take(*(ports[n] for n in TOKENS if n in ports))
    if splice:
        if (token := max(splice.tokens)) >= embedding.vocabulary:
            raise ExportError(f"config.json: token {token} stands for pictures, vocab_size is {embedding.vocabulary}")
        wiring.take(splice.inputs[-1])
        wiring.place("embedding", embedding, ["embedded"])
        gives = ["hidden.0", *(p.name for p in splice.outputs[1:])]
        hidden, *_ = wiring.place("splice", splice, gives, hidden="embedded")
    else:
        (hidden,) = wiring.place("embedding", embedding, ["hidden.0"])
    if told:
        if told.vocabulary < embedding.vocabulary:
            raise ExportError(
                f"config.json: vocab_size_per_layer_input is {told.vocabulary}, vocab_size is {embedding.vocabulary}"
            )
        wiring.place("per_layer_embedding", told, [f"layer_input.{i}" for i in range(told.layers)], hidden=hidden)
    wiring.share(shared)
    lent: dict[tuple[Block, ...], dict[str, str]] = {}
    first: dict[str, str] = {}
    for i, (block, reads) in enumerate(layers):
        mixer = block.sublayers[0].block
        given = lent[reads] if isinstance(mixer, Attention) and mixer.borrows else {}
        gives = [f"hidden.{i + 1}", *(f"{p.name}.{i}" for p in getattr(mixer, "lent", ()))]
        given = dict(given, **first, hidden=hidden, layer_input=f"layer_input.{i}")
        hidden, *_ = wiring.place(f"layers.{i}", block, gives, state=f"{i}", context=reads, **given)
        if isinstance(mixer, Attention) and mixer.lends:
            # A static cache that slides does not keep all that its step sees.
            lent[reads] = {f"seen_{n}": f"seen_{n}.{i}" if mixer.lent else f"present.{i}.{n}" for n in ("key", "value")}
        if isinstance(mixer, DeltaTimeMix):
            first |= {p.name: f"{p.name}.{i}" for p in mixer.lent}
    wiring.place("head", head, hidden=hidden)
    wiring.give(*head.outputs)
    ties = {HEAD: TABLE} | ({"head.projection.bias": "head.bias"} if head.bias else {})
    return Model((wiring.done(),), ties if tied else {})
