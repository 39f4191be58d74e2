"""Graphs of attention over slots, as passes find it: four heads of 8, two of keys and values, in nine slots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime

from llmexport.export.graph_file import load_body
from llmexport.graphs.bodies import attach_bodies
from llmexport.plugins.spec import DOMAIN

SLOTS = 9
SPLIT = "[q4] q_heads = Reshape(q, four) [k4] k_heads = Reshape(k, two) [v4] v_heads = Reshape(v, two)"
TURN = """[qt] qt = Transpose<perm = [0, 2, 1, 3]>(q_heads) [kt] kt = Transpose<perm = [0, 2, 1, 3]>(k_heads)
  [vt] vt = Transpose<perm = [0, 2, 1, 3]>(v_heads)"""
BACK = "[at] back = Transpose<perm = [0, 2, 1, 3]>(a) [flat] y = Reshape(back, flat)"
TURNS = f"{DOMAIN}.Rope<interleaved = 0>"

# Of steps as long as q [B, T, ...], in slots numbered `slots`.
MASK = """
  t1 = Shape<start = 1, end = 2>(q) t = Squeeze(t1) steps = Range(none, t, step) [rows] of_row = Unsqueeze(length, one)
  own1 = Add(of_row, steps) own = Unsqueeze(own1, last) first = Reshape(padding, row) ge = GreaterOrEqual(slots, first)
  [le] le = LessOrEqual(slots, own) [shown] both = And(ge, le) [self] eq = Equal(slots, own) any = Or(both, eq)
  mask = Unsqueeze(any, one)
"""


def operands(count: int, tokens: int) -> dict[str, np.ndarray]:
    """What a step reads and what lies in the slots."""
    rng = np.random.default_rng(0)
    shapes = {"q": (tokens, 32), "k": (tokens, 16), "v": (tokens, 16), "cos": (tokens, 4), "sin": (tokens, 4)}
    shapes |= dict.fromkeys(("pk", "pv"), (2, SLOTS, 8))
    return {n: rng.standard_normal((count, *shape)).astype(np.float32) for n, shape in shapes.items()}


def tell(made: onnx.ModelProto, typed: Mapping[str, tuple[Any, ...]]) -> None:
    """What onnx does not infer, or otherwise: type and shape of these values."""
    told = [v for v in made.graph.value_info if v.name not in typed]
    told += [onnx.helper.make_tensor_value_info(n, kind, shape) for n, (kind, *shape) in typed.items()]
    del made.graph.value_info[:]
    made.graph.value_info.extend(told)


def attention_of(graph: gs.Graph) -> tuple[gs.Node, gs.Node]:
    """The If that stands for an attention, and the one inside of it that tells where the operator takes a step, which
    is the same where a bias is always added; each with the operator alone in its first branch."""
    [outer] = [n for n in graph.nodes if n.op == "If" and n.name == "attention/slots"]
    behind = outer.attrs["else_branch"].nodes
    inner = behind[0] if [n.op for n in behind] == ["If"] else outer
    for chosen in (outer, inner):
        assert [n.op for n in chosen.attrs["then_branch"].nodes] == ["GroupQueryAttention"]
    return outer, inner


def run(made: onnx.ModelProto, given: dict[str, np.ndarray]) -> list[np.ndarray]:
    attach_bodies(made, load_body)
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}
    return session.run(None, {n: a for n, a in given.items() if n in names})


def run_in_place(made: onnx.ModelProto, given: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The same with pasts and presents in one buffer each."""
    attach_bodies(made, load_body)
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    binding, outputs = session.io_binding(), [o.name for o in session.get_outputs()]
    held = {i.name: onnxruntime.OrtValue.ortvalue_from_numpy(given[i.name].copy()) for i in session.get_inputs()}
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    for name in outputs:
        if name in ("all_k", "all_v"):
            binding.bind_ortvalue_output(name, held["p" + name[-1]])
        else:
            binding.bind_output(name, "cpu")
    session.run_with_iobinding(binding)
    # Arrays of what is bound lie in memory that ends with it.
    return [v.numpy().copy() for v in binding.get_outputs()]


def in_bfloat16(made: onnx.ModelProto) -> gs.Graph:
    graph = gs.import_onnx(made)
    for value in graph.tensors().values():
        if isinstance(value, gs.Variable) and value.dtype == np.float32:
            value.dtype = onnx.TensorProto.BFLOAT16
    return graph
