"""A norm, a router's product with what it norms and what routes by that become one node, where a plugin computes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  teaches np.dtype "bfloat16"
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.helper import make_attribute, make_node, make_tensor_value_info
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from plugin_cases import array_of
from reference_ops import operator, tensor_of

from llmexport.export.join_route import join_routes
from llmexport.plugins.dtypes import BY_NAME
from llmexport.plugins.normed_route import NORMED_ROUTES, normed_routes
from llmexport.plugins.shared_route import SHARED_ROUTES, shared_ops
from llmexport.plugins.spec import all_ops

SERVED = frozenset({*all_ops(), *SHARED_ROUTES, *NORMED_ROUTES})
T, E, K, C = 33, 6, 2, 8
Change = Callable[[onnx.ModelProto], object]
NOWHERE = Path("/nowhere")  # the folder of graphs whose constants lie in them


class MatMul(OpRun):
    """By a matrix that lies as the plugins' references have it, so that every bit is theirs; and with a bias."""

    op_domain = ""

    def _run(self, a: np.ndarray, b: np.ndarray, *bias: np.ndarray) -> tuple[np.ndarray]:
        given = map(tensor_of, (a, np.ascontiguousarray(b.T), *bias))
        return (array_of(torch.nn.functional.linear(*given)),)


OPS = {n: all_ops()[n] for n in ("AddRmsNorm", "MoeRoute")} | shared_ops() | normed_routes()
EVALUATED = [MatMul, *(operator(n, op) for n, op in OPS.items())]


@dataclass(frozen=True)
class Layer:
    """A norm and a router, with `name/` before all their values.

    dtype: of y. wide: the product is in fp32. stored: the type of the matrices, if it is not y's. cast_first: they are
    cast as they lie. router_bias, bias: the types that these are stored in, or none.
    """

    dtype: str = "float32"
    wide: bool = False
    route: str = "MoeRoute"
    router_bias: str = ""
    bias: str = ""
    stored: str = ""
    cast_first: bool = True
    name: str = "layer"
    x: str = "x"

    def graph(self) -> onnx.GraphProto:
        """Of x and r; all that norm and route make are outputs."""
        at = f"{self.name}/".__add__
        random = np.random.default_rng(len(self.name))
        own, read_in = BY_NAME[self.dtype].onnx, BY_NAME["float32" if self.wide else self.dtype].onnx
        graph = onnx.GraphProto(name=self.name)

        def constant(name: str, dtype: str, *shape: int) -> str:
            values = (random.standard_normal(shape) / 3).astype(np.float32).astype(np.dtype(dtype))
            graph.initializer.append(numpy_helper.from_array(values, at(name)))
            return at(name)

        def node(kind: str, inputs: list[str], *outputs: str, domain: str = "", **said: Any) -> str:
            graph.node.append(make_node(kind, inputs, [*map(at, outputs)], at(outputs[0]), domain=domain, **said))
            return at(outputs[0])

        def cast(value: str, held: int, to: int) -> str:
            return value if held == to else node("Cast", [value], f"{value.removeprefix(at(''))}/cast", to=to)

        def product(name: str, rows: int) -> str:
            held = self.stored or self.dtype
            weight, kind = constant(f"{name}/weight", held, rows, C), BY_NAME[held].onnx
            if self.cast_first:
                weight = cast(weight, kind, read_in)
            weight = node("Transpose", [weight], f"{name}/turned", perm=[1, 0])
            return node("MatMul", [read, weight if self.cast_first else cast(weight, kind, read_in)], name)

        norm = {"epsilon": 1e-3, "weight_offset": 1.0, "round_before_weight": 1}
        node("AddRmsNorm", [self.x, "r", constant("k", self.dtype, C)], "y", "sum", domain="llmexport", **norm)
        read = cast(at("y"), own, read_in)
        logits = product("logits", E)
        if self.router_bias:
            held = BY_NAME[self.router_bias].onnx
            logits = node("Add", [logits, cast(constant("rb", self.router_bias, E), held, read_in)], "biased")
        gates = [product("gate", 1)] if self.route.startswith("Gated") else []
        biases = [cast(constant("b", self.bias, E), BY_NAME[self.bias].onnx, read_in)] if self.bias else []
        said = {"top_k": K, "scoring": "sigmoid", "renormalise": 1, "scale": 1.5, "groups": 2, "groups_kept": 1}
        said |= {"group_best": 2, **({"slots": K + 1} if self.route in SHARED_ROUTES else {})}
        weights = node(self.route, [logits, *gates, *biases], "w", "e", domain="llmexport", **said)
        weights = cast(weights, read_in, own)
        values = {at("y"): (own, C), at("sum"): (own, C), weights: (own, "K"), at("e"): (TensorProto.INT32, "K")}
        graph.output.extend(make_tensor_value_info(n, kind, [1, "T", size]) for n, (kind, size) in values.items())
        if self.wide:
            graph.value_info.append(make_tensor_value_info(at("w"), TensorProto.FLOAT, [1, "T", "K"]))
        return graph

    def model(self) -> onnx.ModelProto:
        return model_of(self)


def model_of(*layers: Layer) -> onnx.ModelProto:
    whole = onnx.GraphProto(name="layers")
    for graph in (layer.graph() for layer in layers):
        for field in ("node", "initializer", "value_info", "output"):
            getattr(whole, field).extend(getattr(graph, field))
    own = BY_NAME[layers[0].dtype].onnx
    whole.input.extend(make_tensor_value_info(n, own, [1, "T", C]) for n in ("x", "r"))
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("llmexport", 2)]
    return onnx.helper.make_model(whole, opset_imports=opsets, ir_version=10)


def evaluated(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """As plugins compute it: a product is rounded with the bias that is added to it."""
    whole = onnx.ModelProto.FromString(model.SerializeToString())
    products = {n.output[0]: n for n in whole.graph.node if n.op_type == "MatMul"}
    for add in (n for n in whole.graph.node if n.op_type == "Add"):
        [value] = products.keys() & {*add.input}
        bias = add.input[add.input[0] == value]
        add.op_type, add.input[:] = "MatMul", [*products[value].input, bias]
    random = np.random.default_rng(1)
    kinds = {v.name: onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in model.graph.input}
    feed = {n: random.standard_normal((1, T, C)).astype(np.float32).astype(kind) for n, kind in kinds.items()}
    made = ReferenceEvaluator(whole, new_ops=EVALUATED).run(None, feed)
    return {o.name: a for o, a in zip(model.graph.output, made, strict=True)}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """Bit for bit."""
    return all(a.dtype == other[n].dtype and a.tobytes() == other[n].tobytes() for n, a in one.items())


def joined(model: onnx.ModelProto, served: frozenset[str] = SERVED, folder: Path = NOWHERE) -> Counter[str]:
    """Joins it and returns the operators that are left; each node stands behind what it reads, no weight is unread, and
    values have the types that are said of them."""
    ours = {n.name: n.op_type for n in model.graph.node if n.domain}
    left = join_routes(model, ours, served, folder)
    assert left == {n.name: n.op_type for n in model.graph.node if n.domain}
    graph = model.graph
    known = {t.name for t in graph.initializer} | {v.name for v in graph.input}
    assert {t.name for t in graph.initializer} <= {name for node in graph.node for name in node.input}
    for node in graph.node:
        assert known.issuperset(node.input), node.name
        known.update(node.output)
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    kinds |= {t.name: t.data_type for t in graph.initializer}
    kinds |= {n.output[0]: n.attribute[0].i for n in graph.node if n.op_type == "Cast"}
    for node in (n for n in graph.node if n.op_type in NORMED_ROUTES):
        op, own = OPS[node.op_type], {"T": kinds[node.input[0]]}
        wanted = {n: own.get(kind) or BY_NAME[kind].onnx for n, kind in op.types.items()}
        for name, value in (*zip(op.inputs, node.input, strict=False), *zip(op.outputs, node.output, strict=True)):
            assert kinds[value] == wanted[name], name
    return Counter(n.op_type for n in graph.node)


def node_of(model: onnx.ModelProto, kind: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.op_type == kind)


def held(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.name == name)


def wide(dtype: str, **said: Any) -> Layer:
    return Layer(dtype, wide=True, **said)


GATED, SHARED = {"route": "GatedSharedMoeRoute"}, {"route": "SharedMoeRoute"}
LAYERS = {
    "in fp32": Layer(),
    "in fp16, with a bias": Layer("float16", router_bias="float16"),
    "in bf16, with a bias of the choice": Layer("bfloat16", bias="bfloat16"),
    "in bf16, with both": Layer("bfloat16", router_bias="bfloat16", bias="bfloat16"),
    "with a shared expert": Layer("float16", **SHARED),
    "with a gate, in fp32": Layer(**GATED),
    "with a gate and all biases": Layer("bfloat16", router_bias="bfloat16", bias="bfloat16", **GATED),
    "of weights and biases in fp32 that are cast": Layer(
        "bfloat16", stored="float32", router_bias="float32", bias="float32", **GATED
    ),
    "of weights in 16 bits that are cast to fp32": Layer(stored="bfloat16", router_bias="bfloat16", bias="float16"),
    "wide, in fp16": wide("float16"),
    "wide, with both biases, that of the choice in fp32": wide("bfloat16", router_bias="bfloat16", bias="float32"),
    "wide, with a bias of the choice that is cast": wide("bfloat16", bias="float16", **SHARED),
    "wide, of a matrix that is turned and then cast": wide("float16", cast_first=False, bias="float32", **SHARED),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_norm_a_product_and_what_routes_become_one(name: str) -> None:
    layer = LAYERS[name]
    model = layer.model()
    want = evaluated(model)
    found = joined(model)
    assert found.pop(f"Normed{layer.route}") == 1
    # Of nodes that make weights there may be their casts.
    assert found == ({"Cast": 2 if layer.route in GATED.values() else 1} if layer.stored else {})
    [node] = [n for n in model.graph.node if n.domain]
    assert (node.name, node.domain) == ("layer/w", "llmexport")
    assert [*node.output] == ["layer/y", "layer/sum", "layer/w/cast" if layer.wide else "layer/w", "layer/e"]
    assert same(want, evaluated(model))


def told(model: onnx.ModelProto, name: str, value: float) -> None:
    [node] = [n for n in model.graph.node if n.op_type in NORMED_ROUTES]
    [place] = [i for i, a in enumerate(node.attribute) if a.name == name]
    node.attribute[place].CopyFrom(make_attribute(name, value))


def turned_over(model: onnx.ModelProto, name: str) -> None:
    """Its last entry first."""
    stored = held(model, name)
    stored.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(stored)[::-1]), name))


BOTH = wide("bfloat16", router_bias="bfloat16", bias="float32")
FAULTS: dict[str, tuple[Layer, Change]] = {
    "weight_offset": (BOTH, lambda m: told(m, "weight_offset", 0.0)),
    "wide": (wide("bfloat16"), lambda m: told(m, "wide", 0)),
    "scale": (BOTH, lambda m: told(m, "scale", 1.0)),
    "rows of the router": (BOTH, lambda m: turned_over(m, "layer/logits/weight")),
    "the router's bias": (BOTH, lambda m: turned_over(m, "layer/rb")),
    "the bias of the choice": (BOTH, lambda m: turned_over(m, "layer/b")),
    "the gate": (Layer(**GATED), lambda m: rewired(m, "layer/w", 5, "zeros1")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_seen(name: str) -> None:
    """The comparison above would fail."""
    layer, fault = FAULTS[name]
    model = layer.model()
    want = evaluated(model)
    joined(model)
    fault(model)
    assert not same(want, evaluated(model))


@pytest.mark.parametrize("layer", [LAYERS["in fp16, with a bias"], BOTH], ids=["narrow", "wide"])
def test_the_two_that_are_added_may_be_either_way_round(layer: Layer) -> None:
    model = layer.model()
    want = evaluated(model)
    add = node_of(model, "Add")
    add.input[:] = [*add.input][::-1]
    assert joined(model) == {"NormedMoeRoute": 1}
    assert same(want, evaluated(model))


def in_file(model: onnx.ModelProto, name: str, folder: Path) -> None:
    """Its bytes behind others of a file."""
    stored = held(model, name)
    data = numpy_helper.to_array(stored).tobytes()
    (folder / "w").write_bytes(b"ahead" + data)
    stored.ClearField("raw_data")
    stored.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "w", "offset": "5", "length": str(len(data))}.items():
        stored.external_data.add(key=key, value=value)


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (wide("bfloat16", bias="float32"), "layer/b"),
        (wide("bfloat16", bias="bfloat16"), "layer/w/bias"),
        (Layer("bfloat16", bias="float32"), "layer/w/bias"),
    ],
    ids=["as it lies", "cast to fp32", "cast to y's type and back"],
)
def test_the_bias_of_the_choice_is_a_constant_in_fp32_wherever_it_lies(layer: Layer, name: str, tmp_path: Path) -> None:
    model = layer.model()
    want = evaluated(model)
    in_file(model, "layer/b", tmp_path)
    assert joined(model, folder=tmp_path) == {"NormedMoeRoute": 1}
    assert node_of(model, "NormedMoeRoute").input[5] == name
    assert held(model, name).data_type == TensorProto.FLOAT
    onnx.external_data_helper.load_external_data_for_model(model, str(tmp_path))
    assert same(want, evaluated(model))


def reads_too(model: onnx.ModelProto, value: str) -> None:
    model.graph.node.append(make_node("Identity", [value], [f"{value}/read"], f"{value}/read"))
    model.graph.output.append(onnx.ValueInfoProto(name=f"{value}/read"))


def gives(model: onnx.ModelProto, value: str) -> None:
    model.graph.output.append(onnx.ValueInfoProto(name=value))


def no_output(model: onnx.ModelProto, *names: str) -> None:
    """Those that are left are known by their types still."""
    kept = [o for o in model.graph.output if o.name not in names]
    model.graph.value_info.extend(o for o in model.graph.output if o.name in names)
    del model.graph.output[:]
    model.graph.output.extend(kept)


def test_what_it_makes_may_be_read_by_anything_or_by_nothing() -> None:
    model = LAYERS["with a gate and all biases"].model()
    no_output(model, "layer/y", "layer/sum", "layer/w")
    for name in ("layer/y", "layer/w", "layer/e"):
        reads_too(model, name)
    want = evaluated(model)
    assert joined(model) == {"NormedGatedSharedMoeRoute": 1, "Identity": 3}
    assert same(want, evaluated(model))


def test_it_stands_ahead_of_what_reads_y_before_the_router_does() -> None:
    model = BOTH.model()
    model.graph.node.insert(1, make_node("Neg", ["layer/y"], ["n"], "n"))
    model.graph.output.append(make_tensor_value_info("n", TensorProto.BFLOAT16, [1, "T", C]))
    want = evaluated(model)
    assert joined(model) == {"NormedMoeRoute": 1, "Neg": 1}
    assert same(want, evaluated(model))


def test_layers_are_joined_one_after_another() -> None:
    first = BOTH
    model = model_of(first, replace(first, name="second", x="layer/y"), replace(first, name="third", x="second/sum"))
    want = evaluated(model)
    assert joined(model) == {"NormedMoeRoute": 3}
    assert same(want, evaluated(model))


def another_router(model: onnx.ModelProto) -> None:
    """Of the same y, which is joined with neither or with the first."""
    graph = replace(Layer(), name="other").graph()
    for node in graph.node[1:]:
        node.input[:] = [n.replace("other/y", "layer/y") for n in node.input]
    model.graph.node.extend(graph.node[1:])
    model.graph.initializer.extend(t for t in graph.initializer if t.name != "other/k")
    model.graph.output.extend(o for o in graph.output if o.name in ("other/w", "other/e"))


def test_of_two_routers_of_one_norm_the_first_is_joined() -> None:
    model = Layer().model()
    another_router(model)
    want = evaluated(model)
    assert joined(model) == {"NormedMoeRoute": 1, "Transpose": 1, "MatMul": 1, "MoeRoute": 1}
    assert same(want, evaluated(model))


def node_at(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.name == name)


def computed(model: onnx.ModelProto, value: str, place: int) -> None:
    """The node of this name reads what is computed of its input."""
    node = node_at(model, value)
    model.graph.node.insert(0, make_node("Neg", [node.input[place]], [f"{value}/neg"], f"{value}/neg"))
    node.input[place] = f"{value}/neg"


def shortened(model: onnx.ModelProto, name: str) -> None:
    """One entry, which all experts get."""
    stored = held(model, name)
    stored.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(stored)[:1], name))


def unturned(model: onnx.ModelProto, perm: list[int] | None = None) -> None:
    """Stored as the product reads it, or as a transposition that does nothing does."""
    weight, turn = held(model, "layer/logits/weight"), node_of(model, "Transpose")
    weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(weight).T), weight.name))
    if perm:
        turn.attribute[0].ints[:] = perm
    else:
        node_of(model, "MatMul").input[1] = weight.name
        model.graph.node.remove(turn)


def turned_twice(model: onnx.ModelProto) -> None:
    turn = node_of(model, "Transpose")
    model.graph.node.insert(0, make_node("Transpose", [turn.input[0]], ["twice"], "twice", perm=[1, 0]))
    turn.input[0] = "twice"


def cast_between(model: onnx.ModelProto) -> None:
    cast = node_at(model, "layer/logits/weight/cast")
    model.graph.node.insert(0, make_node("Cast", [cast.input[0]], ["half"], "half", to=TensorProto.FLOAT16))
    cast.input[0] = "half"


def cast_back_twice(model: onnx.ModelProto) -> None:
    model.graph.node.append(make_node("Cast", ["layer/w"], ["again"], "again", to=TensorProto.BFLOAT16))
    model.graph.output.append(onnx.ValueInfoProto(name="again"))


def narrow_gate(model: onnx.ModelProto) -> None:
    """Of y as it is, where the router reads a cast one."""
    node_at(model, "layer/gate").input[0] = "layer/y"
    node_at(model, "layer/gate/turned").input[0] = "layer/gate/weight"


BIASED, GATE = Layer("bfloat16", router_bias="bfloat16", bias="bfloat16"), Layer(**GATED)
BETWEEN = {"logits": Layer(), "biased": BIASED, "gate": GATE, "y/cast": BOTH, "w": BOTH}
REFUSED: dict[str, tuple[Layer, Change]] = {
    "1: a norm of what is added": (Layer(), lambda m: node_of(m, "AddRmsNorm").input.append("layer/k")),
    "1: another norm": (Layer(), lambda m: setattr(node_of(m, "AddRmsNorm"), "domain", "other")),
    "1: the sum as it is": (Layer(), lambda m: rewired(m, "layer/logits", 0, "layer/sum")),
    "1: y of unknown type": (Layer(), lambda m: (no_output(m, "layer/y"), m.graph.value_info.pop())),
    "1: no sum": (Layer(), lambda m: (no_output(m, "layer/sum"), node_of(m, "AddRmsNorm").output.pop())),
    "1: no choice": (Layer(), lambda m: (no_output(m, "layer/e"), node_of(m, "MoeRoute").output.pop())),
    "2: weights that are cast twice": (BOTH, cast_back_twice),
    "3: a weight that is computed": (Layer(), lambda m: computed(m, "layer/logits/turned", 0)),
    "3: a weight that is not turned": (Layer(), unturned),
    "3: a weight that is turned twice": (Layer(), turned_twice),
    "3: a weight that is turned and then cast": (Layer(stored="bfloat16", cast_first=False), lambda m: None),
    "3: a weight that is cast and turned twice": (BOTH, turned_twice),
    "3: a weight that is turned to itself": (Layer(), lambda m: unturned(m, [0, 1])),
    "3: a weight of integers": (Layer(stored="int32"), lambda m: None),
    "3: a gate's weight of several rows": (GATE, lambda m: rewired(m, "layer/gate/turned", 0, "zeros2")),
    "3: a gate of another value": (GATE, lambda m: rewired(m, "layer/gate", 0, "layer/sum")),
    "3: a gate that is no product": (GATE, lambda m: computed(m, "layer/w", 1)),
    "4: a router's bias that is computed": (BIASED, lambda m: computed(m, "layer/biased", 1)),
    "4: a router's bias of one number": (BIASED, lambda m: shortened(m, "layer/rb")),
    "4: a router's bias of integers": (Layer(router_bias="int32"), lambda m: None),
    "4: a bias of the choice of integers": (Layer(bias="int32"), lambda m: None),
    "4: a bias of the choice of one number": (BIASED, lambda m: shortened(m, "layer/b")),
    "4: a bias of the choice that is computed": (BIASED, lambda m: computed(m, "layer/w", 1)),
    "5: a weight that is cast to other 16 bits between": (BOTH, cast_between),
    "5: a weight in fp32": (wide("float16", stored="float32"), lambda m: None),
    "5: a weight in other 16 bits": (wide("float16", stored="bfloat16"), lambda m: None),
    "5: a router's bias in fp32": (wide("float16", router_bias="float32"), lambda m: None),
    "5: weights that stay in fp32": (wide("float16"), lambda m: drop_cast(m)),
    "5: weights that are cast to another type": (
        wide("float16"),
        lambda m: setattr(node_at(m, "layer/w/cast").attribute[0], "i", 16),
    ),
    "5: a gate": (wide("float16", **GATED), narrow_gate),
    "5: a y that is cast from fp32 to fp32": (Layer(), lambda m: cast_around(m, TensorProto.FLOAT)),
    "5: a y that is cast from fp16 to fp16": (Layer("float16"), lambda m: cast_around(m, TensorProto.FLOAT16)),
    "another's router": (Layer(), lambda m: setattr(node_of(m, "MoeRoute"), "domain", "other")),
}


def rewired(model: onnx.ModelProto, name: str, place: int, value: str) -> None:
    node_at(model, name).input[place] = value
    if value.startswith("zeros"):
        rows = int(value.removeprefix("zeros"))
        model.graph.initializer.append(numpy_helper.from_array(np.zeros((rows, C), np.float32), value))


def drop_cast(model: onnx.ModelProto) -> None:
    model.graph.node.remove(node_at(model, "layer/w/cast"))
    no_output(model, "layer/w/cast")
    reads_too(model, "layer/w")


def cast_around(model: onnx.ModelProto, to: int) -> None:
    """What the router reads, and its weights, to their own type."""
    place = [n.name for n in model.graph.node].index("layer/logits")
    model.graph.node.insert(place, make_node("Cast", ["layer/y"], ["cast"], "cast", to=to))
    node_at(model, "layer/logits").input[0] = "cast"
    no_output(model, "layer/w")
    model.graph.node.append(make_node("Cast", ["layer/w"], ["back"], "back", to=to))
    gives(model, "back")


for value, of in BETWEEN.items():
    REFUSED[f"2: {value} that others read"] = (of, partial(reads_too, value=f"layer/{value}"))
    REFUSED[f"2: {value} that is an output"] = (of, partial(gives, value=f"layer/{value}"))


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_plugin_computes_stays(name: str) -> None:
    layer, change = REFUSED[name]
    model = layer.model()
    change(model)
    before = [n.SerializeToString() for n in model.graph.node]
    ours = {n.name: n.op_type for n in model.graph.node if n.domain}
    assert join_routes(model, ours, SERVED, NOWHERE) == ours
    assert [n.SerializeToString() for n in model.graph.node] == before


@pytest.mark.parametrize("route", ["MoeRoute", *SHARED_ROUTES])
def test_a_library_without_the_plugin_leaves_it(route: str) -> None:
    model = Layer(route=route).model()
    assert joined(model, SERVED - {f"Normed{route}"})[route] == 1
