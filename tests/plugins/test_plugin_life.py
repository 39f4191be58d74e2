"""A plugin through its whole life, as TensorRT leads it, against the op's torch reference."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from native import gpu_library
from plugin_host import (
    BUILD,
    DTYPES,
    FIELD_CHAR,
    FIELD_FLOAT32,
    FIELD_INT32,
    RUNTIME,
    TRT_TYPES,
    Desc,
    Field,
    Library,
    Machine,
    Plugin,
    Refused,
    desc,
    field,
)
from plugin_memory import GpuMemory

from llmexport.plugins.spec import all_ops
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import Tolerance

OPS = all_ops()
LAYOUTS = range(13)
FIELD_TYPES = {bool: FIELD_INT32, float: FIELD_FLOAT32, str: FIELD_CHAR}
TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
UNIT = {"fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7}

ATTRIBUTES: dict[str, dict[str, Any]] = {
    "Rope": {"interleaved": True},
    "AddRmsNorm": {"epsilon": 1e-6, "weight_offset": 1.0, "round_before_weight": False},
    "GatedAct": {"activation": "swiglu_clamped", "alpha": 1.702, "limit": 7.0},
}
SIZES = {"B": 2, "H": 3, "T": 63, "D": 40, "R": 16, "C": 72, "I": 37}
REFUSED = [
    ("Rope", {}, "Rope: attribute interleaved is missing"),
    ("Rope", {"interleaved": 2}, "Rope: interleaved is 2, not 0 or 1"),
    ("Rope", {"interleaved": 1.0}, "Rope: interleaved has field type 1, a bool is an int32"),
    ("Rope", {"interleaved": True, "base": 1e4}, "Rope has no attribute base"),
    ("GatedAct", {"activation": "relu"}, "GatedAct: activation is 'relu', not one of silu, gelu_tanh, gelu_erf"),
    ("GatedAct", {"activation": 1}, "GatedAct: activation has field type 5, a string is chars"),
    ("GatedAct", {"alpha": float("nan")}, "GatedAct: alpha is NaN"),
    ("AddRmsNorm", {"epsilon": 1}, "AddRmsNorm: epsilon has field type 5, a float is a float32"),
]


@pytest.fixture(params=OPS)
def op(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def library(machine: Machine) -> Library:
    return machine.library


def shapes(op: str, **changed: int) -> list[tuple[int, ...]]:
    sizes = {**SIZES, **changed}
    return [tuple(sizes[letter] for letter in dims) for dims in OPS[op].inputs.values()]


def tensors(op: str, dtype: str, **changed: int) -> list[torch.Tensor]:
    seed = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=seed).to(TORCH[dtype]) for shape in shapes(op, **changed)]


def numpy_of(tensor: torch.Tensor, dtype: str) -> np.ndarray:
    return tensor.view(torch.uint8).numpy().view(DTYPES[dtype]).reshape(tensor.shape)


def expected(op: str, dtype: str, inputs: list[torch.Tensor]) -> list[np.ndarray]:
    found = OPS[op].reference(*inputs, **ATTRIBUTES[op])
    return [numpy_of(y.contiguous(), dtype) for y in (found if isinstance(found, tuple) else (found,))]


def all_descs(plugin: Plugin, op: str) -> list[Desc]:
    inputs = [desc(s, DTYPES["fp16"]) for s in shapes(op)]
    return [*inputs, *(desc(s, DTYPES["fp16"]) for s in plugin.output_shapes(inputs, known=True))]


def test_library_serves_the_ops_of_this_tree(library: Library) -> None:
    assert sorted(library.creators) == sorted(OPS)


def test_creator_declares_the_reference_signature(library: Library, op: str) -> None:
    host, creator = library.host, library.creators[op]
    assert (host.host_version(creator), host.host_namespace(creator)) == (b"1", b"llmexport")
    assert library.field_names(op) == {n: FIELD_TYPES[t] for n, t in OPS[op].attributes.items()}


@pytest.mark.parametrize(("op", "changed", "says"), REFUSED, ids=[r[2] for r in REFUSED])
def test_refuses_attribute_by_its_value(
    library: Library, capfd: pytest.CaptureFixture[str], op: str, changed: dict[str, Any], says: str
) -> None:
    attributes = {**ATTRIBUTES[op], **changed} if changed else {}
    with pytest.raises(Refused):
        library.create(op, attributes)
    assert f"llmexport: {says}" in capfd.readouterr().err


def test_refuses_attribute_of_two_values(library: Library, capfd: pytest.CaptureFixture[str]) -> None:
    two = field("interleaved", True)
    two.length = 2
    with pytest.raises(Refused):
        library.create_from("Rope", [two])
    assert "llmexport: Rope: interleaved has 2 values, not one" in capfd.readouterr().err


def test_text_may_come_without_its_nul(library: Library) -> None:
    fields: list[Field] = [field(n, v) for n, v in ATTRIBUTES["GatedAct"].items()]
    fields[0].length -= 1
    assert library.create_from("GatedAct", fields).attributes()["activation"] == b"swiglu_clamped\0"


@pytest.mark.parametrize("known", [True, False])
def test_shapes_are_the_references(library: Library, op: str, known: bool) -> None:
    plugin = library.create(op, ATTRIBUTES[op])
    inputs = [desc(s, DTYPES["bf16"]) for s in shapes(op)]
    want = [y.shape for y in expected(op, "bf16", tensors(op, "bf16"))]
    assert plugin.output_shapes(inputs, known) == want


def test_types_are_those_of_the_inputs(library: Library, op: str, capfd: pytest.CaptureFixture[str]) -> None:
    plugin, count = library.create(op, ATTRIBUTES[op]), len(OPS[op].inputs)
    for dtype in DTYPES.values():
        assert set(plugin.output_types([TRT_TYPES[dtype]] * count)) == {TRT_TYPES[dtype]}
    for types in ([3] * count, [0] * (count - 1) + [1]):
        with pytest.raises(Refused):
            plugin.output_types(types)
    last = list(OPS[op].inputs)[-1]
    assert f"{op}: {last} has type 1, but all inputs share one" in capfd.readouterr().err


def test_every_format_combination(library: Library, op: str) -> None:
    """Linear layout and one float type throughout; what lies beyond the position asked for is not read."""
    plugin = library.create(op, ATTRIBUTES[op])
    io = all_descs(plugin, op)
    for position, kind, layout, first in itertools.product(range(len(io)), range(12), LAYOUTS, (0, 1, 7)):
        for d in io:
            d.type, d.format = first, 0
        io[position].type, io[position].format = kind, layout
        right = layout == 0 and kind in (0, 1, 7) and (position == 0 or kind == first)
        assert plugin.supports(position, io) == right, (position, kind, layout, first)


@pytest.mark.parametrize(
    ("op", "position", "shape", "says"),
    [
        ("Rope", 0, (2, 3, 63, 30), "Rope: cos has R = 16 angles, but x has D = 30 dimensions, fewer than 2 * R"),
        ("Rope", 2, (2, 62, 16), "Rope: dimension 1 of sin is 62, but T is 63"),
        ("AddRmsNorm", 2, (71,), "AddRmsNorm: dimension 0 of weight is 71, but C is 72"),
        ("GatedAct", 1, (3, 63, 37), "GatedAct: dimension 0 of up is 3, but B is 2"),
    ],
)
def test_refuses_shapes_by_their_size(
    library: Library, capfd: pytest.CaptureFixture[str], op: str, position: int, shape: tuple[int, ...], says: str
) -> None:
    """At build time if the sizes are known by then, and when they become known."""
    plugin = library.create(op, ATTRIBUTES[op])
    given = shapes(op)
    given[position] = shape
    inputs = [desc(s, DTYPES["fp16"]) for s in given]
    # Every op's outputs have the shape of its first input.
    io = [*inputs, *[inputs[0]] * len(OPS[op].outputs)]
    for ask in (
        lambda: plugin.output_shapes(inputs, known=True),
        lambda: plugin.configure(io),
        lambda: plugin.shape_change(io),
    ):
        with pytest.raises(Refused):
            ask()
        assert f"llmexport: {says}" in capfd.readouterr().err
    plugin.output_shapes(inputs, known=False)


def test_refuses_another_rank(library: Library, op: str, capfd: pytest.CaptureFixture[str]) -> None:
    plugin = library.create(op, ATTRIBUTES[op])
    io = all_descs(plugin, op)
    io[0].dims.rank -= 1
    with pytest.raises(Refused):
        plugin.shape_change(io)
    rank, dims = io[0].dims.rank, "".join(next(iter(OPS[op].inputs.values())))
    assert f"has {rank} dimensions, not the {rank + 1} of {dims}" in capfd.readouterr().err


def test_configures_with_dynamic_dimensions(library: Library, op: str) -> None:
    plugin = library.create(op, ATTRIBUTES[op])
    io = all_descs(plugin, op)
    for d in io:
        d.dims.sizes[0] = -1
    plugin.configure(io)
    assert plugin.workspace(io) == 0


@pytest.mark.parametrize("phase", [BUILD, RUNTIME])
def test_attributes_survive_serialisation(library: Library, op: str, phase: int) -> None:
    codes = {bool: "i", float: "f"}
    texts = {n: v.encode() + b"\0" for n, v in ATTRIBUTES[op].items() if isinstance(v, str)}
    numbers = {n: struct.pack(codes[type(v)], v) for n, v in ATTRIBUTES[op].items() if n not in texts}
    plugin = library.create(op, ATTRIBUTES[op], phase)
    assert plugin.attributes() == {**texts, **numbers}
    again = plugin.recreate()
    del plugin
    assert again.clone().recreate().attributes() == {**texts, **numbers}


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_the_references(machine: Machine, op: str, dtype: str) -> None:
    inputs = tensors(op, dtype)
    plugin = machine.library.create(op, ATTRIBUTES[op]).recreate().attach()
    found = plugin.run(machine.memory(), [numpy_of(x, dtype) for x in inputs])
    for name, want, have in zip(OPS[op].outputs, expected(op, dtype, inputs), found, strict=True):
        # Rope and the sum are defined rounding by rounding; the rest may fall on another side of a tie.
        exact = op == "Rope" or name == "sum"
        units = 4 if dtype == "fp32" else 1.01
        assert compare(want, have).excess(Tolerance(units * UNIT[dtype], units * UNIT[dtype], scaled=True)) <= 1
        assert not exact or (have == want).all()


def test_two_contexts_share_one_plugin(machine: Machine, op: str) -> None:
    """Each keeps the shapes it was given, though the other's changed in between."""
    plugin = machine.library.create(op, ATTRIBUTES[op])
    memory, contexts = machine.memory(), [plugin.attach(), plugin.attach()]
    inputs = [tensors(op, "fp32", T=t) for t in (63, 5)]
    runs = [
        context.prepare(memory, [numpy_of(x, "fp32") for x in some])
        for context, some in zip(contexts, inputs, strict=True)
    ]
    for run, some in zip(runs, inputs, strict=True):
        run.enqueue(memory.stream)
        for want, have in zip(expected(op, "fp32", some), run.results(), strict=True):
            assert compare(want, have).rms_ratio < 1e-6


@pytest.mark.gpu
def test_enqueue_is_captured_in_a_cuda_graph(op: str, tmp_path: Path) -> None:
    """It neither allocates nor synchronises, or the capture fails."""
    library, memory = Library(gpu_library(tmp_path)), GpuMemory()
    inputs = tensors(op, "bf16")
    run = library.create(op, ATTRIBUTES[op]).attach().prepare(memory, [numpy_of(x, "bf16") for x in inputs])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.enqueue(torch.cuda.current_stream().cuda_stream)
    graph.replay()
    torch.cuda.synchronize()
    for want, have in zip(expected(op, "bf16", inputs), run.results(), strict=True):
        assert compare(want, have).rms_ratio < UNIT["bf16"]
