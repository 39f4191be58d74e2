"""The nodes of a step, each run alone on what the trace computes: which is off, and how it differs from the one that
an export makes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from llmexport.export.values import one_line
from llmexport.plugins.dtypes import BY_NAME
from llmexport.plugins.spec import DOMAIN, op_name
from llmexport.validate.compare import Difference, compare
from llmexport.validate.feeds import Feed
from llmexport.validate.runtime import STOPPED, open_session
from llmexport.validate.tolerance import TOLERANCE, Tolerance

OWN = "alone: "  # before the names of what nodes make when each is run alone
WIDE = " in fp32"  # after the names of what is read in another type
# Types of which it gives no array.
PACKED = frozenset(f"tensor({n})" for n in ("int2", "uint2", "int4", "uint4", "float4e2m1", "float8e5m2"))
FED = "biuf"  # the kinds of arrays that it takes
SHOWN = 4  # numbers of a constant that are told


@dataclass(frozen=True)
class Output:
    """An output of one node that was run alone, beside what it should be.

    excess: how many times its tolerance it is off. said: why there is no difference to tell.
    """

    node: onnx.NodeProto
    name: str
    difference: Difference | None
    allowed: Tolerance
    excess: float
    said: str = ""


def op_of(node: onnx.NodeProto) -> str:
    return op_name(node.op_type) if node.domain == DOMAIN else node.op_type


def values(model: onnx.ModelProto, feed: Feed, weights: Path) -> Feed:
    """What every node of a model computes from `feed`, by value name, but for PACKED types."""
    every = onnx.ModelProto()
    every.CopyFrom(model)
    del every.graph.output[:]
    every.graph.output.extend(onnx.ValueInfoProto(name=n) for node in model.graph.node for n in node.output if n)
    runtime = open_session(every, weights)
    narrow = {o.name for o in runtime.get_outputs() if o.type == "tensor(bfloat16)"}
    if narrow:
        # It gives no array of this type, whose numbers fp32 has.
        for output in (o for o in every.graph.output if o.name in narrow):
            wide = onnx.helper.make_node("Cast", [output.name], [output.name + WIDE], to=onnx.TensorProto.FLOAT)
            every.graph.node.append(wide)
            output.name += WIDE
        runtime = open_session(every, weights)
    names = [o.name for o in runtime.get_outputs() if o.type not in PACKED]
    made = dict(zip(names, runtime.run(names, {i.name: feed[i.name] for i in runtime.get_inputs()}), strict=True))
    return {n.removesuffix(WIDE): a.astype("bfloat16") if n.endswith(WIDE) else a for n, a in made.items()}


def run_alone(part: onnx.ModelProto, traced: onnx.ModelProto, feed: Feed, weights: Path) -> Iterator[Output]:
    """The outputs of the nodes of `part`, in order, beside those of the nodes that make the same values in `traced`.

    Each node is run on what `traced` computes from `feed`, both times: in 16 bits ONNX Runtime does not round from node
    to node, and a node that reads what was rounded gives other numbers. A value that `traced` has not is what the nodes
    of `part` make. A node that ONNX Runtime does not run ends it.
    """
    given = feed | values(traced, feed, weights)
    right = values(_apart(traced, len(traced.graph.node), given), given, weights)
    nodes = list(part.graph.node)
    found, refused = _run_first(part, len(nodes), given, weights)
    if refused:
        # The least number of nodes that it does not run.
        runs, stops = 0, len(nodes)
        while stops - runs > 1:
            middle = (runs + stops) // 2
            _, said = _run_first(part, middle, given, weights)
            runs, stops, refused = (runs, middle, said) if said else (middle, stops, refused)
        found, _ = _run_first(part, runs, given, weights)
        nodes = nodes[:stops]
    for node in nodes:
        for name in node.output:
            if OWN + name in found and OWN + name in right:
                yield _output(node, name, right[OWN + name], found[OWN + name])
    if refused:
        yield Output(nodes[-1], nodes[-1].output[0], None, TOLERANCE["float32"], math.inf, refused)


def _run_first(part: onnx.ModelProto, count: int, given: Feed, weights: Path) -> tuple[Feed, str]:
    """What the first nodes compute, each alone, under names of their own; or what ONNX Runtime says against it."""
    try:
        return values(_apart(part, count, given), given, weights), ""
    except STOPPED as error:
        return {}, one_line(error)


def _apart(part: onnx.ModelProto, count: int, given: Feed) -> onnx.ModelProto:
    """The first nodes, which read what is given, and make values of other names."""
    model = onnx.ModelProto()
    model.CopyFrom(part)
    del model.graph.node[count:]
    del model.graph.input[:]
    held = {t.name for t in part.graph.initializer} | {""}
    fed = {n for n, a in given.items() if a.dtype.kind in FED} - held
    for node in model.graph.node:
        node.input[:] = [n if n in held or n in fed else OWN + n for n in node.input]
        node.output[:] = [OWN + n if n else n for n in node.output]
    for name in sorted({n for node in model.graph.node for n in node.input} & fed):
        kind, shape = BY_NAME[given[name].dtype.name].onnx, given[name].shape
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, shape))
    return model


def _output(node: onnx.NodeProto, name: str, expected: np.ndarray, found: np.ndarray) -> Output:
    # Whole numbers, and truths, are right or wrong.
    allowed = TOLERANCE.get(expected.dtype.name, TOLERANCE["float32"])
    if expected.shape != found.shape or expected.dtype != found.dtype:
        said = f"is {found.dtype}{list(found.shape)}, not {expected.dtype}{list(expected.shape)}"
        return Output(node, name, None, allowed, math.inf, said)
    # What is meant to be infinite, as in a mask, is right where it is.
    same = ~np.isfinite(expected) & ((expected == found) | (np.isnan(expected) & np.isnan(found)))
    zero = np.zeros((), expected.dtype)
    difference = compare(np.where(same, zero, expected), np.where(same, zero, found))
    return Output(node, name, difference, allowed, difference.excess(allowed))


def changes(name: str, model: onnx.ModelProto, made: onnx.ModelProto) -> list[str]:
    """How the node of that name in `model` differs from that in `made`, in words."""
    node, other = (next((n for n in m.graph.node if n.name == name), None) for m in (model, made))
    if node is None or other is None:
        return ["an export makes no node of this name"] if node else []
    if op_of(node) != op_of(other):
        return [f"it is {op_of(node)}, an export makes {op_of(other)}"]
    said = [
        f"input {i} is {_told(mine)}, an export makes it {_told(theirs)}"
        for i, (mine, theirs) in enumerate(itertools.zip_longest(node.input, other.input))
        if mine != theirs
    ]
    ours, theirs = ({a.name: onnx.helper.get_attribute_value(a) for a in n.attribute} for n in (node, other))
    said += [
        f"{key} is {_told(ours.get(key))}, an export makes it {_told(theirs.get(key))}"
        for key in {**theirs, **ours}
        if ours.get(key) != theirs.get(key)
    ]
    bodies = [
        [f.SerializeToString(deterministic=True) for f in m.functions if f.name in _called(n)]
        for m, n in ((model, node), (made, other))
    ]
    if bodies[0] != bodies[1]:
        said.append("its function body is not the one that an export writes")
    constants = [{t.name: t for t in m.graph.initializer} for m in (model, made)]
    return said + list(_changed_constants(node, *constants))


def _called(node: onnx.NodeProto) -> set[str]:
    """The types of a node and of those within it."""
    return {node.op_type}.union(*(_called(n) for a in node.attribute for n in a.g.node))


def _changed_constants(
    node: onnx.NodeProto, ours: Mapping[str, onnx.TensorProto], theirs: Mapping[str, onnx.TensorProto]
) -> Iterator[str]:
    for name in node.input:
        pair = [side[name] for side in (ours, theirs) if name in side]
        if len(pair) == 2 and not any(t.data_location == onnx.TensorProto.EXTERNAL for t in pair):
            mine, other = map(onnx.numpy_helper.to_array, pair)
            if not np.array_equal(mine, other):
                told = [_told(a.tolist()) for a in (mine, other)]
                yield (
                    f"{name} is {told[0]}, an export makes it {told[1]}"
                    if told[0] != told[1]
                    else f"{name} holds other numbers"
                )


def _told(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, list) and len(value) > SHOWN:
        return f"{len(value)} numbers"
    return f"{value:.6g}" if isinstance(value, float) else "missing" if value is None else str(value)
