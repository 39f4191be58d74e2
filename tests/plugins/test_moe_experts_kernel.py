"""MoeExperts' kernels against float64: layouts, activations, stored types and routings; few rows an expert and many.

Imports torch in one test alone: test_sanitizers.py runs it under sanitizers.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from kernel_numbers import HALVES
from moe_nodes import (
    ACTIVATIONS,
    BLOCK,
    LAYOUTS,
    MXFP4,
    Node,
    dequantised,
    exact,
    in_every_order,
    is_near,
    is_right,
    is_right_where_some_are_no_expert,
    name,
    run,
    tokens_with_nan,
)
from native import SANITIZE
from pairwise import pairwise
from plugin_host import DTYPES, Machine, computed, lay_out

from llmexport.plugins.host import Refused

# Tokens that fill no tile, one and more; steps of a depth of 64 that fill no ring, one and more, and no step.
FEW_ROWS = [
    Node(1, 1, 4, 8, 8),
    Node(1, 4, 32, 456, 40),
    Node(7, 2, 4, 40, 456),
    Node(16, 2, 16, 64, 64),
    Node(300, 1, 20, 8, 136, chosen=1),  # more row tiles than a band
    Node(64, 2, 16, 136, 72, chosen=3),
    Node(9, 8, 256, 64, 32),
    Node(5, 16, 384, 24, 16),
]
MANY_ROWS = [
    Node(63, 2, 4, 456, 40),
    Node(64, 2, 4, 40, 456),
    Node(65, 1, 2, 64, 64, chosen=1),
    Node(130, 2, 4, 136, 72),
    Node(130, 1, 1, 72, 136),
    Node(140, 4, 16, 72, 40, chosen=5),
]
ODD = [Node(1, 1, 1, 1, 1), Node(7, 2, 4, 37, 19), Node(65, 2, 4, 33, 70), Node(20, 1, 4, 68, 36)]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("node", [*FEW_ROWS, *MANY_ROWS], ids=name)
def test_tensor_cores(machine: Machine, node: Node, dtype: str) -> None:
    assert is_right(machine, node, dtype)


@pytest.mark.parametrize(
    ("node", "layout", "biases", "dtype"),
    pairwise([FEW_ROWS[2], MANY_ROWS[3], ODD[1]], LAYOUTS, (False, True), HALVES),
)
def test_layouts(machine: Machine, node: Node, layout: dict[str, bool], biases: bool, dtype: str) -> None:
    assert is_right(machine, replace(node, **layout, biases=biases), dtype)


@pytest.mark.parametrize(("activation", "layout", "dtype"), pairwise([*ACTIVATIONS], LAYOUTS, [*DTYPES]))
def test_activations(machine: Machine, activation: str, layout: dict[str, bool], dtype: str) -> None:
    assert is_right(machine, Node(7, 2, 4, 64, 40, activation=activation, biases=True, **layout), dtype)


@pytest.mark.parametrize(
    ("node", "dtype", "stored", "transposed"),
    pairwise([Node(7, 2, 4, 72, 40), Node(65, 2, 2, 72, 40)], [*DTYPES], [*DTYPES], (False, True)),
)
def test_weights_of_another_type(machine: Machine, node: Node, dtype: str, stored: str, transposed: bool) -> None:
    assert is_right(machine, replace(node, stored=stored, transposed=transposed), dtype)


MXFP4_SIZES = [(1, 4, 32, 96, 32), (7, 2, 4, 288, 64), (10, 2, 4, 32, 1056), (65, 2, 4, 224, 96)]


@pytest.mark.parametrize(("size", "dtype", "interleaved"), pairwise(MXFP4_SIZES, [*DTYPES], (False, True)))
def test_mxfp4(machine: Machine, size: tuple[int, ...], dtype: str, interleaved: bool) -> None:
    node = Node(*size, activation="swiglu_clamped", interleaved=interleaved, biases=True, stored=MXFP4)
    assert is_right(machine, node, dtype)


# Of every format: groups of a tile, of a half of it and of a row, a last one that is smaller, experts without tokens,
# and no whole vectors.
PACKED = [
    Node(7, 2, 4, 96, 64, stored=MXFP4, biases=True, factors=True),
    Node(65, 2, 4, 64, 32, stored=MXFP4, biases=True, factors=True),
    Node(7, 2, 4, 48, 18, stored=MXFP4, biases=True),
    Node(64, 2, 16, 544, 96, stored=MXFP4, biases=True, chosen=3),
    Node(7, 2, 4, 288, 64, stored="mxfp8", biases=True),
    Node(65, 2, 4, 64, 96, stored="mxfp8", biases=True, interleaved=True, factors=True),
    Node(1, 4, 32, 96, 32, stored="nvfp4", group=16, biases=True, factors=True),
    Node(65, 2, 4, 352, 32, stored="nvfp4", group=16, biases=True, factors=True, interleaved=True),
    Node(7, 2, 4, 48, 16, stored="nvfp4", group=16, biases=True),
    Node(7, 2, 4, 288, 192, stored="fp8", group=128, biases=True),
    Node(65, 2, 4, 96, 160, stored="fp8", group=10**6, biases=True, factors=True, interleaved=True),
    Node(7, 2, 4, 37, 19, stored="fp8", group=5, biases=True, factors=True),
    Node(7, 2, 4, 288, 64, stored="uint4", group=32, biases=True),
    Node(65, 2, 4, 160, 96, stored="uint4", group=64, biases=True, zeros=True, interleaved=True),
    Node(40, 2, 16, 288, 96, stored="uint4", group=96, biases=True, zeros=True, chosen=2),
    Node(7, 2, 4, 160, 96, stored="uint4", group=48, biases=True, zeros=True, factors=True, interleaved=True),
    Node(20, 1, 4, 38, 18, stored="uint4", group=7, biases=True, zeros=True, factors=True),
    Node(7, 2, 4, 96, 64, stored="uint8", group=32, biases=True, zeros=True),
    Node(65, 2, 2, 48, 40, stored="uint8", group=24, biases=True, interleaved=True),
    Node(7, 2, 4, 160, 48, stored="int8", group=160, biases=True, activation="gelu_tanh"),
    Node(65, 2, 4, 19, 8, stored="int8", group=1, biases=True, scale_input=True),
]


@pytest.mark.parametrize("node", PACKED, ids=name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_weights(machine: Machine, node: Node, dtype: str) -> None:
    assert is_right(machine, node, dtype)


@pytest.mark.parametrize("stored", ["fp8", "mxfp8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_code_that_is_nan_shows(machine: Machine, dtype: str, stored: str) -> None:
    node = Node(3, 1, 1, 64, 32, stored=stored, biases=True)
    inputs = node.inputs(dtype)
    inputs[4][0, 5, 3], inputs[4][0, 40, 30] = 0x7F, 0xFF
    found = np.isnan(run(machine, node, inputs).astype(np.float32))[0]
    assert (found == np.isin(np.arange(64), (5, 40))).all()


# The scales with which 0.5 is a normal number to fp32, in which products are added up, and 6 is finite.
SCALES = {"fp32": range(2, 253), "fp16": range(2, 141), "bf16": range(2, 253)}


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_mxfp4_value(machine: Machine, dtype: str, tokens: int) -> None:
    """One token an element of down: the gate is 2 at alpha = 0, up is the token's one minus 1, their product that."""
    node = Node(BLOCK * tokens, 1, 1, 256, BLOCK, activation="swiglu_clamped", biases=True, stored=MXFP4)
    inputs = node.inputs(dtype)
    x, weights, _, gate_up, _, gate_up_bias, down_bias, gate_up_scales, down_scales = inputs
    weights[...] = 1
    x[...] = np.eye(BLOCK, node.C)[np.arange(node.T) % BLOCK]
    one, picked = 2, np.arange(BLOCK)
    gate_up[...] = 0
    gate_up[0, BLOCK + picked, picked // 2] = one << picked % 2 * 4
    gate_up_scales[...] = 127
    gate_up_bias[0, :BLOCK], gate_up_bias[0, BLOCK:], down_bias[...] = 2, -1, 0
    down_scales[0, :, 0] = np.resize(SCALES[dtype], node.C)
    attributes = {**node.attributes, "alpha": 0.0, "limit": 2.0}
    y = computed(machine.library.create("MoeExperts", attributes), machine.memory(), inputs)[0][0]
    values = dequantised(node, 1, [t[0] for t in inputs[3:]]).astype(DTYPES[dtype])
    assert (y == values.T[np.arange(node.T) % BLOCK]).all()


@pytest.mark.parametrize(
    ("stored", "group", "scale", "interleaved", "dtype"),
    [
        (*form, *case)
        for form in [(MXFP4, 32, 255), ("nvfp4", 16, 127), ("uint4", 48, np.inf)]
        for case in pairwise((False, True), [*DTYPES])
    ],
)
def test_an_infinite_scale_shows_in_its_column_alone(
    machine: Machine, dtype: str, stored: str, group: int, scale: float, interleaved: bool
) -> None:
    """A row's scales are followed by the next row's, which steps deeper than the row meet."""
    node = Node(3, 1, 1, 64, 96, interleaved=interleaved, biases=True, stored=stored, group=group)
    inputs = node.inputs(dtype)
    inputs[8][0, 5, 0], inputs[8][0, 40, -1] = scale, scale
    found = np.isfinite(run(machine, node, inputs).astype(np.float32))[0]
    assert (found == ~np.isin(np.arange(64), (5, 40))).all()


@pytest.mark.parametrize("tokens", [5, 65])
@pytest.mark.parametrize(
    ("stored", "which"), [(MXFP4, 7), (MXFP4, 8), ("uint4", 7), ("uint4", 8), ("uint4", 11), ("uint4", 12)]
)
def test_misaligned_scales_and_zero_points_of_4_bits(machine: Machine, stored: str, which: int, tokens: int) -> None:
    node = Node(tokens, 2, 4, 96, 64, biases=True, stored=stored, zeros=stored == "uint4")
    inputs, memory = node.inputs("bf16"), machine.memory()
    laid = lay_out(machine.library.create("MoeExperts", node.attributes), memory, inputs)
    shifted = np.concatenate([inputs[which].reshape(-1)[:1], inputs[which].reshape(-1)])
    laid.inputs[which] = memory.place(shifted.view(np.uint8)) + shifted.itemsize
    laid.enqueue(memory.stream)
    assert is_near(node, laid.results()[0], exact(node, inputs, "bf16"), "bf16")


SCALED_SIZES = [(1, 1, 16, 72, 40), (33, 1, 4, 72, 40), (65, 2, 2, 40, 72), (9, 2, 4, 37, 19)]


@pytest.mark.parametrize(("size", "dtype", "transposed"), pairwise(SCALED_SIZES, [*DTYPES], (False, True)))
def test_scaled_input(machine: Machine, size: tuple[int, ...], dtype: str, transposed: bool) -> None:
    assert is_right(machine, Node(*size, scale_input=True, transposed=transposed), dtype)


@pytest.mark.parametrize("node", [*ODD, FEW_ROWS[2], MANY_ROWS[0]], ids=name)
def test_fp32(machine: Machine, node: Node) -> None:
    assert is_right(machine, node, "fp32")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("node", ODD, ids=name)
def test_sizes_that_fill_no_vector(machine: Machine, node: Node, dtype: str) -> None:
    assert is_right(machine, node, dtype)


@pytest.mark.parametrize("stored", ["", MXFP4, "uint4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_tensors(machine: Machine, dtype: str, stored: str) -> None:
    assert is_right(machine, Node(20, 2, 4, 64, 32, biases=True, stored=stored), dtype, shift=1)


@pytest.mark.parametrize("tokens", [9, 80])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_may_choose_an_expert_twice(machine: Machine, dtype: str, tokens: int) -> None:
    node = Node(tokens, 3, 4, 64, 40)
    inputs = node.inputs(dtype)
    inputs[2] = np.random.default_rng(1).integers(0, 4, inputs[2].shape, np.int32)
    assert is_near(node, run(machine, node, inputs), exact(node, inputs, dtype), dtype)


@pytest.mark.parametrize("tokens", [9, 80])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_expert_adds_nothing(machine: Machine, dtype: str, tokens: int) -> None:
    node = Node(tokens, 2, 4, 64, 40)
    assert is_right_where_some_are_no_expert(machine, node, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_is_its_tokens(machine: Machine, dtype: str) -> None:
    node = Node(5, 2, 4, 64, 40, B=3)
    inputs = node.inputs(dtype)
    flat = [x.reshape(1, 15, -1) for x in inputs[:3]]
    found = run(machine, node, inputs)
    assert found.tobytes() == run(machine, replace(node, B=1, T=15), [*flat, *inputs[3:]]).tobytes()
    assert is_near(node, found, exact(node, inputs, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [5, 70])
def test_a_nan_shows_in_its_token_alone(machine: Machine, dtype: str, tokens: int) -> None:
    node = Node(tokens, 2, 4, 64, 40)
    found = tokens_with_nan(machine, node, dtype, 3)
    assert found[3].all()
    assert not np.delete(found, 3, 0).any()


@pytest.mark.parametrize(
    "node",
    [FEW_ROWS[1], FEW_ROWS[6], MANY_ROWS[0], Node(20, 2, 4, 96, 64, stored=MXFP4, biases=True), PACKED[13], ODD[1]],
    ids=name,
)
def test_result_does_not_depend_on_the_order_of_threads(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, node: Node
) -> None:
    assert len(in_every_order(machine, node, monkeypatch)) == 1


def test_no_tokens_are_no_error(machine: Machine) -> None:
    node = Node(0, 2, 4, 64, 40)
    inputs = node.inputs("fp16")
    assert run(machine, node, inputs).shape == (1, 0, 64)


@pytest.mark.parametrize(
    ("node", "left_out", "says"),
    [
        (Node(1, 1, 521, 8, 8), 0, "E = 521 experts, the kernels sort 520"),
        (Node(1, 1, 2, 32, 32, stored=MXFP4, biases=True), 1, "mxfp4 weights are bytes with biases and scales"),
        (Node(1, 1, 2, 32, 32, stored="fp8", biases=True), 2, "fp8 weights are bytes with biases and scales of fp32"),
        (
            Node(1, 1, 2, 32, 32, stored="fp8", biases=True, factors=True),
            1,
            "fp8 weights have scales and maybe factors, each twice; not 10",
        ),
        (
            Node(1, 1, 2, 32, 32, stored="fp8", biases=True, zeros=True),
            0,
            "fp8 weights have scales and maybe factors, each twice; not 13",
        ),
        (Node(1, 1, 2, 32, 32, stored="nvfp4", biases=True), 0, "nvfp4 weights have groups of 16 columns, not 32"),
        (
            Node(1, 1, 2, 32, 32, stored="int8", biases=True, group=0),
            0,
            "int8 weights have groups of 1 columns or more",
        ),
        (Node(1, 1, 2, 31, 32, stored="uint4", biases=True), 0, "gate_up has rows of 31 values, which fill no bytes"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_refuses(machine: Machine, capfd: pytest.CaptureFixture[str], node: Node, left_out: int, says: str) -> None:
    inputs = node.inputs("fp16")
    with pytest.raises(Refused):
        run(machine, node, inputs[: len(inputs) - left_out])
    assert f"llmexport: MoeExperts: {says}" in capfd.readouterr().err


def test_refuses_transposed_mxfp4(machine: Machine, capfd: pytest.CaptureFixture[str]) -> None:
    node = Node(1, 1, 2, 64, 32, stored=MXFP4, biases=True, transposed=True)
    inputs = node.inputs("fp16")
    inputs[3:5] = np.zeros((2, 64, 64), np.uint8), np.zeros((2, 32, 64), np.uint8)
    inputs[8] = np.zeros((2, 32, 2), np.uint8)
    with pytest.raises(Refused):
        run(machine, node, inputs)
    assert "llmexport: MoeExperts: packed weights are never transposed" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("transposed", "position", "shape", "says"),
    [
        (False, 3, (4, 80, 72), "gate_up has Q = 72 columns, not 64"),
        (False, 3, (4, 81, 64), "gate_up is 81 wide, which are no gates and ups"),
        (False, 4, (4, 72, 40), "down has R = 72 rows, but x has C = 64 columns"),
        (False, 4, (4, 64, 48), "down has S = 48 columns, not 40"),
        (True, 3, (4, 72, 80), "gate_up is transposed and has P = 72 rows, but x has C = 64 columns"),
        (True, 4, (4, 48, 64), "down is transposed and has R = 48 rows, but gate_up is 80 wide"),
        (True, 4, (4, 40, 72), "down has S = 72 columns, not 64"),
        (False, 5, (4, 64), "gate_up_bias has J = 64 elements, but gate_up is 80 wide"),
    ],
)
def test_refuses_sizes(
    machine: Machine,
    capfd: pytest.CaptureFixture[str],
    transposed: bool,
    position: int,
    shape: tuple[int, ...],
    says: str,
) -> None:
    node = Node(3, 2, 4, 64, 40, biases=True, transposed=transposed)
    inputs = node.inputs("fp16")
    inputs[position] = np.zeros(shape, inputs[position].dtype)
    with pytest.raises(Refused):
        run(machine, node, inputs)
    assert f"llmexport: MoeExperts: {says}" in capfd.readouterr().err


@pytest.mark.skipif(SANITIZE, reason="torch is not made for sanitizers")
@pytest.mark.parametrize("node", [*FEW_ROWS, *MANY_ROWS, *ODD, *PACKED], ids=name)
def test_float64_is_the_torch_reference(node: Node) -> None:
    import torch

    from llmexport.plugins.moe_experts import moe_experts

    # Each size in another form; MXFP4 where it fits.
    form = node.C + node.I
    fits = node.C % BLOCK == node.I % BLOCK == 0
    changed = (
        node
        if node.stored
        else replace(
            node,
            activation=ACTIVATIONS[form // 4 % 4],
            transposed=form % 16 > 8 and not fits,
            interleaved=node.T % 2 == 1,
            scale_input=node.K == 1,
            biases=fits or form % 3 == 0,
            stored=MXFP4 if fits else "",
        )
    )
    inputs = changed.inputs("fp32")
    tensors = [*map(torch.from_numpy, inputs), *[None] * (13 - len(inputs))]
    found = moe_experts.reference(*tensors, **changed.attributes)
    assert is_near(changed, found.numpy(), exact(changed, inputs, "fp32"), "fp32")
