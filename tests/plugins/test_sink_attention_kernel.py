"""SinkAttention's kernels against float64, and float64 against the torch reference.

Imports torch in one test alone: test_sanitizers.py runs it under sanitizers.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from attention_nodes import Shape, attention, name, near, run
from kernel_numbers import HALVES
from native import ORDERS, SANITIZE, beside_emulated
from plugin_host import DTYPES, Machine
from plugin_memory import CpuMemory, Output

from llmexport.plugins.host import Refused

# By the way rows and keys are taken: 16 rows a block, alone or among others, with the keys in one part or several.
FEW_ROWS = [
    Shape(1, 1, 1, 1, 1, 16),
    Shape(2, 8, 1, 1, 130, 64),
    Shape(1, 16, 1, 1, 65, 32),
    Shape(1, 6, 2, 7, 63, 80),
    Shape(1, 4, 1, 7, 150, 128),
    Shape(1, 17, 1, 1, 300, 128),
    Shape(1, 2, 1, 1, 264, 256),
    Shape(1, 4, 2, 5, 64, 192),
]
MANY_ROWS = [
    Shape(1, 40, 1, 1, 600, 64),
    Shape(1, 2, 2, 63, 63, 64),
    Shape(2, 3, 1, 64, 65, 32),
    Shape(1, 3, 3, 65, 130, 64),
    Shape(1, 2, 1, 130, 130, 64),
    Shape(1, 4, 1, 33, 97, 128),
    Shape(1, 2, 1, 130, 131, 96),
    Shape(1, 2, 1, 64, 64, 256),
    Shape(1, 1, 1, 63, 300, 256),
]
SCALAR = [Shape(1, 1, 1, 1, 1, 1), Shape(2, 4, 2, 7, 40, 37), Shape(1, 2, 1, 1, 300, 64), Shape(1, 3, 1, 63, 65, 20)]
# Left padding, room at the end of the cache, rows without keys, queries before the first key, lengths past the cache.
RAGGED = [
    Shape(3, 4, 2, 1, 150, 64, start=(0, 70, 3), length=(150, 71, 3)),
    Shape(4, 2, 1, 7, 70, 64, start=(0, 60, 9, 0), length=(0, 70, 5, 4), sinks=False),
    Shape(3, 4, 2, 33, 80, 64, start=(5, 0, 60), length=(80, 20, 64)),
    Shape(2, 2, 1, 65, 140, 128, start=(64, 0), length=(140, 65), sinks=False),
    Shape(2, 2, 2, 2, 40, 16, start=(-5, 0), length=(42, 50)),
    Shape(2, 2, 1, 40, 300, 256, start=(250, 1), length=(290, 41)),
]
WINDOWED = [
    Shape(2, 8, 2, 1, 400, 64, window=300, start=(150, 0), length=(400, 90)),  # in two splits
    Shape(1, 4, 1, 8, 90, 128, window=3),
    Shape(1, 2, 1, 65, 200, 64, window=17),
    Shape(1, 4, 4, 33, 70, 64, window=1),
    Shape(1, 2, 1, 130, 130, 64, window=64, start=(30,)),
    Shape(1, 2, 1, 64, 160, 256, window=1000),
]
CAPPED = [
    Shape(1, 4, 2, 1, 130, 64, softcap=2.0, scale=1.0),
    Shape(1, 2, 1, 34, 64, 128, softcap=30.0, window=20, scale=0.5),
    Shape(1, 1, 1, 40, 40, 256, softcap=5.0, sinks=False),
]
# By which the greatest logit is another one.
SCALED = [Shape(1, 4, 2, 1, 130, 64, scale=-0.5), Shape(1, 2, 1, 40, 90, 128, scale=-0.5, window=20)]
ALL = [*FEW_ROWS, *MANY_ROWS, *RAGGED, *WINDOWED, *CAPPED, *SCALED]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", ALL, ids=name)
def test_tensor_cores(machine: Machine, shape: Shape, dtype: str) -> None:
    assert near(machine, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SCALAR, ids=name)
def test_sizes_that_fill_no_vector(machine: Machine, shape: Shape, dtype: str) -> None:
    assert near(machine, shape, dtype)


@pytest.mark.parametrize("shape", [*RAGGED[:4], *WINDOWED[:4], *CAPPED[:2]], ids=name)
def test_fp32(machine: Machine, shape: Shape) -> None:
    assert near(machine, shape, "fp32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_tensors(machine: Machine, dtype: str) -> None:
    assert near(machine, Shape(1, 4, 2, 7, 40, 64, window=20), dtype, shift=1)


@pytest.mark.skipif(SANITIZE, reason="torch is not made for sanitizers")
@pytest.mark.parametrize("shape", [*SCALAR, *ALL], ids=name)
def test_float64_is_the_torch_reference(shape: Shape) -> None:
    import torch

    from llmexport.plugins.sink_attention import sink_attention

    inputs = [np.nan_to_num(x) for x in shape.inputs("fp32")]
    sinks = torch.from_numpy(inputs[5]) if shape.sinks else None
    found = sink_attention.reference(*map(torch.from_numpy, inputs[:5]), sinks, **shape.attributes)
    assert attention(shape, inputs).near(found.numpy(), "fp32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("sink", [None, 1.0, -np.inf])
def test_queries_without_keys_give_zeros(machine: Machine, dtype: str, tokens: int, sink: float | None) -> None:
    """An empty cache, padding to its end, and queries from before the first key; others are not touched by them."""
    sinks = sink is not None
    shape = Shape(4, 2, 1, tokens, 50, 64, start=(0, 50, 30, 0), length=(0, 50, 30, 50), sinks=sinks)
    inputs = shape.inputs(dtype)
    if sinks:
        inputs[5][:] = sink
    y = run(machine, shape, inputs)
    assert not y[:3].any()
    assert y[3].all()
    assert attention(shape, inputs).near(y, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_cache_without_room_gives_zeros(machine: Machine, dtype: str, tokens: int) -> None:
    shape = Shape(1, 2, 1, tokens, 0, 64)
    assert not run(machine, shape, shape.inputs(dtype)).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("sink", [-np.inf, -30.0, 30.0])
def test_sinks_that_weigh_nothing_or_all(machine: Machine, dtype: str, tokens: int, sink: float) -> None:
    """30 above the logits nothing is left but e**-30 of the values; the parts of the keys are merged with it once."""
    shape = Shape(1, 4, 2, tokens, 264, 64)
    inputs = shape.inputs(dtype)
    inputs[5][:] = sink
    found = run(machine, shape, inputs)
    if sink > 0 and dtype == "fp16":
        assert not found.any()  # below its least number
    else:
        assert attention(shape, inputs).near(found, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 40])
def test_many_small_weights_beside_a_large_one_count(machine: Machine, dtype: str, tokens: int) -> None:
    """e**-14 is 14 units of fp16's least number, to which a weight of at most 1 would be rounded."""
    keys = 256
    shape = Shape(1, 2, 1, tokens, keys, 64, length=(keys,), scale=1.0, sinks=False)
    q, k, v, *rest = (np.nan_to_num(x) for x in shape.inputs(dtype))
    q[...], k[...], v[...] = 0, 0, 1
    q[..., 0], k[..., 0] = 1, -13.5
    k[:, :, 0, 0], v[:, :, 0] = 0.5, 0
    inputs = [q, k, v, *rest]
    assert attention(shape, inputs).near(run(machine, shape, inputs), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_logit_that_grows_from_key_to_key(machine: Machine, dtype: str, tokens: int) -> None:
    """The level of the weights is raised again and again, by less than leaves the earlier ones without a trace."""
    keys = 192
    shape = Shape(1, 2, 1, tokens, keys, 64, scale=1.0)
    q, k, *rest = shape.inputs(dtype)
    q[...], k[...] = 0, 0
    q[..., 0] = 1
    k[..., 0] = np.arange(keys) // 8 / 2
    inputs = [q, k, *rest]
    assert attention(shape, inputs).near(run(machine, shape, inputs), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_nan_shows_in_the_rows_that_see_it(machine: Machine, dtype: str, tokens: int) -> None:
    shape = Shape(1, 2, 1, tokens, 64, 64)
    inputs = shape.inputs(dtype)
    inputs[0][0, 1, -1, 3] = np.nan
    found = np.isnan(run(machine, shape, inputs).astype(np.float32))
    assert found[0, -1, 1].all()
    assert not found[0, :, 0].any()
    assert not found[0, :-1, 1].any()


@pytest.mark.parametrize("shape", [FEW_ROWS[5], MANY_ROWS[0], MANY_ROWS[3], RAGGED[1]], ids=name)
def test_result_does_not_depend_on_the_order_of_threads(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, shape: Shape
) -> None:
    results = set()
    for seed in ORDERS:
        monkeypatch.setenv("LLMEXPORT_EMULATOR_SEED", str(seed))
        results.add(run(machine, shape, shape.inputs("bf16")).tobytes())
    assert len(results) == 1


def test_no_queries_are_no_error(machine: Machine) -> None:
    shape = Shape(2, 2, 1, 0, 9, 64)
    assert run(machine, shape, shape.inputs("fp16")).shape == (2, 0, 2, 64)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ((1, 3, 2, 1, 9, 64), "q has H = 3 heads, no multiple of the G = 2 of k and v"),
        ((1, 2, 1, 1, 9, 264), "heads have D = 264, over the 256 that the kernels are made for"),
    ],
)
def test_refuses_sizes(machine: Machine, capfd: pytest.CaptureFixture[str], sizes: tuple[int, ...], says: str) -> None:
    shape = Shape(*sizes)
    with pytest.raises(Refused):
        run(machine, shape, shape.inputs("fp16"))
    assert f"llmexport: SinkAttention: {says}" in capfd.readouterr().err


@pytest.fixture(scope="module")
def launcher() -> ctypes.CDLL:
    return beside_emulated("sink_attention.cpp")


@pytest.mark.parametrize("processors", [1, 4, 100])
@pytest.mark.parametrize("shape", [FEW_ROWS[5], FEW_ROWS[6], MANY_ROWS[0], MANY_ROWS[8]], ids=name)
def test_workspace_of_exactly_the_plans_bytes(launcher: ctypes.CDLL, shape: Shape, processors: int) -> None:
    """What the plugin asks for is enough on any device; this is what is used on one."""
    memory, dtype, code = CpuMemory(), "bf16", 2
    inputs = shape.inputs(dtype)
    sizes, plan = (ctypes.c_int64 * 6)(*shape.sizes), (ctypes.c_int64 * 8)()
    launcher.attention_plan(sizes, 0, code, ctypes.c_bool(True), processors, plan)
    workspace = Output.make(memory, (plan[2],), np.dtype(np.uint8), 0)
    y = Output.make(memory, attention(shape, inputs).y.shape, DTYPES[dtype], 0)
    addresses = [memory.place(x.reshape(-1).view(np.uint8)) for x in inputs]
    pointers = (ctypes.c_void_p * 8)(*addresses, y.address, workspace.address)
    scale = ctypes.c_float(shape.attributes["scale"])
    assert launcher.attention_run(sizes, scale, 0, code, processors, pointers) == 0
    written = workspace.read().view(np.float32)
    assert not np.isnan(written).any()
    assert attention(shape, inputs).near(y.read(), dtype)
