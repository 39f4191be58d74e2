"""The tables of plugin.cpp, as the library says them, word by word against @op."""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace

import pytest
from native import PLUGINS, emulated_library
from plugin_cases import OPS, plugins, served
from torch import Tensor

from llmexport.plugins import library, spec
from llmexport.plugins.joined import BIASABLE, BIASED, JOINED
from llmexport.plugins.normed import ADDENDS, EXPERTS, GATE_COLUMN, NORM, OWN, inputs_of
from llmexport.plugins.normed_route import normed_routes
from llmexport.plugins.shared_route import MOST_EXPERTS, declared_routes, shared_ops
from llmexport.plugins.spec import Op, op

KINDS = {bool: "bool", int: "int", float: "float"}


@pytest.fixture
def scratch_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops that a test defines are gone after it."""
    monkeypatch.setattr(spec, "OPS", dict(spec.OPS))


def table(op: Op, prefix: str = "") -> str:
    """What llmexportOps() of trt/library.cpp should say of it, and of its joined plugin with that prefix."""

    def tensors(dims: dict[str, tuple[str, ...]]) -> str:
        said = dict.fromkeys(op.optional, "?") | {n: f" in {past}" for n, past in op.aliases.items()}
        said |= {n: f"{said.get(n, '')} joins" for n in op.joins}
        return ", ".join(f"{n}: {op.types[n]}[{''.join(d)}]{said.get(n, '')}" for n, d in dims.items())

    def kind(attribute: str) -> str:
        if attribute in op.choices:
            return "|".join(op.choices[attribute])
        return " ".join([KINDS[op.attributes[attribute]], *op.sizes.get(attribute, "")])

    attributes = ", ".join(f"{n}: {kind(n)}" for n in op.attributes)
    return f"{prefix}{op.name} {op.version}({tensors(op.inputs)}; {attributes}) -> {tensors(op.outputs)}"


def normed_op(name: str) -> Op:
    """What an op would say that computed what a plugin of plugins/normed.py does."""
    experts, norm = OPS[EXPERTS], OPS[NORM]
    between = {"residual": norm.inputs["residual"], "norm_weight": norm.inputs["weight"]}
    between |= {"shared": norm.inputs["residual"], "shared_gate": ("B", "T", "L")}
    inputs = {n: (experts.inputs | between)[n] for n in inputs_of(name, [*experts.inputs])}
    attributes = experts.attributes | norm.attributes | ({GATE_COLUMN: int} if "shared_gate" in inputs else {})
    types = dict.fromkeys((*inputs, *norm.outputs), "T") | {n: t for n, t in experts.types.items() if n in inputs}
    return replace(experts, name=name, inputs=inputs, outputs=norm.outputs, types=types, attributes=attributes)


def test_all_inputs_ahead_of_others_are_those_that_no_node_leaves_out() -> None:
    assert {*[*OPS[EXPERTS].inputs][OWN:]} == {*OPS[EXPERTS].optional}


def test_tables_say_what_the_references_say() -> None:
    """Names, dimensions and types of inputs and outputs, which are optional, which join, which may have the memory of
    which, attributes, their kinds and choices."""
    ops = ctypes.CDLL(str(emulated_library())).llmexportOps
    ops.restype = ctypes.c_char_p
    joined = [table(OPS[name], JOINED) for name in served() if OPS[name].joins]
    joined += [table(OPS[name], f"{BIASED}{JOINED}") for name in BIASABLE]
    routes = [table(op, prefix) for op in shared_ops().values() for prefix in ("", JOINED)]
    normed = [table(normed_op(name)) for name in ADDENDS]
    normed += [table(op) for op in normed_routes().values()]
    own = [table(OPS[name]) for name in served()]
    assert sorted(ops().decode().splitlines()) == sorted([*joined, *routes, *normed, *own])


def test_what_routes_to_shared_experts_is_declared_as_it_is() -> None:
    ops = shared_ops()
    assert [r.name for r in declared_routes()] == [*ops]
    for route in declared_routes():
        op = ops[route.name]
        assert (route.version, route.inputs, route.outputs, route.joins) == (1, op.inputs, op.outputs, op.joins)
        assert route.attributes == {n: kind.__name__ for n, kind in op.attributes.items()}


def test_no_more_experts_are_stacked_than_kernels_sort() -> None:
    header = (PLUGINS / "moe_experts" / "moe_experts.h").read_text()
    assert f"constexpr int kMoeMaxExperts = {MOST_EXPERTS};" in header


def test_no_plugin_counts_its_tensors_and_attributes_by_bare_numbers() -> None:
    bare = re.compile(r"\b(?:in|out)put(?:<\w+>)?\(\d|\b(?:inputs|outputs|attributes|values)\[\d")
    sources = {name: (PLUGINS / OPS[name].torch_name / "plugin.cpp").read_text() for name in served()}
    assert {name: found for name, text in sources.items() if (found := bare.findall(text))} == {}


def test_the_library_serves_the_ops_of_its_tables() -> None:
    assert library.served(emulated_library()) == plugins()


def test_an_int_may_be_the_size_of_a_dimension(scratch_ops: None) -> None:
    def table_sized(x: Tensor, count: int, mode: str) -> Tensor: ...

    choices = {"mode": ("one", "other")}
    made = op("TableSized", 1, {"x": "B", "count": "K"}, {"y": "B K"}, choices=choices)(table_sized)
    assert table(made) == "TableSized 1(x: T[B]; count: int K, mode: one|other) -> y: T[BK]"


@pytest.mark.parametrize(
    ("dims", "output", "choices", "says"),
    [
        ({"x": "B"}, "B", {}, "choices .*: mode"),
        ({"x": "B"}, "B", {"mode": ("one",), "scale": ("one",)}, "choices .*: scale"),
        ({"x": "B", "scale": "K"}, "B", {"mode": ("one",)}, "dims names .*: scale"),
        ({"x": "B", "z": "K"}, "B", {"mode": ("one",)}, "dims names .*: z"),
        ({"x": "B"}, "B K", {"mode": ("one",)}, "dimension of an output: K"),
    ],
)
def test_an_op_that_would_have_no_table_is_refused(
    scratch_ops: None, dims: dict[str, str], output: str, choices: dict[str, tuple[str, ...]], says: str
) -> None:
    def table_bad(x: Tensor, mode: str, scale: float) -> Tensor: ...

    with pytest.raises(TypeError, match=f"TableBad: .*{says}"):
        op("TableBad", 1, dims, {"y": output}, choices=choices)(table_bad)


@pytest.mark.parametrize(
    ("aliases", "says"),
    [
        ({"x": "past"}, "aliases names no output, .*: x"),
        ({"y": "bias"}, "aliases names no output, .*: y"),
        ({"y": "none"}, "aliases names no output, .*: y"),
        ({"at": "past"}, "aliases names no output, .*: at"),
        ({"y": "rest"}, "an input that may be left out is no output's memory: rest"),
    ],
)
def test_an_output_has_the_memory_of_no_input_of_another_form(
    scratch_ops: None, aliases: dict[str, str], says: str
) -> None:
    def table_alias(x: Tensor, past: Tensor, bias: Tensor, rest: Tensor | None) -> tuple[Tensor, Tensor]: ...

    dims = {"x": "B", "past": "B D", "bias": "D", "rest": "B D"}
    with pytest.raises(TypeError, match=f"TableAlias: {says}"):
        op("TableAlias", 1, dims, {"y": "B D", "at": "B D"}, types={"at": "int32"}, aliases=aliases)(table_alias)


@pytest.mark.parametrize("joins", [("past",), ("counts",), ("rows", "none")])
def test_only_rows_of_floats_join(scratch_ops: None, joins: tuple[str, ...]) -> None:
    def table_rows(rows: Tensor, past: Tensor, counts: Tensor) -> Tensor: ...

    dims = {"rows": "B T C", "past": "B S C", "counts": "B T C"}
    says = f"TableRows: joins names no input of type T with B and T before all else: {joins[-1]}"
    with pytest.raises(TypeError, match=says):
        op("TableRows", 1, dims, {"y": "B T C"}, types={"counts": "int32"}, joins=joins)(table_rows)
