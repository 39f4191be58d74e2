"""What an engine launches at a step, as TensorRT lists it at the end of a build with detailed profiling verbosity.

It is read where neither torch, ONNX nor TensorRT is: nothing here imports any.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

HEADING = "Layers:\n"
LINE = re.compile(r"Name: (.*?), LayerType: (\w+), ")
NODES, NODE = ", Metadata: ", "[ONNX Layer: "
# Some separators of nodes are control characters.
BETWEEN = re.compile(rf"\][\x1e\x1f]*{re.escape(NODE)}")
PLUGIN = "plugin"
# TensorRT's types of layer; another one keeps TensorRT's name. Of a product with an epilogue, and of a concatenation,
# the kernel may be left open until the sizes are known.
KINDS = MappingProxyType(
    {
        "gemm": "gemm",
        "runtime_fusion": "gemm",
        "kgen": "generated",
        "runtime_function": "generated",
        "custom_layer": PLUGIN,
        "PluginV3": PLUGIN,
        "copy": "copy",
        "ShapeHostToDevice": "copy",
    }
)
# They launch nothing: sizes, loops and their counters are the host's, constants lie in the plan, and streams wait for
# each other.
HOST = frozenset({"shape_call", "Constant", "jmp", "cjmp", "add", "cast", "reshape", "signal", "wait"})


@dataclass(frozen=True)
class Kernel:
    """A layer of an engine that runs on the GPU; those within a loop are listed once.

    kind: "gemm", "plugin", "generated" (by TensorRT, of operators), "copy", or TensorRT's type where it is another.
    nodes: those of the ONNX model that it computes, weights' too; none where TensorRT put it between. launches: more
    than one only where an op of ours is several kernels, counted at one token a row.
    """

    name: str
    kind: str
    nodes: tuple[str, ...]
    launches: int = 1


def listed(texts: Sequence[str]) -> tuple[Kernel, ...] | None:
    """The kernels in the messages that begin with HEADING, in their order; None where they cannot be read."""
    if len(texts) != 1:
        return None
    # Not splitlines, as some of the separators end a line for it.
    lines = texts[0].removeprefix(HEADING).split("\n\n")[0].strip("\n").split("\n")
    found = [m for m in map(LINE.match, lines) if m]
    if len(found) < len(lines):
        return None
    return tuple(Kernel(m[1], KINDS.get(m[2], m[2]), _nodes(m.string)) for m in found if m[2] not in HOST)


def _nodes(line: str) -> tuple[str, ...]:
    _, said, metadata = line.rpartition(NODES)
    inner = metadata.removeprefix(NODE).removesuffix("]") if said else ""
    return tuple(BETWEEN.split(inner)) if inner else ()


def with_launches(kernels: tuple[Kernel, ...] | None, ops: Mapping[str, int]) -> tuple[Kernel, ...] | None:
    """Kernels whose plugins launch what `ops` says of their nodes; None where not each node is one plugin's."""
    if kernels is None:
        return None
    seen = Counter(n for k in kernels if k.kind == PLUGIN for n in k.nodes if n in ops)
    if seen != Counter(ops.keys()):
        return None
    return tuple(
        replace(k, launches=sum(ops[n] for n in k.nodes if n in ops) or 1) if k.kind == PLUGIN else k for k in kernels
    )


def by_kind(kernels: Sequence[Kernel]) -> Counter[str]:
    """How many launches there are of each kind."""
    counted: Counter[str] = Counter()
    for kernel in kernels:
        counted[kernel.kind] += kernel.launches
    return counted
