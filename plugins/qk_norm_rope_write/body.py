"""The ONNX function body of QkNormRopeWrite."""

from __future__ import annotations

from llmexport.plugins.qk_norm_rope.body import step
from llmexport.plugins.spec import Attribute


def body(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> str:
    """The operators that it stands for: QkNormRope's, and the two that write a cache in place."""
    return f"""{step(attributes, types, sizes, "new_key", "new_value")}
    at = Cast <to = 7> (write_indices)
    key = TensorScatter <axis = -2> (past_key, new_key, at)
    value = TensorScatter <axis = -2> (past_value, new_value, at)"""
