"""MoeExperts' prefill in clusters of two blocks, against float64, and bit by bit against that in blocks alone.

On a GPU that is no sm_90 these are the portable path's numbers once more.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

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
from native import emulated_library
from plugin_host import Machine
from plugin_memory import CpuMemory

SWITCH = "LLMEXPORT_SM90A"

# Rows of an expert: up to 64, which the first block has alone; as many for both, and one more; a pair of tiles, and one
# row behind it. The emulator's four SMs run two clusters: some nodes have more pieces. Steps and columns as in
# test_moe_experts_sm90a_kernel.py.
ONE_EXPERT = [Node(rows, 1, 1, 72, 136) for rows in (33, 64, 65, 128, 129, 192, 193, 256, 257, 400)]
NODES = [
    Node(63, 2, 4, 456, 40),
    Node(64, 2, 4, 40, 456),
    Node(65, 1, 2, 64, 64, chosen=1),
    Node(33, 1, 1, 312, 296),
    Node(140, 4, 16, 72, 40, chosen=5),
    Node(300, 1, 16, 64, 64, chosen=1),
    Node(530, 1, 32, 64, 72),
    Node(700, 2, 6, 264, 40, chosen=3),
    Node(260, 8, 128, 64, 32, chosen=9),
]


@pytest.fixture
def loads(machine: Machine) -> Callable[[], int]:
    """How many loads into all blocks of a cluster this process began, on the emulator; 0 on a GPU."""
    if machine.memory is not CpuMemory:
        return lambda: 0
    library = ctypes.CDLL(str(emulated_library()))
    library.llmexportEmulatedClusterLoads.restype = ctypes.c_int64
    return lambda: int(library.llmexportEmulatedClusterLoads())


@pytest.fixture
def clusters(machine: Machine, loads: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels that can use clusters do, and the test's can."""
    monkeypatch.setenv(SWITCH, "cluster")
    before = loads()
    yield
    assert loads() > before or machine.memory is not CpuMemory


@pytest.mark.usefixtures("clusters")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("node", [*ONE_EXPERT, *NODES], ids=name)
def test_sizes(machine: Machine, node: Node, dtype: str) -> None:
    assert is_right(machine, node, dtype)


@pytest.mark.slow
@pytest.mark.usefixtures("clusters")
@pytest.mark.parametrize("biases", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", HALVES)
def test_layouts(machine: Machine, layout: dict[str, bool], biases: bool, dtype: str) -> None:
    assert is_right(machine, Node(150, 2, 4, 264, 280, biases=biases, **layout), dtype)


@pytest.mark.usefixtures("clusters")
@pytest.mark.parametrize("biases", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(machine: Machine, activation: str, biases: bool) -> None:
    assert is_right(machine, Node(70, 1, 1, 64, 40, activation=activation, biases=biases), "fp16")


@pytest.mark.usefixtures("clusters")
@pytest.mark.parametrize("dtype", HALVES)
def test_scaled_input(machine: Machine, dtype: str) -> None:
    assert is_right(machine, Node(65, 2, 2, 40, 72, scale_input=True, transposed=True), dtype)


@pytest.mark.usefixtures("clusters")
@pytest.mark.parametrize("dtype", HALVES)
def test_what_is_no_expert_adds_nothing(machine: Machine, dtype: str) -> None:
    node = Node(80, 2, 4, 64, 40)
    assert is_right_where_some_are_no_expert(machine, node, dtype)


def test_nobody_chosen_is_nothing_added(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no tile, and no block loads."""
    monkeypatch.setenv(SWITCH, "cluster")
    node = Node(80, 2, 4, 64, 40)
    inputs = node.inputs("bf16")
    inputs[2][:] = -1
    assert not run(machine, node, inputs).any()


@pytest.mark.usefixtures("clusters")
def test_a_nan_shows_in_its_token_alone(machine: Machine) -> None:
    node = Node(140, 2, 4, 64, 40)
    found = tokens_with_nan(machine, node, "bf16", 3)
    assert found[3].all()
    assert not np.delete(found, 3, 0).any()


@pytest.mark.slow
@pytest.mark.usefixtures("clusters")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_result_does_not_depend_on_the_order_of_threads_and_blocks(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, layout: dict[str, bool]
) -> None:
    node = Node(190, 2, 4, 328, 72, **layout)
    assert len(in_every_order(machine, node, monkeypatch)) == 1


@pytest.mark.parametrize("biases", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", HALVES)
def test_results_are_those_of_blocks_alone(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, dtype: str, layout: dict[str, bool], biases: bool
) -> None:
    """On a GPU too: the same wgmma add up in the same order, and without a bias none of -0 is added."""
    node = Node(150, 2, 4, 136, 72, activation="swiglu_clamped", biases=biases, **layout)
    inputs, found = node.inputs(dtype), []
    for said in ("1", "cluster"):
        monkeypatch.setenv(SWITCH, said)
        found.append(run(machine, node, inputs).tobytes())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("node", "dtype"),
    [
        (Node(33, 1, 1, 64, 40, stored="fp16"), "bf16"),
        (Node(33, 1, 1, 64, 64, stored=MXFP4, biases=True), "bf16"),
        (Node(33, 1, 1, 64, 40), "fp32"),
        (Node(33, 1, 1, 68, 40), "bf16"),
        (Node(33, 1, 4, 64, 40), "bf16"),
        (Node(20, 1, 1, 64, 40), "bf16"),
    ],
    ids=["other-type", "packed", "fp32", "no-vectors", "few-rows", "unsorted"],
)
def test_the_rest_is_right_without_clusters(
    machine: Machine, loads: Callable[[], int], monkeypatch: pytest.MonkeyPatch, node: Node, dtype: str
) -> None:
    monkeypatch.setenv(SWITCH, "cluster")
    before = loads()
    assert is_right(machine, node, dtype)
    assert loads() == before


@pytest.mark.parametrize("said", [None, "0", "1"])
def test_clusters_are_to_be_asked_for(
    machine: Machine, loads: Callable[[], int], monkeypatch: pytest.MonkeyPatch, said: str | None
) -> None:
    if machine.memory is not CpuMemory:
        pytest.skip("the emulator counts")
    monkeypatch.delenv(SWITCH)
    if said:
        monkeypatch.setenv(SWITCH, said)
    before = loads()
    assert is_right(machine, Node(33, 1, 1, 64, 64), "bf16")
    assert loads() == before
