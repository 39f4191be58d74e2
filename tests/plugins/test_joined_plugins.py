"""Plugins whose inputs are columns of one tensor, through their life, against the op's torch reference."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from plugin_cases import CASES, Case, array_of, served
from plugin_host import DTYPES, Machine, computed, lay_out

from llmexport.plugins.host import Desc, Library, Plugin, Refused, desc, number
from llmexport.plugins.joined import BIASABLE, BIASED, COLUMNS, JOINED, Part, columns_of, parts_of
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import Tolerance

UNIT = {"fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7}
JOINABLE = {n: c for n, c in CASES.items() if c.spec.joins and {*c.spec.joins} <= {*c.inputs}}
# Columns before the first input that joins, between two of them, and behind the last: whole vectors, and not.
GAPS = {"vectors": 8, "odd": 3, "tight": 0}


@pytest.fixture(params=JOINABLE)
def case(request: pytest.FixtureRequest) -> Case:
    return JOINABLE[request.param]


@pytest.fixture
def library(machine: Machine) -> Library:
    return machine.library


def parts(case: Case, gap: int) -> list[Part]:
    """The last input that joins has the first columns."""
    found, first = [], gap
    for name in reversed(case.spec.joins):
        found.append(Part(name, first, tuple(case.sizes[d] for d in case.spec.inputs[name][2:])))
        first = found[-1].end + gap
    return found[::-1]


def created(library: Library, case: Case, gap: int) -> Plugin:
    return library.create(f"{JOINED}{case.op}", {**case.attributes, COLUMNS: columns_of(parts(case, gap))})


def joined(case: Case, gap: int, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The plugin's inputs; what no part has is NaN."""
    its = parts(case, gap)
    given = dict(zip(case.inputs, inputs, strict=True))
    first = given[case.spec.joins[0]]
    columns = torch.full((*first.shape[:2], its[0].end + gap), torch.nan, dtype=first.dtype)
    for part in its:
        columns[..., part.first : part.end] = given[part.name].flatten(2)
    return [columns, *(x for n, x in given.items() if n not in case.spec.joins)]


def descs(case: Case, gap: int, dtype: str) -> list[Desc]:
    return [desc(x.shape, array_of(x).dtype) for x in joined(case, gap, case.tensors(dtype))]


def check(case: Case, dtype: str, inputs: list[torch.Tensor], found: list[np.ndarray]) -> None:
    for name, want, have in zip(case.spec.outputs, case.expected(inputs), found, strict=True):
        assert want.dtype == have.dtype
        units = case.units[want.dtype.itemsize == 2] * UNIT[dtype if want.dtype.itemsize == 2 else "fp32"]
        assert compare(want, have).excess(Tolerance(units, units, scaled=True)) <= 1
        assert name not in case.exact or (have == want).all()


def test_every_op_that_joins_has_a_case() -> None:
    assert {c.op for c in JOINABLE.values()} == {c.op for c in CASES.values() if c.spec.joins} <= served()


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_the_references(machine: Machine, case: Case, dtype: str, gap: str) -> None:
    plugin = created(machine.library, case, GAPS[gap]).recreate().attach()
    inputs = case.tensors(dtype)
    found = computed(plugin, machine.memory(), [array_of(x) for x in joined(case, GAPS[gap], inputs)])
    check(case, dtype, inputs, found)


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [n for n, c in JOINABLE.items() if c.op in BIASABLE])
def test_a_bias_is_added_as_it_reads(machine: Machine, name: str, dtype: str, gap: str) -> None:
    """Bit for bit the plugin of a tensor to which it was added, and rounded, before."""
    case = JOINABLE[name]
    x, *rest = joined(case, GAPS[gap], case.tensors(dtype))
    bias = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(5)).to(x.dtype)
    said = {**case.attributes, COLUMNS: columns_of(parts(case, GAPS[gap]))}
    plugin = machine.library.create(f"{BIASED}{JOINED}{case.op}", said).recreate().attach()
    found = computed(plugin, machine.memory(), [array_of(t) for t in (x, bias, *rest)])
    want = computed(
        created(machine.library, case, GAPS[gap]), machine.memory(), [array_of(t) for t in (x + bias, *rest)]
    )
    assert [a.tobytes() for a in found] == [a.tobytes() for a in want]
    rest_names = [n for n in case.inputs if n not in case.spec.joins]
    aliased = [2 + rest_names.index(case.spec.aliases[n]) if n in case.spec.aliases else -1 for n in case.spec.outputs]
    assert [plugin.aliased(i) for i in range(plugin.outputs)] == aliased


def test_a_bias_of_another_size_is_refused(library: Library, capfd: pytest.CaptureFixture[str]) -> None:
    case = next(c for c in JOINABLE.values() if c.op in BIASABLE)
    x, *rest = descs(case, 3, "fp16")
    said = {**case.attributes, COLUMNS: columns_of(parts(case, 3))}
    plugin = library.create(f"{BIASED}{JOINED}{case.op}", said)
    for shape, says in (((x.shape[-1] - 1,), "dimension 0 of bias is"), ((1, x.shape[-1]), "bias has 2 dimensions")):
        with pytest.raises(Refused):
            plugin.output_shapes([x, desc(shape, DTYPES["fp16"]), *rest], True)
        assert f"llmexport: {case.op}: {says}" in capfd.readouterr().err


def test_numbers_are_right_in_a_profile_of_larger_shapes(machine: Machine, case: Case) -> None:
    plugin, larger = (
        created(machine.library, case, 8).attach(),
        {"B": case.sizes["B"] + 1, "T": 2 * case.sizes["T"] + 3},
    )
    most = descs(replace(case, sizes={**case.sizes, **larger}), 8, "bf16")
    inputs = case.tensors("bf16")
    memory = machine.memory()
    run = lay_out(
        plugin, memory, [array_of(x) for x in joined(case, 8, inputs)], most=[*most, *plugin.output_descs(most)]
    )
    run.enqueue(memory.stream)
    check(case, "bf16", inputs, run.results())


@pytest.mark.parametrize("known", [True, False])
def test_shapes_and_types_are_the_references(library: Library, case: Case, known: bool) -> None:
    plugin, inputs, want = created(library, case, 3), descs(case, 3, "fp16"), case.expected(case.tensors("fp16"))
    assert plugin.output_shapes(inputs, known) == [y.shape for y in want]
    assert plugin.output_types([d.type for d in inputs]) == [number(y.dtype) for y in want]


def test_batch_and_tokens_may_be_unknown(library: Library, case: Case) -> None:
    """As in an engine; what enqueue may then use is the same bytes as with known ones."""
    plugin, known = created(library, case, 3), descs(case, 3, "fp16")
    io = descs(case, 3, "fp16")
    names = [("B", "T", ""), *(case.spec.inputs[n] for n in case.inputs if n not in case.spec.joins)]
    for d, letters in zip(io, names, strict=True):
        for i, letter in enumerate(letters):
            if letter and letter in "BT":
                d.dims.sizes[i] = -1
    outputs = plugin.output_descs(known)
    plugin.configure([*io, *outputs], [*known, *outputs])
    assert plugin.workspace([*io, *outputs], [*known, *outputs]) == plugin.workspace(
        [*known, *outputs], [*known, *outputs]
    )


def test_columns_survive_serialisation(library: Library, case: Case) -> None:
    columns = columns_of(parts(case, 3))
    again = created(library, case, 3).clone().recreate().attributes()
    assert again.keys() == {*case.attributes, COLUMNS}
    assert again[COLUMNS] == struct.pack(f"{len(columns)}i", *columns)
    assert columns_of(parts_of(case.spec.inputs, case.spec.joins, columns)) == columns


def test_outputs_have_the_memory_of_the_same_inputs(library: Library, case: Case) -> None:
    plugin, rest = created(library, case, 0), [n for n in case.inputs if n not in case.spec.joins]
    said = [1 + rest.index(case.spec.aliases[n]) if n in case.spec.aliases else -1 for n in case.spec.outputs]
    assert [plugin.aliased(i) for i in range(plugin.outputs)] == said


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (None, "JoinedGatedAct: attribute columns is missing"),
        ([0, 37, 37], "JoinedGatedAct: columns has 3 numbers, not 4"),
        ([], "JoinedGatedAct: columns has 0 numbers, not 4"),
        ([0, 37, -37, 37], "JoinedGatedAct: columns says no columns of up"),
        ([0, -1, 37, 37], "JoinedGatedAct: columns says no columns of gate"),
        ([-1, 37, 37, 37], "JoinedGatedAct: columns says no columns of gate"),
        (0.5, "GatedAct: columns has field type 1, not int32"),
    ],
)
def test_columns_that_are_none_are_refused(
    library: Library, capfd: pytest.CaptureFixture[str], columns: list[int] | None, says: str
) -> None:
    given = {} if columns is None else {COLUMNS: columns}
    with pytest.raises(Refused):
        library.create("JoinedGatedAct", {**CASES["GatedAct"].attributes, **given})
    assert f"llmexport: {says}" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((2, 3, 73), "JoinedGatedAct: up is the 37 columns from 37 on, of 73"),
        ((2, 3, 2, 37), "JoinedGatedAct: its first input has 4 dimensions, not 3"),
        ((2, 74), "JoinedGatedAct: its first input has 2 dimensions, not 3"),
    ],
)
def test_a_tensor_without_these_columns_is_refused(
    library: Library, capfd: pytest.CaptureFixture[str], shape: tuple[int, ...], says: str
) -> None:
    plugin = library.create("JoinedGatedAct", {**CASES["GatedAct"].attributes, COLUMNS: [0, 37, 37, 37]})
    io = [desc(shape, DTYPES["fp16"]), desc((2, 3, 37), DTYPES["fp16"])]
    for ask in (
        lambda: plugin.output_shapes(io[:1], True),
        lambda: plugin.configure(io),
        lambda: plugin.shape_change(io),
    ):
        with pytest.raises(Refused):
            ask()
        assert f"llmexport: {says}" in capfd.readouterr().err


def test_another_number_of_inputs_is_refused(library: Library, capfd: pytest.CaptureFixture[str]) -> None:
    plugin = library.create("JoinedGatedAct", {**CASES["GatedAct"].attributes, COLUMNS: [0, 37, 37, 37]})
    io = [desc((2, 3, 74), DTYPES["fp16"])] * 2 + [desc((2, 3, 37), DTYPES["fp16"])]
    with pytest.raises(Refused):
        plugin.shape_change(io)
    assert "llmexport: JoinedGatedAct has 1 inputs and 1 outputs, not 2 and 1" in capfd.readouterr().err


@pytest.mark.parametrize("columns", [[0, 37], [0, 37, 37], [0, 37, -1, 37], [0, 37, 37, 37, 0]])
def test_columns_of_another_op_are_no_parts(columns: list[int]) -> None:
    spec = CASES["GatedAct"].spec
    with pytest.raises(ValueError, match="are no columns of gate, up"):
        parts_of(spec.inputs, spec.joins, columns)
