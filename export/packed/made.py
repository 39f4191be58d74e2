"""Nodes as they are made, one after the other, of what a checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto
from onnx.helper import make_node

from llmexport.plugins.microscaling import SCALE_BIAS

FLOAT = int(TensorProto.FLOAT)


@dataclass(kw_only=True)
class Made:
    """Nodes, and the initialisers that they read, in the order in which they are made."""

    initializers: list[TensorProto] = field(default_factory=list)
    nodes: list[onnx.NodeProto] = field(default_factory=list)

    def constant(self, name: str, array: np.ndarray | np.generic) -> str:
        self.initializers.append(onnx.numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, kind: str, inputs: list[str], value: str, **said: Any) -> str:
        self.nodes.append(make_node(kind, inputs, [value], value, **said))
        return value

    def powers(self, exponents: str, name: str) -> str:
        """Bytes as powers of two."""
        bias, base = self.constant(f"{name}/bias", np.float32(SCALE_BIAS)), self.constant(f"{name}/base", np.float32(2))
        wide = self.node("Cast", [exponents], f"{name}/wide", to=FLOAT)
        return self.node("Pow", [base, self.node("Sub", [wide, bias], f"{name}/exponents")], f"{name}/powers")
