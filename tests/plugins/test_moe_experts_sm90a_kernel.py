"""MoeExperts' prefill by wgmma and TMA against float64, and bit by bit against the portable path.

On a GPU that is no sm_90 these are the portable path's numbers once more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from kernel_numbers import HALVES
from moe_nodes import (
    ACTIVATIONS,
    LAYOUTS,
    MXFP4,
    Node,
    in_every_order,
    is_right,
    is_right_where_some_are_no_expert,
    name,
    run,
    tokens_with_nan,
)
from plugin_host import Machine
from plugin_memory import CpuMemory

SWITCH = "LLMEXPORT_SM90A"

# Rows that fill no tile, one and more; steps of a depth of 64 that fill no ring, one and more; columns that fill no
# tile of 128 and 256, and several. More than 16 pairs an expert: fewer are the portable path's.
NODES = [
    Node(63, 2, 4, 456, 40),
    Node(64, 2, 4, 40, 456),
    Node(65, 1, 2, 64, 64, chosen=1),
    Node(130, 1, 1, 72, 136),
    Node(33, 1, 1, 312, 296),
    Node(140, 4, 16, 72, 40, chosen=5),
    Node(300, 1, 16, 64, 64, chosen=1),
    Node(530, 1, 32, 64, 72),
    Node(260, 8, 128, 64, 32, chosen=9),
]
PACKED = [
    {"stored": MXFP4},
    {"stored": MXFP4, "factors": True},
    {"stored": "mxfp8"},
    {"stored": "nvfp4", "group": 16, "factors": True},
    {"stored": "fp8", "group": 10**6, "factors": True},
    {"stored": "uint4", "group": 48},
    {"stored": "uint4", "group": 128, "zeros": True},
    {"stored": "uint8", "group": 32, "zeros": True},
    {"stored": "int8", "group": 64},
]
# Of packed weights: blocks of 32 that fill no step of 64, and rows, rings and columns likewise.
BLOCKS = [
    (63, 2, 4, 480, 32),
    (64, 2, 4, 32, 480),
    (130, 1, 1, 96, 160),
    (33, 1, 1, 320, 288),
]


def named(form: dict[str, Any]) -> str:
    return "-".join(k if v is True else str(v) for k, v in form.items())


@pytest.mark.usefixtures("wgmmas")
@pytest.mark.parametrize(
    "node",
    [
        Node(70, 2, 4, 48, 80, stored="int8", group=80, biases=True, factors=True, interleaved=True),
        Node(70, 2, 4, 80, 48, stored="fp8", group=96, biases=True, factors=True),
        Node(40, 1, 1, 144, 16, stored="uint8", group=10**6, biases=True, zeros=True),
    ],
    ids=name,
)
@pytest.mark.parametrize("dtype", HALVES)
def test_a_block_of_8_bits_may_end_in_its_middle(machine: Machine, dtype: str, node: Node) -> None:
    assert is_right(machine, node, dtype)


@pytest.fixture(autouse=True)
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "1")


@pytest.mark.usefixtures("wgmmas")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("node", NODES, ids=name)
def test_sizes(machine: Machine, node: Node, dtype: str) -> None:
    assert is_right(machine, node, dtype)


@pytest.mark.usefixtures("wgmmas")
@pytest.mark.parametrize("biases", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", HALVES)
def test_layouts(machine: Machine, layout: dict[str, bool], biases: bool, dtype: str) -> None:
    assert is_right(machine, Node(70, 2, 4, 136, 72, biases=biases, **layout), dtype)


@pytest.mark.usefixtures("wgmmas")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts_of_several_tiles_of_columns(machine: Machine, layout: dict[str, bool]) -> None:
    assert is_right(machine, Node(33, 1, 1, 264, 280, biases=True, **layout), "bf16")


@pytest.mark.usefixtures("wgmmas")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(machine: Machine, activation: str, layout: dict[str, bool]) -> None:
    assert is_right(machine, Node(34, 1, 1, 64, 40, activation=activation, biases=True, **layout), "fp16")


@pytest.mark.usefixtures("wgmmas")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_scaled_input(machine: Machine, dtype: str, transposed: bool) -> None:
    assert is_right(machine, Node(65, 2, 2, 40, 72, scale_input=True, transposed=transposed), dtype)


@pytest.mark.usefixtures("wgmmas")
@pytest.mark.parametrize("dtype", HALVES)
def test_what_is_no_expert_adds_nothing(machine: Machine, dtype: str) -> None:
    node = Node(80, 2, 4, 64, 40)
    assert is_right_where_some_are_no_expert(machine, node, dtype)


@pytest.mark.usefixtures("wgmmas")
def test_a_nan_shows_in_its_token_alone(machine: Machine) -> None:
    node = Node(70, 2, 4, 64, 40)
    found = tokens_with_nan(machine, node, "bf16", 3)
    assert found[3].all()
    assert not np.delete(found, 3, 0).any()


@pytest.mark.usefixtures("wgmmas")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_result_does_not_depend_on_the_order_of_threads(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, layout: dict[str, bool]
) -> None:
    node = Node(90, 2, 4, 136, 72, **layout)
    assert len(in_every_order(machine, node, monkeypatch)) == 1


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_emulated_results_are_those_of_the_portable_path(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, layout: dict[str, bool]
) -> None:
    """The emulator adds up in the order of k for both: every other rounding is at the same place."""
    if machine.memory is not CpuMemory:
        pytest.skip("a GPU adds up in an order of its own")
    node = Node(70, 2, 4, 136, 72, activation="swiglu_clamped", biases=True, **layout)
    inputs = node.inputs("bf16")
    found = run(machine, node, inputs)
    monkeypatch.setenv(SWITCH, "0")
    assert found.tobytes() == run(machine, node, inputs).tobytes()


@pytest.mark.usefixtures("wgmmas")
@pytest.mark.parametrize("form", PACKED, ids=named)
@pytest.mark.parametrize("sizes", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", HALVES)
def test_sizes_of_packed_weights(machine: Machine, dtype: str, sizes: tuple[int, ...], form: dict[str, Any]) -> None:
    assert is_right(machine, Node(*sizes, biases=True, **form), dtype)


@pytest.mark.usefixtures("wgmmas")
@pytest.mark.parametrize("form", PACKED, ids=named)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("scale_input", [False, True], ids=["", "scale-input"])
def test_layouts_of_packed_weights(
    machine: Machine, scale_input: bool, interleaved: bool, form: dict[str, Any]
) -> None:
    flags = {"interleaved": interleaved, "scale_input": scale_input, "biases": True}
    assert is_right(machine, Node(140, 4, 16, 96, 160, chosen=5, **form, **flags), "bf16")


@pytest.mark.usefixtures("wgmmas")
@pytest.mark.parametrize("dtype", HALVES)
def test_a_scale_of_255_shows_in_its_column_alone(machine: Machine, dtype: str) -> None:
    """Depth ends within a step, and what lies behind a row is the next one."""
    node, column = Node(40, 1, 1, 96, 96, stored=MXFP4, biases=True), 33
    inputs = node.inputs(dtype)
    inputs[8][0, column, 0] = 255
    found = ~np.isfinite(run(machine, node, inputs).astype(np.float32))[0]
    assert found[:, column].all()
    assert not np.delete(found, column, 1).any()


@pytest.mark.usefixtures("wgmmas")
@pytest.mark.parametrize("stored", ["fp8", "mxfp8"])
@pytest.mark.parametrize("code", [127, 255])
def test_a_nan_among_the_weights_shows_in_its_column_alone(machine: Machine, code: int, stored: str) -> None:
    node, column = Node(40, 1, 1, 96, 96, stored=stored, biases=True), 33
    inputs = node.inputs("bf16")
    inputs[4][0, column, 95] = code
    found = np.isnan(run(machine, node, inputs).astype(np.float32))[0]
    assert found[:, column].all()
    assert not np.delete(found, column, 1).any()


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dtype", HALVES)
def test_mxfp4_is_decoded_as_on_the_portable_path(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, dtype: str, interleaved: bool
) -> None:
    """That adds up a block in another order, but the sums have so few bits that no result shows it."""
    if machine.memory is not CpuMemory:
        pytest.skip("a GPU adds up in an order of its own")
    node = Node(70, 2, 4, 160, 96, biases=True, interleaved=interleaved, stored=MXFP4)
    inputs = node.inputs(dtype)
    # From scales of fp16's least numbers on; every eighth column has one that makes infinities.
    for scales in inputs[-2:]:
        scales[:] = np.random.default_rng(1).choice([0, 90, 99, 104, 120, 122], scales.shape)
    scales[:, ::8, 0] = 160
    found = run(machine, node, inputs)
    monkeypatch.setenv(SWITCH, "0")
    assert np.array_equal(found.astype(np.float32), run(machine, node, inputs).astype(np.float32), equal_nan=True)
    assert np.isfinite(found[..., 1:8].astype(np.float32)).all()


@pytest.mark.parametrize(
    ("node", "dtype"),
    [
        (Node(33, 1, 1, 64, 40, stored="fp16"), "bf16"),
        (Node(33, 1, 1, 64, 96, stored="uint4", group=24, biases=True), "bf16"),
        (Node(33, 1, 4, 64, 64, stored=MXFP4, biases=True), "bf16"),
        (Node(33, 1, 1, 64, 40), "fp32"),
        (Node(33, 1, 1, 68, 40), "bf16"),
        (Node(33, 1, 4, 64, 40), "bf16"),
        (Node(20, 1, 1, 64, 40), "bf16"),
    ],
    ids=["other-type", "groups-that-part-entries", "mxfp4-few-rows", "fp32", "no-vectors", "few-rows", "unsorted"],
)
def test_the_rest_is_right_with_the_switch_on(machine: Machine, node: Node, dtype: str) -> None:
    assert is_right(machine, node, dtype)


@pytest.mark.parametrize(
    ("stored", "said", "used"),
    [("bf16", None, True), ("bf16", "0", False), (MXFP4, None, False), (MXFP4, "0", False), (MXFP4, "1", True)],
)
def test_is_used_unless_kept_out_but_of_packed_weights_if_asked_for(
    machine: Machine,
    wgmma_count: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
    stored: str,
    said: str | None,
    used: bool,
) -> None:
    if machine.memory is not CpuMemory:
        pytest.skip("the emulator counts")
    monkeypatch.delenv(SWITCH)
    if said:
        monkeypatch.setenv(SWITCH, said)
    before = wgmma_count()
    assert is_right(machine, Node(33, 1, 1, 64, 64, stored=stored, biases=stored == MXFP4), "bf16")
    assert (wgmma_count() > before) == used
