"""What is fed to a port: it follows from the use of the port and from its axes, never from its name."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import ml_dtypes  # noqa: F401  teaches np.dtype "bfloat16"
import numpy as np

from llmexport.export.exported import Export
from llmexport.export.spec import (
    BATCH,
    IMAGES,
    MOST,
    PAST,
    SEQUENCE,
    SOURCE,
    SPLICED,
    WRITTEN,
    Block,
    DisentangledAttention,
    Embedding,
    Experts,
    Graph,
    PerLayerEmbedding,
    Port,
    Rotary,
    Splice,
    Use,
    axis_of,
    size_of,
    summands,
    with_sums,
)
from llmexport.validate.pictures import patch_places
from llmexport.validate.source import of_source

Feed = dict[str, np.ndarray]
SEEN: tuple[Use, ...] = ("pixels", "grid", "features")
ELSEWHERE = 11  # the size of an axis along which no tokens of a step lie


def shape_of(port: Port, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(size_of(d, sizes, ELSEWHERE) for d in port.shape)


def along_step(port: Port) -> bool:
    """Whether the tokens of a step lie along one of its axes."""
    return any({SEQUENCE, WRITTEN} & {*summands(d)} for d in port.shape if isinstance(d, str))


def sees(graph: Graph) -> bool:
    """Whether a graph looks at pictures."""
    return any(p.use == "pixels" for p in graph.assembly.inputs)


def without_pictures(export: Export) -> Feed:
    """The features that a step without pictures reads: none, by value."""
    ports = [p for g in export.graphs for p in g.assembly.inputs if p.use == "features"]
    return {p.name: np.zeros((0, *shape_of(p, {})[1:]), p.typed(export.dtype).dtype) for p in ports}


def beside(export: Export) -> tuple[Port, ...]:
    """The inputs of an export's graphs that no earlier graph makes, no step carries, and no tokens of a step fill.

    Nor do pictures fill them, nor the text of an encoder.
    """
    made: set[str] = set()
    found: dict[str, Port] = {}
    for graph in export.graphs:
        inputs = [p for p in graph.assembly.inputs if p.name not in made and p.name not in graph.carried]
        found |= {p.name: p for p in inputs if not along_step(p) and not of_source(p) and p.use not in SEEN}
        made |= {p.name for p in graph.assembly.outputs}
    return tuple(found.values())


def limits(blocks: Collection[Block]) -> dict[Use, int]:
    """How many ids there are of each use, so that every block takes them: words, types, positions, experts, ..."""
    tables = [b for b in blocks if isinstance(b, Embedding)]
    turns = [b for b in blocks if isinstance(b, Rotary)]
    vocabularies = [b.vocabulary for b in blocks if isinstance(b, Embedding | PerLayerEmbedding)]
    experts = [b.experts for b in blocks if isinstance(b, Experts)]
    found: dict[Use, int] = {
        "tokens": min(vocabularies, default=100),
        "token_types": min((b.types for b in tables if b.types), default=1),
        "positions": min(
            (*(b.placed for b in tables if b.placed), *(b.places for b in turns if b.places)), default=MOST
        ),
        "distances": min((2 * b.span for b in blocks if isinstance(b, DisentangledAttention)), default=1),
    }
    return found | ({"routing_experts": min(experts)} if experts else {})


def words(blocks: Collection[Block]) -> np.ndarray:
    """The ids that a text may have: all that stand for no picture."""
    pictures = [t for b in blocks if isinstance(b, Splice) for t in b.tokens]
    return np.setdiff1d(np.arange(limits(blocks)["tokens"]), pictures)


def block_feed(block: Block, dtype: str, sizes: Mapping[str, int], seed: int = 0) -> Feed:
    """A random feed for one block alone, by the names of its ports."""
    return draw(block.inputs, [block], dtype, sizes, seed)


def draw(ports: Iterable[Port], blocks: Collection[Block], dtype: str, sizes: Mapping[str, int], seed: int = 0) -> Feed:
    """Random numbers for ports, such as their uses allow and `blocks` take."""
    ports, random, below, sizes = tuple(ports), np.random.default_rng(seed), limits(blocks), with_sums(sizes)
    turned = next((shape_of(p, sizes)[:-1] for p in ports if p.use == "cos"), (sizes[BATCH], sizes[SEQUENCE]))
    angles = random.uniform(0, 100, (*turned, 1))
    grids, merge = _grids(ports, sizes)
    places, extents, segments = patch_places(grids, merge)
    in_slots = any(p.use == "slots" for p in ports)

    def causal(shape: Sequence[int]) -> np.ndarray:
        """Which keys are not behind the query, of [.., T, S]."""
        queries, keys = shape[-2:]
        return np.tri(queries, keys, k=sizes[PAST] if in_slots else keys - queries, dtype=bool)

    # A window has all its slots from the first token on, those of no token before the others.
    earlier_slots = next((shape_of(p, sizes)[2] for p in ports if p.use == "window"), sizes[PAST])
    feed = {}
    for port in ports:
        shape = shape_of(port, sizes)
        value: np.ndarray
        match port.use:
            case "tokens":
                text = words(blocks)
                value = text[random.integers(0, len(text), shape)]
                _put_pictures(value, blocks, sizes, random)
            case "token_types":
                value = random.integers(0, below[port.use], shape)
            case "positions":
                value = np.broadcast_to(sizes[PAST] + np.arange(shape[-1]), shape) % below[port.use]
            case "padding":
                # On the left, of another length in each row, and after the first row.
                value = np.arange(shape[1]) >= 2 * np.arange(shape[0])[:, None]
                # No such padding is in a static cache.
                value[0, -1] = WRITTEN in port.shape
            case "padding_length":
                value = np.arange(shape[0])
            case "past_length":
                value = np.full(shape, sizes[PAST])
            case "mask" if _merged(port):
                value = np.broadcast_to(segments[:, None] == segments, shape)
            case "bias":
                value = np.where(causal(shape), random.standard_normal(shape), np.finfo(np.float16).min)
            case "mask" if port.shape[-1] == SOURCE and port.shape[-2] != SOURCE:
                # Of a text whose rows end in padding, all is seen but that.
                tokens = np.maximum(shape[3] - np.arange(shape[0]), 1)
                value = np.broadcast_to(np.arange(shape[3]) < tokens.reshape(-1, 1, 1, 1), shape)
            case "mask":
                value = np.broadcast_to(causal(shape), shape)
            case "distances":
                value = random.integers(0, below[port.use], shape)
            case "span_start":
                value = np.arange(shape[0]) + max(earlier_slots - sizes[PAST], 0)
            case "span_length":
                value = np.full(shape, earlier_slots + sizes[SEQUENCE])
            case "presence":
                value = np.arange(shape[1]) >= np.arange(shape[0])[:, None]
            case "shown":
                value = np.arange(shape[1]) < shape[1] // 2
                value = np.broadcast_to(value, shape)
            case "presence_end":
                value = sizes[SEQUENCE] - np.arange(shape[0]) % (sizes[SEQUENCE] + 1)
            case "temperature":
                value = random.uniform(1, 1.5, shape)
            case "routing_weights":
                value = random.uniform(0.1, 1, shape)
            case "routing_experts":
                value = _distinct(random, below.get(port.use, shape[-1]), shape)
            case "recurrence":
                value = 0.1 * random.standard_normal(shape)
            case "weight_sum":
                # The first row has seen no token.
                value = random.uniform(1, 2, shape)
                value[:1] = 0
            case "cos":
                value = np.cos(angles / np.arange(1, shape[-1] + 1))
            case "sin":
                value = np.sin(angles / np.arange(1, shape[-1] + 1))
            case "grid":
                value = grids
            case "places":
                value = places
            case "extents":
                value = extents
            case "segments":
                value = segments
            case "pictures":
                # Runs of seven, which begin elsewhere in each row, and three tokens of text between them.
                place = np.arange(shape[1]) + np.arange(shape[0])[:, None]
                value = np.where(place % 10 < 7, place // 10 + 1, 0)
            case "hidden" | "relative" | "state" | "slots" | "window" | "logits" | "pixels" | "features":
                value = random.standard_normal(shape)
        feed[port.name] = np.ascontiguousarray(value.astype(port.typed(dtype).dtype))
    return feed


def states(graph: Graph, dtype: str, sizes: Mapping[str, int], seed: int = 0) -> Feed:
    """What a graph carries into a step that begins: keys and values of a past; zeros in all that holds none."""
    feed, held = {}, earlier(graph, dtype, sizes, seed)
    for port in graph.assembly.inputs:
        if port.name in graph.carried:
            value = np.zeros(shape_of(port, sizes), port.typed(dtype).dtype)
            tokens = held.get(port.name, value)
            match port.use:
                case "slots":
                    value[:, :, : tokens.shape[2]] = tokens
                case "window":
                    kept = min(tokens.shape[2], value.shape[2])
                    value[:, :, value.shape[2] - kept :] = tokens[:, :, tokens.shape[2] - kept :]
                case _:
                    value = tokens
            feed[port.name] = value
    return feed


def earlier(graph: Graph, dtype: str, sizes: Mapping[str, int], seed: int = 0) -> Feed:
    """Random keys and values [B, heads, past, D] of a past, by the input that brings them."""
    random, feed = np.random.default_rng(seed), {}
    for port in graph.assembly.inputs:
        if port.name in graph.carried and holds_tokens(port):
            batch, heads, _, size = shape_of(port, sizes)
            value = random.standard_normal((batch, heads, sizes[PAST], size), np.float32)
            feed[port.name] = value.astype(port.typed(dtype).dtype)
    return feed


def holds_tokens(port: Port) -> bool:
    """Whether a state holds something of each earlier token, and not one thing of all."""
    return PAST in port.shape or port.use in ("slots", "window")


def _merged(port: Port) -> int:
    """How many of the patches along one of its axes make a feature; 0 if there are none."""
    return max((axis_of(d).times for d in port.shape if isinstance(d, str) and axis_of(d).times > 1), default=0)


def _grids(ports: Iterable[Port], sizes: Mapping[str, int]) -> tuple[np.ndarray, int]:
    """Grids [pictures, 3] of as many patches as ports have, and how many of them a side make a feature.

    The first picture has one feature, each later one up to the last one more, and that is a video if it can be.
    """
    port = next((p for p in ports if _merged(p)), None)
    if port is None:
        return np.array([(1, 1, 1)]), 1
    axis = next(d for d in port.shape if isinstance(d, str) and axis_of(d).times > 1)
    merge = math.isqrt(_merged(port))
    left = size_of(axis, sizes, ELSEWHERE) // merge**2
    shapes = []
    for i in range(1, sizes.get(IMAGES, ELSEWHERE)):
        shapes.append((1, 1, min(i, left - sizes.get(IMAGES, ELSEWHERE) + i)))
        left -= shapes[-1][2]
    frames = 1 + (left % 2 == 0)
    rows = max(n for n in range(1, 1 + math.isqrt(left // frames)) if left // frames % n == 0)
    shapes.append((frames, rows, left // frames // rows))
    return np.array(shapes) * (1, merge, merge), merge


def _put_pictures(
    ids: np.ndarray, blocks: Collection[Block], sizes: Mapping[str, int], random: np.random.Generator
) -> None:
    """Makes some of these ids, up to a half, such that stand for pictures: no more than there are features."""
    tokens = [t for b in blocks if isinstance(b, Splice) for t in b.tokens]
    count = min(size_of(SPLICED, sizes, ELSEWHERE), (ids.size + 1) // 2)
    if tokens and count:
        ids.flat[random.choice(ids.size, count, replace=False)] = random.choice(tokens, count)


def _distinct(random: np.random.Generator, experts: int, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers below `experts`, no two of a row alike."""
    return random.permuted(np.broadcast_to(np.arange(experts), (*shape[:-1], experts)), axis=-1)[..., : shape[-1]]
