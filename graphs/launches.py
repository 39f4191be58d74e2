"""How many kernels an engine launches for a part of a graph, by rule: what a fusion saves, seen without a GPU."""

from __future__ import annotations

from collections import Counter

import onnx
from onnx import ModelProto, NodeProto

from llmexport.graphs.bodies import op_of
from llmexport.plugins.spec import DOMAIN

# Of each op of ours, at one token a row; the launchers in <op>.cu say when there are more.
KERNELS = {
    "AddRmsNorm": 1,
    "CausalConv1d": 1,
    "GatedAct": 1,
    "GatedDeltaNet": 1,  # convolution, gates, rule and norm one after another where heads fill the GPU more than twice
    "GatedDeltaRule": 1,
    "GatedRmsNorm": 1,
    "KimiDeltaRule": 1,
    "MoeExperts": 3,  # gate and up, down, combine; a sort before them for more than 32 pairs
    "MoeRoute": 1,
    "QkNormRope": 1,
    "QkNormRopeWrite": 1,  # and a copy of each cache where it is not written in place
    "Rope": 1,
    "SinkAttention": 2,  # the splits of the keys, and their merge; 1 where a window holds one split
    "Wkv": 1,
    "Wkv7": 1,
}
SPLIT = 128  # the least keys of a split in decode, see sink_attention.cu
GEMMS = {"MatMul", "Gemm"}
NORMS = {"RMSNormalization", "LayerNormalization"}
VIEWS = {"Reshape", "Unsqueeze", "Squeeze", "Flatten", "Identity", "Constant"}
COPIES = {"Transpose", "Concat", "Slice", "Split", "Expand", "Pad"}
POINTWISE = {"Abs", "Add", "And", "Cast", "Ceil", "Clip", "Cos", "Div", "Equal", "Erf", "Exp", "Floor", "Gelu"}
POINTWISE |= {"Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Log", "Max", "Min", "Mod", "Mul", "Neg", "Not"}
POINTWISE |= {"Or", "Pow", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin", "Softplus", "Sqrt", "Sub", "Swish"}
POINTWISE |= {"Tanh", "Where", "CastLike"}
FUSES = POINTWISE | NORMS


def launches(model: ModelProto, step: str) -> Counter[str]:
    """The kernels of the nodes of one step of an assembly, as a runtime that fuses what can be would launch them.

    By operator or op, and "point-wise" for point-wise operators alone:
    - what depends on weights alone is folded, sizes are known on the host, and views cost nothing;
    - a matrix product is one launch, with the bias that is added to it;
    - an op of ours is as many as its kernels;
    - point-wise operators that feed each other, through views too, are one, with the norms among them one a norm;
    - Transpose, Concat, Slice, Expand and Pad copy once, Split once for each of its outputs; but what only
      point-wise operators and norms read is read where it lies;
    - any other operator is one.
    """
    graph = model.graph
    nodes = [n for n in graph.node if n.name.startswith(f"{step}/")]
    free = _known(graph)
    nodes = [n for n in nodes if n.output[0] not in free]
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    makers = {name: n for n in nodes for name in n.output}
    counted: Counter[str] = Counter()
    fused: list[NodeProto] = []
    for node in nodes:
        kind = op_of(node)
        if node.domain == DOMAIN:
            counted[kind] += kernels_of(node, kind)
        elif kind in FUSES:
            if not _is_bias(node, makers, readers, free):
                fused.append(node)
        elif kind in COPIES:
            copied = sum(not _read_in_place(name, readers) for name in node.output)
            counted[kind] += copied if kind == "Split" else min(copied, 1)
        elif kind not in VIEWS:
            counted["MatMul" if kind in GEMMS else kind] += 1
    for group in _groups(fused, makers):
        norms = Counter(n.op_type for n in group if n.op_type in NORMS)
        counted += norms or Counter(["point-wise"])
    return +counted


def kernels_of(node: NodeProto, op: str) -> int:
    """Those of a node of ours, which is of this op, at one token a row."""
    window = next((a.i for a in node.attribute if a.name == "window"), 0)
    return 1 if op == "SinkAttention" and 0 < window <= SPLIT else KERNELS[op]


def _known(graph: onnx.GraphProto) -> set[str]:
    """Values that no step computes on a GPU: weights, constants, sizes, and what is made of these alone."""
    known = {t.name for t in graph.initializer}
    for node in graph.node:
        if node.domain != DOMAIN and (node.op_type == "Shape" or all(not n or n in known for n in node.input)):
            known.update(node.output)
    return known


def _through_views(name: str, makers: dict[str, NodeProto]) -> NodeProto | None:
    """The node that makes a value or what it is a view of, if a node of the step does."""
    node = makers.get(name)
    while node is not None and not node.domain and node.op_type in VIEWS and node.input:
        node = makers.get(node.input[0])
    return node


def _is_bias(
    node: NodeProto, makers: dict[str, NodeProto], readers: dict[str, list[NodeProto]], free: set[str]
) -> bool:
    """Whether the node adds a weight to a matrix product that nothing else reads."""
    if node.op_type != "Add" or not any(n in free for n in node.input):
        return False
    product = next(n for n in node.input if n not in free)
    maker = makers.get(product)
    return maker is not None and maker.op_type in GEMMS and len(readers[product]) == 1


def _read_in_place(name: str, readers: dict[str, list[NodeProto]]) -> bool:
    """Whether only operators that a compiler makes a kernel of read a value, through views too; outputs are stored."""
    its = readers.get(name, [])
    return bool(its) and all(
        not n.domain and (n.op_type in FUSES or (n.op_type in VIEWS and _read_in_place(n.output[0], readers)))
        for n in its
    )


def _groups(nodes: list[NodeProto], makers: dict[str, NodeProto]) -> list[list[NodeProto]]:
    """Nodes that feed each other."""
    group = {n.output[0]: [n] for n in nodes}
    for node in nodes:
        for name in node.input:
            maker = _through_views(name, makers)
            if maker is None or maker.output[0] not in group:
                continue
            one, other = group[maker.output[0]], group[node.output[0]]
            if one is not other:
                one.extend(other)
                group.update((n.output[0], one) for n in other)
    return list({id(g): g for g in group.values()}.values())
