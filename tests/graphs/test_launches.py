"""The launches of a step: each rule on a graph of some nodes, and what a decode layer of each kind takes.

golden_launches.json holds layers of exports with a static cache: a launch that comes back is seen there.
"""

import json
from pathlib import Path

import onnx
import onnx.parser
import pytest
from plugin_cases import served

from llmexport.graphs.bodies import op_of
from llmexport.graphs.launches import KERNELS, launches

GOLDEN = json.loads((Path(__file__).parents[1] / "golden_launches.json").read_text())
INPUTS = "float[B,T,8] x, float[B,T,8] z"
HEADER = '<ir_version: 10, opset_import: ["": 24, "llmexport": 1]>'
WEIGHT = "<float[8] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[8, 8] m>"


def counted(nodes: str, step: str = "a") -> dict[str, int]:
    made = onnx.parser.parse_model(f"{HEADER} g ({INPUTS}) => (float[B,T,8] y) {WEIGHT} {{ {nodes} }}")
    # A matrix whose numbers lie beside the file.
    made.graph.initializer.extend([onnx.TensorProto(name="m", data_type=1, dims=[8, 8])])
    return dict(launches(made, step))


RULES = {
    "a product and its bias": ('["a/0"] p = MatMul(x, m) ["a/1"] y = Add(p, w)', {"MatMul": 1}),
    "a bias on what others read": (
        '["a/0"] p = MatMul(x, m) ["a/1"] s = Add(p, w) ["a/2"] y = Sub(s, p)',
        {"MatMul": 1, "point-wise": 1},
    ),
    "a sum of two values is no bias": (
        '["a/0"] p = MatMul(x, m) ["a/1"] y = Add(p, z)',
        {"MatMul": 1, "point-wise": 1},
    ),
    "weights are folded": (
        '["a/0"] t = Transpose<perm = [1, 0]>(m) ["a/1"] u = Neg(t) ["a/2"] y = MatMul(x, u)',
        {"MatMul": 1},
    ),
    "sizes are the host's": (
        '["a/0"] n = Shape(x) ["a/1"] o = Neg(n) ["a/2"] p = Abs(o) ["a/3"] y = Reshape(z, p)',
        {},
    ),
    "point-wise operators are one": (
        '["a/0"] n = Neg(x) ["a/1"] s = Sigmoid(n) ["a/2"] y = Mul(s, z)',
        {"point-wise": 1},
    ),
    "through views": (
        '["a/0"] n = Neg(x) ["a/1"] r = Reshape(n, w) ["a/2"] y = Abs(r)',
        {"point-wise": 1},
    ),
    "but not past a product": (
        '["a/0"] n = Neg(x) ["a/1"] p = MatMul(n, m) ["a/2"] y = Abs(p)',
        {"MatMul": 1, "point-wise": 2},
    ),
    "a norm takes its casts": (
        '["a/0"] c = Cast<to = 1>(x) ["a/1"] n = RMSNormalization(c, w) ["a/2"] y = Cast<to = 10>(n)',
        {"RMSNormalization": 1},
    ),
    "an op of ours is its kernels": ('["a/0"] y = llmexport.MoeExperts(x, z)', {"MoeExperts": 3}),
    "keys of a window that no two blocks share": (
        '["a/0"] y = llmexport.SinkAttention<window = 128>(x)',
        {"SinkAttention": 1},
    ),
    "keys of one that they may share": (
        '["a/0"] y = llmexport.SinkAttention<window = 129>(x)',
        {"SinkAttention": 2},
    ),
    "an op with a body is too": ('["a/0"] y = llmexport.SinkAttention__float32__D_8(x)', {"SinkAttention": 2}),
    "a Transpose copies": (
        '["a/0"] t = Transpose<perm = [1, 0, 2]>(x) ["a/1"] y = MatMul(t, m)',
        {"Transpose": 1, "MatMul": 1},
    ),
    "but for a point-wise reader": ('["a/0"] t = Transpose<perm = [1, 0, 2]>(x) ["a/1"] y = Neg(t)', {"point-wise": 1}),
    "a Split copies each part": (
        '["a/0"] h, i = Split<axis = -1, num_outputs = 2>(x) ["a/1"] y = llmexport.GatedAct(h, i)',
        {"Split": 2, "GatedAct": 1},
    ),
    "that an op of ours reads": (
        '["a/0"] h, i = Split<axis = -1, num_outputs = 2>(x) ["a/1"] j = Neg(i) ["a/2"] y = llmexport.GatedAct(h, j)',
        {"Split": 1, "GatedAct": 1, "point-wise": 1},
    ),
    "what is stored is copied": ('["a/0"] y = Transpose<perm = [1, 0, 2]>(x)', {"Transpose": 1}),
    "anything else is one": ('["a/0"] y = CumSum(x, w)', {"CumSum": 1}),
    "another step's are not its": (
        '["b/0"] n = MatMul(x, m) ["ab/1"] o = Neg(n) ["a/1"] y = MatMul(o, m)',
        {"MatMul": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str) -> None:
    nodes, expected = RULES[rule]
    assert counted(nodes) == expected


def test_every_op_with_a_plugin_has_its_kernels() -> None:
    assert KERNELS.keys() == served()


def static(exported, name: str) -> onnx.ModelProto:
    """The export of a row of golden_launches.json, which names an architecture, and a cache if it is not `static`."""
    arch, _, cache = name.partition(" ")
    folder = exported(arch, "bfloat16", slots=64, cache=cache or "static")
    return onnx.load(folder / "model.onnx", load_external_data=False)


def of_layers(made: onnx.ModelProto, name: str) -> dict[str, dict[str, int]]:
    """What golden_launches.json says of an export."""
    found = {step: dict(launches(made, step)) for step in GOLDEN[name]}
    return {step: {**counts, "all": sum(counts.values())} for step, counts in found.items()}


ONCE = ("gemma", "qwen3_5_moe", "gemma static-fused")


@pytest.mark.parametrize("name", [a if a in ONCE else pytest.param(a, marks=pytest.mark.slow) for a in GOLDEN])
def test_a_decode_layer_takes_no_launch_more(name: str, exported) -> None:
    assert of_layers(static(exported, name), name) == GOLDEN[name]


def put_back(made: onnx.ModelProto, step: str, op: str) -> None:
    """Puts the operators that the op's body has in the place of a step's first node of it."""
    place, node = next(
        (i, n) for i, n in enumerate(made.graph.node) if n.name.startswith(f"{step}/") and op_of(n) == op
    )
    body = next(f for f in made.functions if f.name == node.op_type)
    names = dict(zip((*body.input, *body.output), (*node.input, *node.output), strict=False)) | {"": ""}
    made.graph.node.remove(node)
    for i, part in enumerate(body.node):
        own = onnx.NodeProto()
        own.CopyFrom(part)
        own.name = f"{step}/back/{i}"
        own.input[:], own.output[:] = (
            [names.setdefault(n, f"{step}/{n}") for n in kept] for kept in (part.input, part.output)
        )
        made.graph.node.insert(place + i, own)


# A compiler makes one kernel of the point-wise operators of some.
@pytest.mark.parametrize(
    ("name", "op", "takes_more"),
    [
        ("gemma", "QkNormRope", True),
        ("gemma static-fused", "QkNormRopeWrite", True),
        ("gemma", "AddRmsNorm", False),
        ("gemma", "GatedAct", False),
        # Of two norms.
        pytest.param("glm4", "AddRmsNorm", True, marks=pytest.mark.slow),
        ("qwen3_5_moe", "GatedDeltaNet", True),
    ],
)
def test_an_op_put_back_into_operators_is_seen(name: str, op: str, takes_more: bool, exported) -> None:
    made = static(exported, name)
    put_back(made, "layers.1", op)
    found, golden = of_layers(made, name)["layers.1"], GOLDEN[name]["layers.1"]
    assert found.get(op, 0) == golden[op] - 1
    assert (found["all"] > golden["all"]) == takes_more
    assert found != golden
