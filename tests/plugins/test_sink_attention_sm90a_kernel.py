"""SinkAttention's prefill by wgmma and TMA against float64, by warpgroups that multiply as they come and in turns.

On a GPU that is no sm_90 these are the portable path's numbers once more.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from attention_nodes import Shape, attention, name, near, run
from kernel_numbers import HALVES
from native import emulated_library
from plugin_host import Machine
from plugin_memory import CpuMemory

# Rows that fill no tile of 128, one and more; keys of one tile, several, and more than the ring holds; heads that fill
# their columns or do not. On the emulator's 4 SMs those of few blocks and many keys take them in two or three splits.
SIZES = [
    Shape(1, 10, 1, 7, 63, 64),
    Shape(1, 4, 2, 63, 63, 64),
    Shape(2, 3, 1, 64, 65, 32),
    Shape(1, 1, 1, 65, 65, 16),
    Shape(1, 2, 1, 130, 130, 64),
    Shape(1, 4, 1, 33, 150, 128),
    Shape(1, 5, 5, 70, 400, 128),
    Shape(1, 2, 1, 70, 131, 96),
    Shape(1, 1, 1, 66, 300, 256),
    Shape(1, 3, 3, 65, 330, 192, sinks=False),
    Shape(1, 1, 1, 130, 600, 64),
]
# Left padding, room at the end of the cache, rows without keys, queries before the first key, lengths past the cache.
RAGGED = [
    Shape(3, 4, 2, 33, 80, 64, start=(5, 0, 60), length=(80, 20, 64)),
    Shape(2, 2, 1, 65, 140, 128, start=(64, 0), length=(140, 65), sinks=False),
    Shape(4, 10, 1, 7, 70, 64, start=(0, 60, 9, 0), length=(0, 70, 5, 4), sinks=False),
    Shape(2, 40, 2, 4, 40, 16, start=(-5, 0), length=(42, 50)),
    Shape(2, 2, 1, 40, 300, 256, start=(250, 1), length=(290, 41)),
    Shape(3, 2, 1, 40, 400, 64, start=(0, 130, 7), length=(300, 260, 390)),
]
# Of heads of 256 elements a warpgroup passes by tiles before those that it sees, and after.
WINDOWED = [
    Shape(1, 2, 1, 65, 200, 64, window=17),
    Shape(1, 4, 4, 70, 70, 64, window=1),
    Shape(1, 2, 1, 130, 130, 64, window=64, start=(30,)),
    Shape(1, 1, 1, 130, 140, 256, window=20),
    Shape(1, 1, 1, 66, 160, 128, window=1000),
    Shape(1, 1, 1, 130, 300, 256, window=5),
]
CAPPED = [
    Shape(1, 4, 1, 34, 64, 128, softcap=30.0, window=20, scale=0.5),
    Shape(1, 2, 1, 40, 40, 256, softcap=5.0, sinks=False),
]
RAISED = Shape(1, 2, 1, 40, 520, 64, scale=1.0)
# Both warpgroups see every tile of keys.
EVEN = Shape(1, 2, 1, 64, 1300, 64)
SWITCH = "LLMEXPORT_SM90A"
AS_THEY_COME, IN_TURNS = "1", "pingpong"


@pytest.fixture(autouse=True, params=[AS_THEY_COME, IN_TURNS])
def said(wgmmas: None, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    monkeypatch.setenv(SWITCH, request.param)
    return str(request.param)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [*SIZES, *RAGGED, *WINDOWED, *CAPPED], ids=name)
def test_sizes(machine: Machine, shape: Shape, dtype: str) -> None:
    assert near(machine, shape, dtype)


@pytest.mark.parametrize("size", [64, 128])
def test_fewer_keys_than_a_box_of_tma_holds(machine: Machine, size: int) -> None:
    """All of them on a GPU, where the driver makes the boxes; some rows come before the first key."""
    some = (1, 7, 65, 127) if machine.memory is CpuMemory else range(1, 128)
    assert [s for s in some if not near(machine, Shape(1, 10, 1, 7, s, size), "bf16")] == []


@pytest.mark.parametrize("sink", [None, 1.0, -np.inf])
def test_queries_without_keys_give_zeros(machine: Machine, sink: float | None) -> None:
    """An empty cache, padding to its end, and queries from before the first key; others are not touched by them."""
    sinks = sink is not None
    shape = Shape(4, 2, 1, 40, 50, 64, start=(0, 50, 30, 0), length=(0, 50, 30, 50), sinks=sinks)
    inputs = shape.inputs("bf16")
    if sinks:
        inputs[5][:] = sink
    y = run(machine, shape, inputs)
    assert not y[:3].any()
    assert attention(shape, inputs).near(y, "bf16")


@pytest.mark.parametrize("sink", [-np.inf, -30.0, 30.0])
def test_sinks_that_weigh_nothing_or_all(machine: Machine, sink: float) -> None:
    shape = Shape(1, 4, 2, 40, 264, 64)
    inputs = shape.inputs("bf16")
    inputs[5][:] = sink
    assert attention(shape, inputs).near(run(machine, shape, inputs), "bf16")


@pytest.mark.parametrize("dtype", HALVES)
def test_a_logit_that_grows_from_key_to_key(machine: Machine, dtype: str) -> None:
    """By 9 powers of two a tile: the level of the weights is raised in each, and what was added before is rescaled."""
    q, k, *rest = RAISED.inputs(dtype)
    q[...], k[...] = 0, 0
    q[..., 0] = 1
    k[..., 0] = np.arange(RAISED.S) // 8 * 0.4
    inputs = [q, k, *rest]
    assert attention(RAISED, inputs).near(run(machine, RAISED, inputs), dtype)


def test_a_nan_shows_in_the_row_that_has_it(machine: Machine) -> None:
    shape = Shape(1, 2, 1, 40, 200, 64)
    inputs = shape.inputs("bf16")
    inputs[0][0, 1, -1, 3] = np.nan
    found = np.isnan(run(machine, shape, inputs).astype(np.float32))[0]
    assert found[-1, 1].all()
    assert not found[:, 0].any()
    assert not found[:-1, 1].any()


@pytest.mark.parametrize(("shape", "orders"), [(SIZES[3], 30), (SIZES[6], 2), (WINDOWED[3], 4)])
def test_result_does_not_depend_on_the_order_of_threads(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, shape: Shape, orders: int
) -> None:
    results = set()
    for seed in range(orders):
        monkeypatch.setenv("LLMEXPORT_EMULATOR_SEED", str(seed))
        results.add(run(machine, shape, shape.inputs("bf16")).tobytes())
    assert len(results) == 1


def test_a_warpgroup_multiplies_twice_in_a_row_where_it_takes_turns(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    """For logits and for values. Else one is ahead of the other, as far as the ring lets it."""
    if machine.memory is not CpuMemory:
        pytest.skip("the emulator counts")
    count = ctypes.CDLL(str(emulated_library())).llmexportEmulatedCommitsInARow
    count.restype = ctypes.c_int64
    count()
    most = []
    for seed in range(8):
        monkeypatch.setenv("LLMEXPORT_EMULATOR_SEED", str(seed))
        assert near(machine, EVEN, "bf16")
        most.append(int(count()))
    assert max(most) == 2 if said == IN_TURNS else max(most) > 2, most


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [EVEN, SIZES[8], RAGGED[4], WINDOWED[3], WINDOWED[5], CAPPED[0]], ids=name)
def test_turns_change_no_number(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, shape: Shape, dtype: str, said: str
) -> None:
    """On a GPU too: each warpgroup adds up as before."""
    inputs = shape.inputs(dtype)
    found = run(machine, shape, inputs).tobytes()
    monkeypatch.setenv(SWITCH, IN_TURNS if said == AS_THEY_COME else AS_THEY_COME)
    assert run(machine, shape, inputs).tobytes() == found
