"""MoeExperts' body for ONNX Runtime alone: the reference's numbers, rows of no other tokens, no weight copied."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
import torch
from moe_bodies import CHOICES, EVERY, TOKENS, WEIGHTS, as_stored, found, kept, layouts, poisoned, ran
from moe_bodies import model as node
from moe_cases import LAYOUTS, C, E, I, K, Layout, example, excess
from one_node import session
from torch import Tensor

from llmexport.plugins.moe_experts.by_expert import ROOM
from llmexport.plugins.moe_experts.products import BLOCK_BYTES, FEW, block_height

# Experts enough for outputs that are padded, and for a sum, which a token of few of many experts takes.
SIZES = {"padded": (E, K, C, I), "either": (16, 2, C, I), "one of many": (256, 1, C, I)}


def model(layout: Layout, tensors: dict[str, Tensor]) -> onnx.ModelProto:
    return node(layout, tensors, "onnxruntime")


def is_added(tensors: dict[str, Tensor], experts: int) -> bool:
    """Whether the outputs, padded, would take more than there is room for."""
    chosen = tensors["experts"].flatten()
    return int(chosen.bincount().max()) * experts > ROOM * len(chosen)


@layouts
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_equals_the_reference_at_any_number_of_tokens(dtype, sizes, layout):
    stored = example(layout, dtype=dtype, sizes=sizes)
    runtime = session(model(layout, stored))
    for tokens in TOKENS:
        tensors = example(layout, tokens, dtype, sizes=sizes) | {n: stored[n] for n in WEIGHTS if n in stored}
        y = found(runtime, tensors)
        assert (y.dtype, y.shape) == (dtype, tensors["x"].shape)
        assert excess(layout(tensors), y) <= 1


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu_erf", "swiglu_clamped"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_layout_equals_the_reference(transposed, interleaved, activation):
    layout = Layout(activation, transposed, interleaved)
    tensors = example(layout)
    assert excess(layout(tensors), found(session(model(layout, tensors)), tensors)) <= 1


@pytest.mark.parametrize(
    ("dtype", "stored"), [("float32", "bfloat16"), ("float32", "float16"), ("float16", "bfloat16")]
)
@pytest.mark.parametrize("layout", ["qwen", "gpt_oss"])
def test_weights_of_another_type_count_as_those_numbers(layout, dtype, stored):
    tensors = example(LAYOUTS[layout], (1, 7), getattr(torch, dtype), getattr(torch, stored))
    y = found(session(model(LAYOUTS[layout], tensors)), tensors)
    assert excess(LAYOUTS[layout](tensors), y) <= 1


def test_both_ways_to_collect_outputs_are_taken():
    layout, sizes = LAYOUTS["qwen"], SIZES["either"]
    assert {is_added(example(layout, tokens, sizes=sizes), sizes[0]) for tokens in TOKENS} == {True, False}
    assert not any(is_added(example(layout, tokens), E) for tokens in TOKENS)


@layouts
@pytest.mark.parametrize("experts", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("count", [E, pytest.param(40, marks=pytest.mark.slow)])
def test_any_choice_equals_the_reference(count, experts, layout):
    tensors = example(layout, (1, 130), experts=experts, sizes=(count, experts.shape[-1], C, I))
    assert excess(layout(tensors), found(session(model(layout, tensors)), tensors)) <= 1


@layouts
@pytest.mark.parametrize("count", [E, 40])
def test_no_expert_shows_that_no_token_chose(count, layout):
    tensors = example(layout, experts=torch.tensor([0, 4, 5]).expand(1, 7, 3), sizes=(count, 3, C, I))
    expected = found(session(model(layout, tensors)), tensors)
    assert torch.equal(found(session(model(layout, poisoned(tensors, slice(1, 4)))), tensors), expected)


@pytest.mark.parametrize("layout", ["qwen", "gpt_oss", "uint4-zeros"])
@pytest.mark.parametrize("tokens", [1, 7, 130])
@pytest.mark.parametrize("count", [E, 64])
def test_multiplies_the_rows_there_are_by_weights_that_no_operator_copies(count, tokens, layout, tmp_path):
    tensors = example(EVERY[layout], (1, tokens), sizes=(count, 2, C, I))
    read = inputs_read(ran(model(EVERY[layout], tensors), tensors, tmp_path))
    counts = tensors["experts"].flatten().bincount()
    expected = [p for rows in counts[counts > 0].tolist() for p in products(EVERY[layout], rows)]
    assert sorted(inputs[:2] for op, inputs in read if op in PRODUCTS) == sorted(expected)
    stacks = [list(t.shape) for n, t in tensors.items() if n in WEIGHTS and t.ndim == 3]
    assert {op for op, inputs in read if any(stack in inputs for stack in stacks)} <= {"Scan", "If"}


PRODUCTS = ("MatMul", "FusedMatMul", "Gemm")


def inputs_read(events: list[dict[str, Any]]) -> list[tuple[str, list[list[int]]]]:
    """Of each operator that ran, its name and the shapes that it read."""
    return [(e["op_name"], [next(iter(s.values())) for s in e["input_type_shape"]]) for e in events]


def products(layout: Layout, rows: int) -> list[list[list[int]]]:
    """What the two products of an expert of so many rows multiply, of weights that one block holds; of one row by
    nibbles, the tables."""
    transposed = layout.transposed
    least, most = FEW[transposed]
    sizes = ((2 * I, C), (C, I))
    if layout.packed and rows == 1:
        return [[[i // 2, 2], [2, 256]] for _, i in sizes]
    if not least <= rows <= most:
        return [[[rows, i], [i, o] if transposed else [o, i]] for o, i in sizes]
    if transposed:
        return [[[1, 1, i, o], [1, rows, i, 1]] for o, i in sizes]
    return [[[o, i], [rows, i]] for o, i in sizes]


PAIRS = ["mxfp4", "nvfp4", "nvfp4-interleaved", "uint4-zeros"]
# A byte of two scales; groups that fill the rows of one matrix alone; weights that multiply what goes in.
ODD = {
    "columns": (Layout(bias=True, format="uint4", group=1), (E, K, C, I)),
    "one of two": (Layout(bias=True, format="uint4", group=24, factors=True, zeros=True), (E, K, C, 24)),
    "the other": (Layout(interleaved=True, bias=True, format="uint4", group=64, factors=True), (E, K, C, 96)),
    "scaled inputs": (Layout(scale_input=True, bias=True, format="uint4", group=16), (E, 1, C, I)),
}


@pytest.mark.parametrize(("layout", "sizes"), ODD.values(), ids=ODD)
@pytest.mark.parametrize("tokens", [1, 3, 30])
def test_numbers_of_4_bits_in_any_groups_equal_the_reference(tokens, layout, sizes):
    tensors = example(layout, (1, tokens), sizes=sizes)
    assert excess(layout(tensors), found(session(model(layout, tensors)), tensors)) <= 1


# One token, and several of which each has an expert for itself.
@pytest.mark.parametrize("tokens", [1, E])
@pytest.mark.parametrize("layout", PAIRS)
def test_a_row_alone_is_multiplied_by_nibbles_whose_numbers_are_nowhere_made(layout, tokens, tmp_path):
    experts = torch.arange(tokens)[None, :, None]
    tensors = example(EVERY[layout], (1, tokens), experts=experts, sizes=(E, 1, 2 * C, 8 * C))
    whole = model(EVERY[layout], tensors)
    assert excess(EVERY[layout](tensors), found(session(whole), tensors)) <= 1
    numbers = 2 * max(tensors[n][0].numel() for n in ("gate_up", "down"))
    sizes = [int(e["output_size"]) for e in ran(whole, tensors, tmp_path)]
    assert 2 * numbers <= max(sizes) < 4 * numbers


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("layout", [n for n, form in EVERY.items() if form.packed])
def test_numbers_are_looked_up_by_the_operator_that_copies_them_fastest(layout, tokens, target, tmp_path):
    tensors = example(EVERY[layout], (1, tokens))
    read = inputs_read(ran(node(EVERY[layout], tensors, target), tensors, tmp_path))
    gathers = {op for op, inputs in read if op.startswith("Gather") and inputs[0][-1:] == [256]}
    assert gathers == {"GatherElements"}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_weight_is_turned_in_memory(dtype, transposed, tmp_path):
    layout, sizes = Layout(transposed=transposed), (E, 2, C, 3 * I)
    read = []
    for tokens in (1, 7, 130):
        tensors = example(layout, (1, tokens), dtype, sizes=sizes)
        read += inputs_read(ran(model(layout, tensors), tensors, tmp_path))
    matrices = [sorted(t.shape[1:]) for n, t in tensors.items() if n in ("gate_up", "down")]
    turned = [sorted(n for n in inputs[0] if n > 1) for op, inputs in read if op == "Transpose"]
    assert turned
    assert not [shape for shape in turned if shape in matrices]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bytes", [BLOCK_BYTES, 8 * C * 4])
def test_equals_the_reference_on_either_side_of_few_rows(bytes, dtype, transposed, monkeypatch):
    monkeypatch.setattr(f"{block_height.__module__}.BLOCK_BYTES", bytes)
    layout, (least, most) = LAYOUTS["gpt_oss" if transposed else "qwen"], FEW[transposed]
    counts = torch.tensor([1, least - 1, least, most, most + 1, 0])
    experts = torch.arange(E).repeat_interleave(counts)[None, :, None]
    tensors = example(layout, (1, int(counts.sum())), dtype, experts=experts, sizes=(E, 1, C, I))
    assert excess(layout(tensors), found(session(model(layout, tensors)), tensors)) <= 1


@pytest.mark.parametrize(("rows", "columns"), [(768, 768), (2880, 5760), (64, 64), (97, 10**6), (2, 1)])
def test_blocks_divide_the_rows_and_are_the_largest_that_a_cache_holds(rows, columns):
    height = block_height(rows, columns)
    fits = [n for n in range(1, rows + 1) if rows % n == 0 and n * columns * 4 <= BLOCK_BYTES]
    assert height == max(fits, default=1)


def test_outputs_take_no_more_room_than_that_however_uneven_the_choice(tmp_path):
    layout, count, tokens = LAYOUTS["qwen"], 64, 130
    tensors = example(layout, (1, tokens), experts=torch.full((1, tokens, 1), 4), sizes=(count, 1, C, I))
    sizes = [int(e["output_size"]) for e in ran(model(layout, tensors), tensors, tmp_path)]
    assert 0 < max(sizes) <= ROOM * tokens * C * 4


@pytest.mark.parametrize("layout", ["qwen", "llama4", "gpt_oss", "mxfp4", "uint4-zeros"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_onnx_runtime_keeps_weights_as_they_are_stored(dtype, layout, tmp_path):
    tensors = example(EVERY[layout], dtype=dtype, stored=torch.bfloat16, sizes=(40, 1, C, I))
    assert kept(model(EVERY[layout], tensors), tmp_path) == as_stored(tensors)


def test_where_weights_scale_the_inputs_of_several_choices_the_body_of_blocks_stands():
    layout = LAYOUTS["llama4"]
    for top_k, same in ((2, True), (1, False)):
        tensors = example(layout, sizes=(E, top_k, C, I))
        assert (model(layout, tensors) == node(layout, tensors)) is same
