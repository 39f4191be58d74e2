"""A plugin through its whole life, as TensorRT leads it, against the op's torch reference."""

from __future__ import annotations

import itertools
import struct
from ctypes import c_char_p
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from native import gpu_library
from plugin_cases import CASES, OPS, Case, array_of, plugins, served
from plugin_host import DTYPES, Machine, computed, lay_out
from plugin_memory import CpuMemory, GpuMemory, Memory

from llmexport.plugins.host import (
    BUILD,
    FIELD_CHAR,
    FIELD_FLOAT32,
    FIELD_INT32,
    RUNTIME,
    Desc,
    Field,
    Library,
    Plugin,
    Refused,
    desc,
    field,
    number,
)
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import Tolerance

LAYOUTS = range(3)
FIELD_TYPES = {bool: FIELD_INT32, int: FIELD_INT32, float: FIELD_FLOAT32, str: FIELD_CHAR}
UNIT = {"fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7}
# TensorRT's numbers of the types that a tensor may have, by the name that @op gives them.
FLOATS = [0, 1, 7]
ALLOWED = {"T": FLOATS, "W": [*FLOATS, 2], "S": [0, 2], "float32": [0], "int32": [3], "uint8": [2]}

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


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def library(machine: Machine) -> Library:
    return machine.library


def created(library: Library, case: Case) -> Plugin:
    return library.create(case.op, case.attributes)


def input_descs(case: Case, dtype: str = "fp16") -> list[Desc]:
    types = [array_of(torch.empty(0, dtype=case.dtype_of(n, dtype))).dtype for n in case.inputs]
    return [desc(s, t) for s, t in zip(case.shapes(), types, strict=True)]


def all_descs(plugin: Plugin, case: Case, dtype: str = "fp16") -> list[Desc]:
    inputs = input_descs(case, dtype)
    shapes = plugin.output_shapes(inputs, known=True)
    types = [array_of(torch.empty(0, dtype=case.dtype_of(n, dtype))).dtype for n in case.spec.outputs]
    return [*inputs, *(desc(s, t) for s, t in zip(shapes, types, strict=True))]


def test_library_has_the_plugins_of_the_ops(library: Library) -> None:
    assert set(library.creators) == plugins()


@pytest.mark.parametrize("op", sorted(served()))
def test_creator_declares_the_reference_signature(library: Library, op: str) -> None:
    said = [library.call(name, library.creators[op], returns=c_char_p) for name in ("Version", "Namespace")]
    assert said == [str(OPS[op].version).encode(), b"llmexport"]
    assert library.field_names(op) == {n: FIELD_TYPES[t] for n, t in OPS[op].attributes.items()}


def test_every_op_with_a_plugin_has_a_case() -> None:
    assert {case.op for case in CASES.values()} == served()


@pytest.mark.parametrize(("op", "changed", "says"), REFUSED, ids=[r[2] for r in REFUSED])
def test_refuses_attribute_by_its_value(
    library: Library, capfd: pytest.CaptureFixture[str], op: str, changed: dict[str, Any], says: str
) -> None:
    attributes = {**CASES[op].attributes, **changed} if changed else {}
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
    fields: list[Field] = [field(n, v) for n, v in CASES["GatedAct"].attributes.items()]
    fields[0].length -= 1
    assert library.create_from("GatedAct", fields).attributes()["activation"] == b"swiglu_clamped\0"


@pytest.mark.parametrize("known", [True, False])
def test_shapes_are_the_references(library: Library, case: Case, known: bool) -> None:
    want = [y.shape for y in case.expected(case.tensors("bf16"))]
    assert created(library, case).output_shapes(input_descs(case, "bf16"), known) == want


def test_outputs_may_have_the_memory_that_the_op_says(library: Library, case: Case) -> None:
    plugin, inputs = created(library, case), [*case.spec.inputs]
    said = {i: inputs.index(case.spec.aliases[n]) for i, n in enumerate(case.spec.outputs) if n in case.spec.aliases}
    # There is no output before the first and after the last.
    assert [plugin.aliased(i) for i in range(-1, plugin.outputs + 1)] == [
        said.get(i, -1) for i in range(-1, plugin.outputs + 1)
    ]


def test_types_are_those_of_the_reference(library: Library, case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    plugin = created(library, case)
    for dtype in DTYPES:
        want = [number(y.dtype) for y in case.expected(case.tensors(dtype))]
        types = [d.type for d in input_descs(case, dtype)]
        assert plugin.output_types(types) == want
        for i, name in enumerate(case.inputs):
            with pytest.raises(Refused):
                plugin.output_types([*types[:i], 9, *types[i + 1 :]])
            assert f"{case.op}: {name} has type 9, not " in capfd.readouterr().err


def test_every_format_combination(library: Library, case: Case) -> None:
    """Linear layout and the types of the op; what lies beyond the position asked for is not read."""
    plugin, kinds = created(library, case), [case.spec.types[n] for n in (*case.inputs, *case.spec.outputs)]
    for dtype in DTYPES:
        io = all_descs(plugin, case, dtype)
        right = [d.type for d in io]
        for position, kind, layout in itertools.product(range(len(io)), range(12), LAYOUTS):
            io[position].type, io[position].format = kind, layout
            # Of T and W the first decides.
            free = kinds.index(kinds[position]) == position
            fits = kind in (ALLOWED[kinds[position]] if free else [right[position]])
            assert plugin.supports(position, io) == (layout == 0 and fits), (position, kind, layout)
            io[position].type, io[position].format = right[position], 0


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
    plugin = created(library, CASES[op])
    given = CASES[op].shapes()
    given[position] = shape
    inputs = [desc(s, DTYPES["fp16"]) for s in given]
    # These ops' outputs have the shape of its first input.
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


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ([(2, 3, 9), (2, 3, 8), (2, 3, 8)], "GatedAct: gate has J = 9 columns, not 8"),
        ([(2, 3, 16), (2, 3, 8), (2, 3, 8)], "GatedAct: gate has J = 16 columns, not 8"),
        ([(2, 3, 9), (2, 3, 4)], "GatedAct: gate has J = 9 columns, not 8"),
        ([(2, 3, 8), (2, 3, 8)], "GatedAct: gate has J = 8 columns, not 16"),
    ],
)
def test_gates_that_do_not_fit_their_other_half_are_refused(
    library: Library, capfd: pytest.CaptureFixture[str], shapes: list[tuple[int, ...]], says: str
) -> None:
    plugin = created(library, CASES["GatedAct"])
    io = [desc(s, DTYPES["fp16"]) for s in shapes]
    for ask in (plugin.configure, plugin.shape_change):
        with pytest.raises(Refused):
            ask(io)
        assert f"llmexport: {says}" in capfd.readouterr().err


def test_refuses_another_rank(library: Library, case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    plugin = created(library, case)
    io = all_descs(plugin, case)
    io[0].dims.rank -= 1
    with pytest.raises(Refused):
        plugin.shape_change(io)
    rank, dims = io[0].dims.rank, "".join(next(iter(case.spec.inputs.values())))
    assert f"has {rank} dimensions, not the {rank + 1} of {dims}" in capfd.readouterr().err


def test_configures_with_dynamic_dimensions(library: Library, case: Case) -> None:
    """Every B and T, as in an engine; what enqueue may then use is the same bytes as with known dimensions."""
    plugin = created(library, case)
    known, io = all_descs(plugin, case), all_descs(plugin, case)
    names = [*(case.spec.inputs[n] for n in case.inputs), *[("B", "T")] * len(case.spec.outputs)]
    for d, letters in zip(io, names, strict=True):
        for i, letter in enumerate(letters[: d.dims.rank]):
            if letter in "BT":
                d.dims.sizes[i] = -1
    plugin.configure(io)
    assert plugin.workspace(io, known) == plugin.workspace(known, known)


@pytest.mark.parametrize(
    ("name", "letter", "most", "says"),
    [
        ("Rope", "T", 2**30, "Rope: the product of BT is 2147483648, the kernels take 2147483647"),
        ("Rope", "H", 2**20, "Rope: the product of H is 1048576, the kernels take 262140"),
        ("QkNormRope", "T", 2**31, "QkNormRope: the product of BT is 4294967296, the kernels take 2147483647"),
        ("QkNormRope", "H", 2**16, "QkNormRope: q, k and v have 65540 heads, the kernels take 65535"),
        ("QkNormRopeWrite", "T", 2**31, "QkNormRopeWrite: the product of BT is 4294967296, the kernels take 21474836"),
        ("GatedAct", "T", 2**40, "GatedAct: the product of BTI is 81363860455424, the kernels take 1099511627264"),
        ("AddRmsNorm", "T", 2**31, "AddRmsNorm: the product of BT is 4294967296, the kernels take 2147483647"),
        ("CausalConv1d", "B", 2**31, "CausalConv1d: the product of BT is 135291469824, the kernels take 2147483647"),
        ("CausalConv1d", "C", 2**21, "CausalConv1d: the product of C is 2097152, the kernels take 2097120"),
        ("GatedRmsNorm", "T", 2**63 - 1, "GatedRmsNorm: the product of BTH is 9223372036854775807, the kernels"),
        ("MoeRoute", "T", 2**31, "MoeRoute: the product of BT is 4294967296, the kernels take 2147483647"),
        ("MoeExperts", "T", 2**29, "MoeExperts: the product of BTK is 2147483648, the kernels take 1073741824"),
        (
            "MoeExperts",
            "C",
            2**40,
            "MoeExperts: 36 pairs of C = 1099511627776 columns take 309237645312 blocks, a grid",
        ),
        ("SinkAttention", "T", 2**28, "SinkAttention: the product of BHT is 2147483648, the kernels take 2147483647"),
        ("SinkAttention", "S", 2**31, "SinkAttention: the product of S is 2147483648, the kernels take 2147483647"),
        ("Wkv", "B", 2**16, "Wkv: the product of B is 65536, the kernels take 65535"),
        ("Wkv7", "B", 2**16, "Wkv7: the product of B is 65536, the kernels take 65535"),
        ("KimiDeltaRule", "T", 2**31, "KimiDeltaRule: the product of T is 2147483648, the kernels take 2147483647"),
        ("GatedDeltaNet", "B", 2**16, "GatedDeltaNet: the product of B is 65536, the kernels take 65535"),
        ("GatedDeltaNet", "T", 2**31, "GatedDeltaNet: the product of T is 2147483648, the kernels take 2147483647"),
        ("GatedDeltaRule", "B", 2**16, "GatedDeltaRule: the product of B is 65536, the kernels take 65535"),
        ("GatedDeltaRule", "T", 2**31, "GatedDeltaRule: the product of T is 2147483648, the kernels take 2147483647"),
    ],
)
def test_refuses_a_profile_larger_than_the_kernels_take(
    library: Library, capfd: pytest.CaptureFixture[str], name: str, letter: str, most: int, says: str
) -> None:
    case = CASES[name]
    plugin = created(library, case)
    known, io, largest = (all_descs(plugin, case) for _ in range(3))
    for i, d in (
        (i, d) for i, n in enumerate(case.inputs) for d, its in enumerate(case.spec.inputs[n]) if its == letter
    ):
        io[i].dims.sizes[d], largest[i].dims.sizes[d] = -1, most
    for output in io[len(case.inputs) :]:
        output.dims.sizes[:] = [-1] * 8
    plugin.configure(io, known)
    with pytest.raises(Refused):
        plugin.configure(io, largest)
    assert f"llmexport: {says}" in capfd.readouterr().err


@pytest.mark.parametrize("phase", [BUILD, RUNTIME])
def test_attributes_survive_serialisation(library: Library, case: Case, phase: int) -> None:
    codes = {bool: "i", int: "i", float: "f"}
    texts = {n: v.encode() + b"\0" for n, v in case.attributes.items() if isinstance(v, str)}
    numbers = {n: struct.pack(codes[type(v)], v) for n, v in case.attributes.items() if n not in texts}
    plugin = library.create(case.op, case.attributes, phase)
    assert plugin.attributes() == {**texts, **numbers}
    again = plugin.recreate()
    del plugin
    assert again.clone().recreate().attributes() == {**texts, **numbers}


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_the_references(machine: Machine, case: Case, dtype: str) -> None:
    inputs = case.tensors(dtype)
    plugin = created(machine.library, case).recreate().attach()
    if dtype not in case.dtypes:
        with pytest.raises(Refused):
            plugin.configure(all_descs(plugin, case, dtype))
        return
    found = computed(plugin, machine.memory(), [array_of(x) for x in inputs])
    for name, want, have in zip(case.spec.outputs, case.expected(inputs), found, strict=True):
        assert want.dtype == have.dtype
        units = case.units[want.dtype.itemsize == 2] * UNIT[dtype if want.dtype.itemsize == 2 else "fp32"]
        assert compare(want, have).excess(Tolerance(units, units, scaled=True)) <= 1
        assert name not in case.exact or (have == want).all()


def test_numbers_are_right_in_a_profile_of_larger_shapes(machine: Machine, case: Case) -> None:
    """Where parts of the workspace lie follows from the shapes, and what lies between them is NaN."""
    dtype = case.dtypes[-1]
    plugin = created(machine.library, case).attach()
    larger = replace(case, sizes={**case.sizes, "B": case.sizes["B"] + 1, "T": 2 * case.sizes["T"] + 3})
    most = all_descs(plugin, larger, dtype)
    inputs = case.tensors(dtype)
    plugin.configure(all_descs(plugin, case, dtype), most)
    memory = machine.memory()
    run = lay_out(plugin, memory, [array_of(x) for x in inputs], most=most)
    run.enqueue(memory.stream)
    for want, have in zip(case.expected(inputs), run.results(), strict=True):
        units = case.units[want.dtype.itemsize == 2] * UNIT[dtype if want.dtype.itemsize == 2 else "fp32"]
        assert compare(want, have).excess(Tolerance(units, units, scaled=True)) <= 1


def test_two_contexts_share_one_plugin(machine: Machine, case: Case) -> None:
    """Each keeps the shapes it was given, though the other's changed in between."""
    plugin, dtype = created(machine.library, case), case.dtypes[0]
    memory, contexts = machine.memory(), [plugin.attach(), plugin.attach()]
    inputs = [case.tensors(dtype, T=t) for t in (case.sizes["T"], 5)]
    runs = [
        lay_out(context, memory, [array_of(x) for x in some]) for context, some in zip(contexts, inputs, strict=True)
    ]
    for run, some in zip(runs, inputs, strict=True):
        run.enqueue(memory.stream)
        for want, have in zip(case.expected(some), run.results(), strict=True):
            assert compare(want, have).rms_ratio < case.units[dtype != "fp32"] * UNIT[dtype]


# Launches in other chains than those of the cases: no sort, a scaled input before, tiles of many rows, a merge after.
CHAINS = {
    "unsorted": replace(CASES["MoeExperts"], sizes={**CASES["MoeExperts"].sizes, "B": 1}),
    "scaled": replace(CASES["MoeExperts"], attributes={**CASES["MoeExperts"].attributes, "scale_input": True}),
    "many-rows": replace(CASES["MoeExperts"], sizes={**CASES["MoeExperts"].sizes, "T": 130}),
    "splits": replace(CASES["SinkAttention"], attributes={**CASES["SinkAttention"].attributes, "window": 0}),
}
CHAINS["splits"] = replace(CHAINS["splits"], sizes={**CASES["SinkAttention"].sizes, "T": 1, "S": 600})
ON_GPU = {**CASES, **CHAINS}
ROUTED = [n for n, case in ON_GPU.items() if case.op == "MoeExperts"]
ROUTINGS, REPLAYS, CALLS = 7, 1000, 10  # of a graph on a GPU; of the plugin on the emulator


@pytest.mark.parametrize("name", ROUTED)
def test_each_replay_follows_its_own_routing(machine: Machine, name: str) -> None:
    """Bit by bit as a launch of that routing alone: nothing of the replay before is seen."""
    case, memory = ON_GPU[name], machine.memory()
    inputs = [array_of(x) for x in case.tensors("bf16")]
    at, random = case.inputs.index("experts"), np.random.default_rng(0)
    shape = (*inputs[at].shape[:-1], case.sizes["E"])
    routings = [random.random(shape).argsort(-1)[..., : case.sizes["K"]].astype(np.int32) for _ in range(ROUTINGS)]
    plugin = created(machine.library, case).attach()
    alone = [computed(plugin, memory, [*inputs[:at], r, *inputs[at + 1 :]])[0].tobytes() for r in routings]
    assert len(set(alone)) == ROUTINGS
    run = lay_out(plugin, memory, inputs)
    replay, count = (lambda: run.enqueue(memory.stream)), CALLS
    if not isinstance(memory, CpuMemory):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run.enqueue(torch.cuda.current_stream().cuda_stream)
        replay, count = graph.replay, REPLAYS
    for i in range(count):
        write(memory, run.inputs[at], routings[i % ROUTINGS])
        replay()
        assert run.results()[0].tobytes() == alone[i % ROUTINGS], i


def write(memory: Memory, address: int, values: np.ndarray) -> None:
    content = values.reshape(-1).view(np.uint8)
    if isinstance(memory, CpuMemory):
        memory.blocks[address][:] = content
    else:
        memory.blocks[address].copy_(torch.from_numpy(content))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_two_streams_do_not_disturb_each_other(name: str) -> None:
    library, memory = Library(gpu_library()), GpuMemory()
    plugin = created(library, ON_GPU[name])
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    inputs = [ON_GPU[name].tensors("bf16", B=b) for b in (2, 3)]
    runs = [lay_out(plugin.attach(), memory, [array_of(x) for x in some]) for some in inputs]
    torch.cuda.synchronize()
    for _ in range(20):
        for run, stream in zip(runs, streams, strict=True):
            run.enqueue(stream.cuda_stream)
    torch.cuda.synchronize()
    for run, some in zip(runs, inputs, strict=True):
        for want, have in zip(ON_GPU[name].expected(some), run.results(), strict=True):
            assert compare(want, have).rms_ratio < UNIT["bf16"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_enqueue_is_captured_in_a_cuda_graph(name: str) -> None:
    """It neither allocates nor synchronises, or the capture fails."""
    library, memory = Library(gpu_library()), GpuMemory()
    case = ON_GPU[name]
    inputs = case.tensors("bf16")
    run = lay_out(created(library, case).attach(), memory, [array_of(x) for x in inputs])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.enqueue(torch.cuda.current_stream().cuda_stream)
    graph.replay()
    torch.cuda.synchronize()
    for want, have in zip(case.expected(inputs), run.results(), strict=True):
        assert compare(want, have).rms_ratio < UNIT["bf16"]
