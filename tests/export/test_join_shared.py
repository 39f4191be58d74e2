"""A shared expert becomes one more of the routed ones, where a plugin routes to it and its weights are theirs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from native import emulated_library
from onnx import TensorProto, numpy_helper
from onnx.helper import get_node_attr_value, make_attribute, make_node, make_tensor_value_info
from onnx.reference import ReferenceEvaluator
from reference_ops import operator

from llmexport.export import engine, engine_job, join_shared, manifest
from llmexport.plugins.shared_route import MOST_EXPERTS, SHARED_ROUTES, SLOTS, shared_ops
from llmexport.plugins.spec import all_ops
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import Tolerance

SERVED = frozenset({*all_ops(), *SHARED_ROUTES})
T, E, K, C, I = 5, 4, 2, 8, 6  # noqa: E741


EVALUATED = [
    operator(n, op)
    for n, op in {**all_ops(), **shared_ops()}.items()
    if n.endswith(("MoeRoute", "MoeExperts", "GatedAct"))
]


@dataclass(frozen=True)
class Layer:
    """A router, experts and an MLP of `width` beside them; `apart`: experts are stored one by one; `turned`: the MLP's
    weights as nn.Linear has them."""

    width: int = I
    gated: bool = False
    transposed: bool = False
    interleaved: bool = False
    scale_input: bool = False
    apart: bool = False
    experts: int = E
    activation: str = "silu"
    turned: bool = True

    def model(self) -> onnx.ModelProto:
        random = np.random.default_rng(0)
        constants: dict[str, np.ndarray] = {}
        nodes = []

        def weight(name: str, *shape: int) -> str:
            constants[name] = random.standard_normal(shape).astype(np.float32)
            return name

        def node(kind: str, inputs: list[str], name: str, domain: str = "", **said: Any) -> str:
            outputs = [name, f"{name}/chosen"] if kind == "MoeRoute" else [name]
            nodes.append(make_node(kind, inputs, outputs, f"layer/{name}", domain=domain, **said))
            return name

        def product(value: str, name: str, rows: int, columns: int) -> str:
            stored = weight(f"{name}/weight", rows, columns) if self.turned else weight(f"{name}/weight", columns, rows)
            return node(
                "MatMul",
                [value, node("Transpose", [stored], f"{name}/turned", perm=[1, 0]) if self.turned else stored],
                name,
            )

        how = {"activation": self.activation, "alpha": 1.7, "limit": 2.0}
        said = {**how, "format": "plain", "group": 0, "transposed": int(self.transposed)}
        said |= {"interleaved": int(self.interleaved), "scale_input": int(self.scale_input)}
        route = {"top_k": K, "scoring": "sigmoid", "renormalise": 0, "scale": 1.0, "groups": 1, "groups_kept": 1}
        node("MoeRoute", [product("x", "logits", self.experts, C)], "weights", "llmexport", **route, group_best=1)
        stacks = []
        for name, rows, columns in (("gate_up", 2 * I, C), ("down", C, I)):
            shape = (columns, rows) if self.transposed else (rows, columns)
            if self.apart:
                own = [weight(f"{name}/{e}", *shape) for e in range(self.experts)]
                constants[f"{name}/shape"] = np.array([self.experts, *shape])
                rows_of_all = node("Concat", own, f"{name}/rows", axis=0)
                stacks.append(node("Reshape", [rows_of_all, f"{name}/shape"], name))
            else:
                stacks.append(weight(name, self.experts, *shape))
        y = node("MoeExperts", ["x", "weights", "weights/chosen", *stacks], "y", "llmexport", **said)
        halves = [product("x", name, self.width, C) for name in ("gate", "up")]
        shared = product(node("GatedAct", halves, "act", "llmexport", **how), "shared", C, self.width)
        if self.gated:
            shared = node("Mul", [node("Sigmoid", [product("x", "g", 1, C)], "sigmoid"), shared], "mul")
        node("Add", [y, shared], "sum")
        row = make_tensor_value_info("x", TensorProto.FLOAT, [1, "T", C])
        out = make_tensor_value_info("sum", TensorProto.FLOAT, [1, "T", C])
        graph = onnx.helper.make_graph(nodes, "layer", [row], [out])
        graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in constants.items())
        columns = {"logits": self.experts, "weights": K, "weights/chosen": K, "g": 1}
        graph.value_info.extend(make_tensor_value_info(n, TensorProto.FLOAT, [1, "T", c]) for n, c in columns.items())
        opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("llmexport", 2)]
        return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)


def evaluated(model: onnx.ModelProto) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((1, T, C)).astype(np.float32)
    return ReferenceEvaluator(model, new_ops=EVALUATED).run(None, {"x": x})[0]


def joined(model: onnx.ModelProto, served: frozenset[str] = SERVED) -> Counter[str]:
    """Joins it and returns the ops that are left; each node stands behind what it reads, and no weight is unread."""
    left = join_shared.join_shared(model, {n.name: n.op_type for n in model.graph.node if n.domain}, served)
    assert left == {n.name: n.op_type for n in model.graph.node if n.domain}
    known = {t.name for t in model.graph.initializer} | {v.name for v in model.graph.input}
    read = {name for node in model.graph.node for name in node.input}
    assert {t.name for t in model.graph.initializer} <= read
    for node in model.graph.node:
        assert known.issuperset(node.input), node.name
        known.update(node.output)
    return Counter(left.values())


def is_same(found: np.ndarray, want: np.ndarray) -> bool:
    """Of sums in fp32 in another order."""
    return compare(want, found).excess(Tolerance(1e-6, 5e-7, scaled=True)) <= 1


LAYERS = {
    "one beside a stack": Layer(),
    "one beside experts that are stored apart": Layer(apart=True),
    "two": Layer(width=2 * I),
    "three beside experts that are stored apart": Layer(width=3 * I, apart=True),
    "gated": Layer(gated=True),
    "two that are gated": Layer(width=2 * I, gated=True, apart=True),
    "transposed": Layer(transposed=True, scale_input=True),
    "two that are transposed and stored apart": Layer(width=2 * I, transposed=True, apart=True),
    "interleaved": Layer(interleaved=True),
    "two that are interleaved and transposed": Layer(width=2 * I, interleaved=True, transposed=True),
    "two that are interleaved": Layer(width=2 * I, interleaved=True, apart=True),
    "another activation": Layer(activation="swiglu_clamped", width=2 * I),
}


@pytest.mark.parametrize("name", LAYERS)
def test_it_is_one_more_of_the_routed_ones(name: str) -> None:
    layer = LAYERS[name]
    model = layer.model()
    want = evaluated(model)
    route = "GatedSharedMoeRoute" if layer.gated else "SharedMoeRoute"
    assert joined(model) == {route: 1, "MoeExperts": 1}
    routed = next(n for n in model.graph.node if n.op_type == route)
    assert get_node_attr_value(routed, SLOTS) == K + layer.width // I
    assert is_same(evaluated(model), want)
    # Of what is left by itself there are the products of router and gate.
    assert [n.op_type for n in model.graph.node].count("MatMul") == 1 + layer.gated


def node_of(model: onnx.ModelProto, kind: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.op_type == kind)


def stored(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.name == name)


def swap(model: onnx.ModelProto) -> None:
    """Gate's rows for up's."""
    names = ["gate/weight", "up/weight"]
    for one in (n for n in model.graph.node if n.input[0] in names):
        one.input[0] = names[one.input[0] == names[0]]


def unweigh(model: onnx.ModelProto) -> None:
    route = model.graph.node[[n.op_type for n in model.graph.node].index("SharedMoeRoute")]
    next(a for a in route.attribute if a.name == SLOTS).i = K


@pytest.mark.parametrize("fault", [swap, unweigh], ids=["rows in another order", "no expert behind the chosen ones"])
def test_a_fault_is_seen(fault: Callable[[onnx.ModelProto], None]) -> None:
    """The comparison above would fail."""
    model = Layer(width=2 * I).model()
    want = evaluated(model)
    if fault is swap:
        fault(model)
    joined(model)
    if fault is unweigh:
        fault(model)
    assert not is_same(evaluated(model), want)


def reads_too(model: onnx.ModelProto, value: str) -> None:
    model.graph.node.append(make_node("Neg", [value], [f"{value}/read"], f"{value}/read"))
    model.graph.output.append(onnx.ValueInfoProto(name=f"{value}/read"))


def gives(model: onnx.ModelProto, value: str) -> None:
    model.graph.output.append(onnx.ValueInfoProto(name=value))


def biased(model: onnx.ModelProto) -> None:
    for name, rows in (("gate_up_bias", 2 * I), ("down_bias", C)):
        model.graph.initializer.append(numpy_helper.from_array(np.ones((E, rows), np.float32), name))
        node_of(model, "MoeExperts").input.append(name)


def halved(model: onnx.ModelProto) -> None:
    """GatedAct of the halves of one value."""
    node_of(model, "GatedAct").input.pop()
    gate = next(n for n in model.graph.node if n.name == "layer/gate/turned")
    both = np.concatenate([numpy_helper.to_array(stored(model, f"{n}/weight")) for n in ("gate", "up")])
    model.graph.initializer.append(numpy_helper.from_array(both, "both"))
    gate.input[0] = "both"


def other_type(model: onnx.ModelProto, *names: str) -> None:
    """A cast tensor of bfloat16 in place of one of float32, where a product reads it."""
    for name in names:
        tensor = stored(model, name)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16), name))
        reader = next(n for n in model.graph.node if name in n.input)
        place = [n.name for n in model.graph.node].index(reader.name)
        if reader.op_type == "Transpose":
            reader.input[0] = f"{name}/wide"
            model.graph.node.insert(
                place, make_node("Cast", [name], [f"{name}/wide"], f"{name}/wide", to=TensorProto.FLOAT)
            )


def told(model: onnx.ModelProto, kind: str, name: str, value: Any) -> None:
    node = node_of(model, kind)
    [place] = [i for i, a in enumerate(node.attribute) if a.name == name]
    node.attribute[place].CopyFrom(make_attribute(name, value))


def renamed(model: onnx.ModelProto, name: str, value: str, place: int = 0) -> None:
    """The node of this name reads another value."""
    next(n for n in model.graph.node if n.name == name).input[place] = value


def typed(model: onnx.ModelProto, name: str, shape: list[int | str], dtype: int = TensorProto.FLOAT) -> None:
    [place] = [i for i, v in enumerate(model.graph.value_info) if v.name == name]
    model.graph.value_info[place].CopyFrom(make_tensor_value_info(name, dtype, shape))


MLP = ("gate/weight", "up/weight", "shared/weight")
Change = Callable[[onnx.ModelProto], object]
REFUSED: dict[str, tuple[Layer, Change]] = {
    "1: an MLP of another value": (Layer(), lambda m: renamed(m, "layer/up", "sum0")),
    "1: experts that others read": (Layer(), lambda m: reads_too(m, "y")),
    "1: experts that are an output": (Layer(), lambda m: gives(m, "y")),
    "1: a shared result that others read": (Layer(), lambda m: reads_too(m, "shared")),
    "1: an activation that is an output": (Layer(), lambda m: gives(m, "act")),
    "1: a half that others read": (Layer(), lambda m: reads_too(m, "up")),
    "1: weights that others read": (Layer(), lambda m: reads_too(m, "weights")),
    "1: choices that are an output": (Layer(), lambda m: gives(m, "weights/chosen")),
    "1: a product with a gate that others read": (Layer(gated=True), lambda m: reads_too(m, "mul")),
    "1: halves of one product": (Layer(), halved),
    "1: another router": (Layer(), lambda m: renamed_router(m)),
    "2: another width": (Layer(width=I + 1), lambda m: None),
    "2: a narrower one": (Layer(width=I - 1), lambda m: None),
    "2: too many experts": (Layer(experts=MOST_EXPERTS), lambda m: None),
    "3: another activation": (Layer(), lambda m: told(m, "GatedAct", "activation", "gelu_erf")),
    "3: another limit": (Layer(), lambda m: told(m, "GatedAct", "limit", 3.0)),
    "3: biases": (Layer(), biased),
    "3: packed experts": (Layer(), lambda m: told(m, "MoeExperts", "format", "fp8")),
    "3: an MLP that is stored in another type": (
        Layer(),
        lambda m: other_type(m, "gate/weight", "up/weight", "shared/weight"),
    ),
    "3: a down projection of another type": (Layer(), lambda m: other_type(m, "shared/weight")),
    "3: weights that lie the other way round": (Layer(turned=False), lambda m: None),
    "4: a gate of several numbers": (Layer(gated=True), lambda m: typed(m, "g", [1, "T", 2])),
    "4: a gate of another type": (Layer(gated=True), lambda m: typed(m, "logits", [1, "T", E], TensorProto.BFLOAT16)),
    "4: a gate of unknown shape": (Layer(gated=True), lambda m: m.graph.value_info.pop()),
    "4: a gate where the input is scaled": (Layer(gated=True, scale_input=True), lambda m: None),
}


def renamed_router(model: onnx.ModelProto) -> None:
    node_of(model, "MoeRoute").domain = "another"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_routed_expert_stays(name: str) -> None:
    layer, change = REFUSED[name]
    model = layer.model()
    change(model)
    before = [n.SerializeToString() for n in model.graph.node]
    ops = {n.name: n.op_type for n in model.graph.node if n.domain == "llmexport"}
    assert join_shared.join_shared(model, ops, SERVED) == ops
    assert [n.SerializeToString() for n in model.graph.node] == before


def test_a_large_one_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """5."""
    taken = 3 * C * I * 4
    monkeypatch.setattr(join_shared, "LARGEST", taken - 1)
    assert "SharedMoeRoute" not in joined(Layer().model())
    monkeypatch.setattr(join_shared, "LARGEST", taken)
    assert "SharedMoeRoute" in joined(Layer().model())


@pytest.mark.parametrize(("gated", "plugin"), [(False, "SharedMoeRoute"), (True, "GatedSharedMoeRoute")])
def test_a_library_without_the_plugin_leaves_it(gated: bool, plugin: str) -> None:
    assert joined(Layer(gated=gated).model(), SERVED - {plugin}) == {"MoeRoute": 1, "MoeExperts": 1, "GatedAct": 1}


def test_weights_that_are_cast_are_stacked_as_they_are_stored() -> None:
    model = Layer(width=2 * I).model()
    other_type(model, *MLP, "gate_up", "down")
    assert joined(model) == {"SharedMoeRoute": 1, "MoeExperts": 1}
    assert not [n for n in model.graph.node if n.op_type == "Cast"]


def test_a_router_of_another_type_is_cast_behind_its_choice() -> None:
    model = Layer().model()
    experts = node_of(model, "MoeExperts")
    experts.input[1] = "weights/cast"
    cast = make_node("Cast", ["weights"], ["weights/cast"], "weights/cast", to=TensorProto.FLOAT)
    model.graph.node.insert([n.op_type for n in model.graph.node].index("MoeExperts"), cast)
    want = evaluated(model)
    assert joined(model) == {"SharedMoeRoute": 1, "MoeExperts": 1}
    assert is_same(evaluated(model), want)
    made = {name for n in model.graph.node for name in n.output}
    assert {"weights/slots", "weights/chosen/slots", "weights/cast/slots"} <= made
    # What has other sizes than before has other names.
    assert not {"weights", "weights/chosen", "weights/cast"} & made


@pytest.mark.engine
@pytest.mark.parametrize(
    ("arch", "normed", "route", "slots"),
    [
        ("llama4", "Normed", "SharedMoeRoute", 2),
        ("qwen3_5_moe", "Normed", "GatedSharedMoeRoute", 3),
        ("glm4_moe", "", "SharedMoeRoute", 4),
        ("deepseek_v2", "", "SharedMoeRoute", 4),
    ],
)
def test_shared_experts_of_models_are_routed_to(arch: str, normed: str, route: str, slots: int, exported) -> None:
    """By what norms too, but for routers in fp32 whose weights are stored so."""
    export, library = manifest.read(exported(arch, "bfloat16")), emulated_library()
    served = engine.library.served(library)
    jobs = [
        engine_job.prepare(export, export.graphs[0], "tensorrt_rtx", library, served, w) for w in ("inside", "beside")
    ]
    inside, beside = (Counter(job.nodes.values()) for job in jobs)
    route, alone = f"{normed}{route}", f"{normed}MoeRoute"
    assert inside[route] == beside[alone] > 0
    assert sum(n for op, n in (inside + beside).items() if op.endswith("MoeRoute")) == 2 * inside[route]
    assert beside["GatedAct"] - inside["GatedAct"] == inside[route]
    assert inside["NormedMoeExperts"] == inside[route]
    said = {get_node_attr_value(n, SLOTS) for n in jobs[0].model.graph.node if n.op_type.endswith(route)}
    assert said == {slots}
    routed = next(n for n, op in jobs[0].nodes.items() if op == route)
    assert jobs[0].launches[routed] == 1
