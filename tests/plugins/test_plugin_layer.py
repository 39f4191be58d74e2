"""What a table of trt/op.h can say, by an op that says it all: probe.cpp."""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import numpy as np
import pytest
from native import compiled
from plugin_host import DTYPES, computed, lay_out
from plugin_memory import CpuMemory

from llmexport.plugins.host import FIELD_INT64, Desc, Field, Library, Plugin, Refused, desc, field

FACTS = 10
ATTRIBUTES = {"top_k": 3, "offset": -7, "facts": FACTS}
B, T, C, E = 2, 5, 6, 8
INT32, UINT8 = np.dtype(np.int32), np.dtype(np.uint8)
EMULATED_DEVICE = [4, 99 * 1024]  # common/device.h


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(compiled("probe"))


@pytest.fixture
def plugin(library: Library) -> Plugin:
    return library.create("Probe", ATTRIBUTES)


def arrays(
    x: str = "fp16", weight: str = "bf16", inputs: int = 5, e: int = E, scales: str = "uint8"
) -> list[np.ndarray[Any, Any]]:
    types = {**DTYPES, "uint8": UINT8}
    shapes = [((B, T, C), types[x]), ((e, C), types[weight]), ((B,), INT32), ((B, e), types["fp32"])]
    shapes.append(((e,), types[scales]))
    return [np.full(shape, 7, dtype) for shape, dtype in shapes[:inputs]]


def io(inputs: list[np.ndarray[Any, Any]], y: str = "fp16") -> list[Desc]:
    outputs = [desc((B, T, ATTRIBUTES["top_k"]), DTYPES[y]), desc((FACTS,), INT32)]
    return [*(desc(x.shape, x.dtype) for x in inputs), *outputs]


@pytest.mark.parametrize(
    ("inputs", "scales", "there"),
    [(3, "uint8", [0, 0, 0]), (4, "uint8", [0, 1, 0]), (5, "uint8", [4, 1, 1]), (5, "fp32", [1, 1, 1])],
)
@pytest.mark.parametrize(
    ("x", "weight", "codes"), [("fp16", "bf16", [1, 3]), ("bf16", "uint8", [2, 4]), ("fp32", "fp32", [0, 1])]
)
def test_a_call_tells_types_inputs_attributes_and_device(
    plugin: Plugin, x: str, weight: str, codes: list[int], inputs: int, scales: str, there: list[int]
) -> None:
    y, facts = computed(plugin, CpuMemory(), arrays(x, weight, inputs, scales=scales))
    assert (y.shape, y.dtype) == ((B, T, 3), DTYPES[x])
    assert facts.tolist() == [*codes, *there, 3, -7, *EMULATED_DEVICE, 7]


def test_workspace_is_that_of_the_largest_sizes(plugin: Plugin) -> None:
    given = io(arrays())
    for d in given:
        d.dims.sizes[0] = -1
    most = io(arrays())
    most[0].dims.sizes[1] = 11
    # TensorRT bounds each tensor for itself: of two bounds of B the larger counts.
    most[2].dims.sizes[0] = B + 1
    assert plugin.workspace(given, most) == (B + 1) * 11 * 5 + len(arrays())


@pytest.mark.parametrize("known", [True, False])
def test_an_attribute_is_a_dimension(plugin: Plugin, known: bool) -> None:
    assert plugin.output_shapes([desc(x.shape, x.dtype) for x in arrays()], known) == [(B, T, 3), (FACTS,)]


@pytest.mark.parametrize("inputs", [2, 6])
def test_refuses_another_number_of_inputs(plugin: Plugin, capfd: pytest.CaptureFixture[str], inputs: int) -> None:
    descs = [desc(x.shape, x.dtype) for x in (*arrays(), arrays()[-1])][:inputs]
    with pytest.raises(Refused):
        plugin.output_shapes(descs, known=True)
    assert f"Probe has 3 to 5 inputs and 2 outputs, not {inputs} and 2" in capfd.readouterr().err


ALLOWED = ([0, 1, 7], [0, 1, 2, 7], [3], [0], [0, 2])


@pytest.mark.parametrize("inputs", [3, 4, 5])
def test_each_tensor_has_its_own_types(plugin: Plugin, inputs: int) -> None:
    """Of y only x's; a wrong type in front makes all that follow wrong."""
    descs = io(arrays(inputs=inputs))
    allowed = [*ALLOWED[:inputs], [1], [3]]
    right = [d.type for d in descs]
    for position, kind, layout in itertools.product(range(len(descs)), range(12), range(3)):
        for d, itself in zip(descs, right, strict=True):
            d.type, d.format = itself, 0
        descs[position].type, descs[position].format = kind, layout
        fits = kind in allowed[position]
        assert plugin.supports(position, descs) == (fits and layout == 0), (position, kind, layout)
        assert fits or not any(plugin.supports(p, descs) for p in range(position, len(descs)))


@pytest.mark.parametrize(
    ("position", "kind", "says"),
    [
        (0, 3, "x has type 3, not the one float type of such inputs: fp32 (0), fp16 (1) or bf16 (7)"),
        (1, 3, "weight has type 3, not the one type of its weights: fp32 (0), fp16 (1), bf16 (7) or int8 (2)"),
        (2, 8, "count has type 8, not int32 (3)"),
        (3, 1, "table has type 1, not fp32 (0)"),
        (4, 3, "scales has type 3, not the one type of its scales: fp32 (0) or int8 (2)"),
    ],
)
def test_refuses_a_type_by_its_tensor(
    plugin: Plugin, capfd: pytest.CaptureFixture[str], position: int, kind: int, says: str
) -> None:
    descs = io(arrays())
    types = [d.type for d in descs[:5]]
    assert plugin.output_types(types) == [1, 3]
    types[position] = descs[position].type = kind
    asks = (lambda: plugin.output_types(types), lambda: plugin.configure(descs), lambda: plugin.shape_change(descs))
    for ask in asks:
        with pytest.raises(Refused):
            ask()
        assert f"llmexport: Probe: {says}" in capfd.readouterr().err


def test_refuses_what_the_kernels_are_not_made_for(plugin: Plugin, capfd: pytest.CaptureFixture[str]) -> None:
    for descs, says in (
        (io(arrays("fp32", "uint8"), "fp32"), "fp32 and a uint8 weight"),
        (io(arrays(e=12)), "E is 12, no multiple of 8"),
    ):
        for ask in (plugin.configure, plugin.shape_change):
            with pytest.raises(Refused):
                ask(descs)
            assert f"llmexport: Probe: {says}" in capfd.readouterr().err


def test_refuses_sizes_by_an_attribute(library: Library, capfd: pytest.CaptureFixture[str]) -> None:
    plugin = library.create("Probe", {**ATTRIBUTES, "top_k": C + 1})
    with pytest.raises(Refused):
        plugin.output_shapes([desc(x.shape, x.dtype) for x in arrays()], known=True)
    assert f"llmexport: Probe: top_k is {C + 1}, but x has C = {C}" in capfd.readouterr().err
    plugin.output_shapes([desc(x.shape, x.dtype) for x in arrays()], known=False)


def test_an_output_is_held_against_the_attribute(plugin: Plugin, capfd: pytest.CaptureFixture[str]) -> None:
    descs = io(arrays())
    descs[5].dims.sizes[2] = 4
    with pytest.raises(Refused):
        plugin.shape_change(descs)
    assert "llmexport: Probe: dimension 2 of y is 4, but K is 3" in capfd.readouterr().err


def test_refuses_to_run_without_shapes(plugin: Plugin, capfd: pytest.CaptureFixture[str]) -> None:
    run = lay_out(plugin, CpuMemory(), arrays())
    descs = io(arrays(e=12))
    with pytest.raises(Refused):
        plugin.shape_change(descs)
    with pytest.raises(Refused):
        run.enqueue(None)
    assert "llmexport: Probe: enqueued without shapes" in capfd.readouterr().err


def long_field(name: str, value: int) -> Field:
    number = ctypes.c_int64(value)
    made = Field(name.encode(), ctypes.addressof(number), FIELD_INT64, 1)
    made.keep = number
    return made


def test_an_int_may_come_as_int64(library: Library) -> None:
    fields = [long_field("top_k", 3), long_field("offset", -(2**31)), field("facts", FACTS)]
    made = library.create_from("Probe", fields)
    assert made.attributes()["offset"] == (-(2**31)).to_bytes(4, "little", signed=True)
    assert made.recreate().attributes() == made.attributes()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (long_field("offset", 2**31), "offset is 2147483648, which is no int32"),
        (long_field("top_k", -1), "top_k is -1, which is no size"),
        (field("offset", 1.0), "offset has field type 1, an int is an int32"),
    ],
    ids=["too-large", "negative-size", "float"],
)
def test_refuses_an_int_by_its_value(
    library: Library, capfd: pytest.CaptureFixture[str], wrong: Field, says: str
) -> None:
    right = [field(n, v) for n, v in ATTRIBUTES.items() if n.encode() != wrong.name]
    with pytest.raises(Refused):
        library.create_from("Probe", [*right, wrong])
    assert f"llmexport: Probe: {says}" in capfd.readouterr().err
