"""QkNormRopeWrite's kernels: query, key and value bit by bit as QkNormRope's, keys and values in their slots.

Imports neither torch nor onnx: test_sanitizers.py runs it again under sanitizers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_numbers import Values, random
from pairwise import pairwise
from plugin_host import DTYPES, Machine, Run, computed, lay_out
from plugin_memory import Memory, Output

# B, T, H, G, D, R, S: one slot; odd sizes; whole vectors in part of a warp; heads that fill several blocks; slots that
# a step fills.
SIZES = [(1, 1, 1, 1, 2, 1, 1), (3, 3, 5, 1, 10, 5, 9), (2, 1, 8, 2, 64, 32, 33), (3, 5, 40, 8, 128, 64, 7)]
SIZES += [(2, 4, 3, 2, 256, 32, 4)]
STEP, PASTS, INDICES = range(5), (5, 6), 7
NORMS = ("none", "first", "last")


def drawn(size: tuple[int, ...], dtype: str) -> list[Values]:
    """The op's inputs; each row is written from another slot on, the last of them to the end."""
    b, t, h, g, d, r, s = size
    shapes = [(b, t, h, d), (b, t, g, d), (b, t, g, d), (b, t, r), (b, t, r), (b, g, s, d), (b, g, s, d)]
    numbers = [random(shape, dtype, seed) for seed, shape in enumerate((*shapes, (d,), (d,)))]
    return [*numbers[:7], first_slots(b, s - t), *numbers[7:]]


def first_slots(rows: int, last: int) -> Values:
    return np.array([last - (i * 2) % (last + 1) for i in reversed(range(rows))], np.int32)


def attributes(interleaved: bool, norm: str) -> dict[str, Any]:
    said = {"interleaved": interleaved, "epsilon": 1e-6, "weight_offset": 1.0, "round_before_weight": True}
    return {**said, "norm_first": norm != "last"}


def prepared(
    machine: Machine, memory: Memory, inputs: list[Values], said: dict[str, Any], place: str, shift: int
) -> Run:
    """place: "apart", where caches are given memory of their own, or "in place", where it is that of the past."""
    plugin = machine.library.create("QkNormRopeWrite", said)
    run = lay_out(plugin, memory, inputs, shift)
    if place == "in place":
        for output in range(plugin.outputs):
            past = plugin.aliased(output)
            if past >= 0:
                run.outputs[output] = Output.holding(memory, inputs[past], shift)
                run.inputs[past] = run.outputs[output].address
    return run


def written(machine: Machine, inputs: list[Values], said: dict[str, Any], place: str, shift: int = 0) -> list[Values]:
    memory = machine.memory()
    run = prepared(machine, memory, inputs, said, place, shift)
    run.enqueue(memory.stream)
    return run.results()


def expected(machine: Machine, inputs: list[Values], said: dict[str, Any], shift: int = 0) -> list[Values]:
    """Of QkNormRope, whose keys and values numpy puts into their slots, if there are such."""
    step = [*inputs[:5], *inputs[8:]]
    query, *made = computed(machine.library.create("QkNormRope", said), machine.memory(), step, shift)
    caches = [inputs[place].copy() for place in PASTS]
    slots, tokens = caches[0].shape[2], made[0].shape[2]
    for cache, new in zip(caches, made, strict=True):
        for row, first in enumerate(inputs[INDICES].tolist()):
            for t in range(tokens):
                if 0 <= first + t < slots:
                    cache[row, :, first + t] = new[row, :, t]
    return [query, *caches]


def alike(found: list[Values], wanted: list[Values]) -> bool:
    return [f.tobytes() for f in found] == [w.tobytes() for w in wanted]


@pytest.mark.parametrize(
    ("size", "dtype", "interleaved", "norm", "place", "shift"),
    pairwise(SIZES, [*DTYPES], (False, True), NORMS, ("apart", "in place"), (0, 1)),
)
def test_sizes(
    machine: Machine, size: tuple[int, ...], dtype: str, interleaved: bool, norm: str, place: str, shift: int
) -> None:
    inputs = drawn(size, dtype)[: 8 if norm == "none" else 10]
    said = attributes(interleaved, norm)
    assert alike(written(machine, inputs, said, place, shift), expected(machine, inputs, said, shift))


@pytest.mark.parametrize("place", ["apart", "in place"])
def test_what_no_token_is_written_to_keeps_its_bits(machine: Machine, place: str) -> None:
    """Even those that are no numbers, which no arithmetic keeps."""
    inputs = drawn((2, 3, 4, 2, 64, 32, 12), "fp16")
    for past in PASTS:
        inputs[past] = np.random.default_rng(past).integers(0, 2**16, inputs[past].shape, np.uint16).view(np.float16)
    said = attributes(False, "first")
    found = written(machine, inputs, said, place)
    assert alike(found, expected(machine, inputs, said))
    kept = [(f.view(np.uint16) == inputs[p].view(np.uint16)).all((1, 3)) for f, p in zip(found[1:], PASTS, strict=True)]
    assert all(k.sum() == 2 * (12 - 3) for k in kept)


@pytest.mark.parametrize("place", ["apart", "in place"])
@pytest.mark.parametrize("first", [-2, -1, 10, 11, 12, 2**31 - 1, -(2**31)])
def test_a_token_without_a_slot_is_left_out(machine: Machine, first: int, place: str) -> None:
    """Its memory is another's: guards lie around the cache, and one row of it is written as it should be."""
    inputs = drawn((2, 3, 4, 2, 64, 32, 12), "bf16")
    inputs[INDICES][:] = (first, 4)
    said = attributes(False, "first")
    assert alike(written(machine, inputs, said, place), expected(machine, inputs, said))


def test_steps_in_place_are_one_long_step(machine: Machine) -> None:
    """A cache that is written step by step ends as one that is written at once."""
    whole = drawn((2, 6, 4, 2, 64, 32, 16), "fp32")
    whole[INDICES][:] = (3, 7)
    said = attributes(True, "last")
    wanted = written(machine, whole, said, "apart")
    caches, queries = [whole[p] for p in PASTS], []
    for begin, end in ((0, 1), (1, 4), (4, 6)):
        step = [np.ascontiguousarray(whole[i][:, begin:end]) for i in STEP]
        query, *caches = written(
            machine, [*step, *caches, whole[INDICES] + np.int32(begin), *whole[8:]], said, "in place"
        )
        queries.append(query)
    assert alike([np.concatenate(queries, 2), *caches], wanted)


@pytest.mark.parametrize("place", ["apart", "in place"])
def test_no_tokens_leave_the_cache_as_it_was(machine: Machine, place: str) -> None:
    inputs = drawn((2, 0, 4, 2, 64, 32, 12), "fp16")
    query, key, value = written(machine, inputs, attributes(False, "first"), place)
    assert query.shape == (2, 4, 0, 64)
    assert alike([key, value], [inputs[p] for p in PASTS])
