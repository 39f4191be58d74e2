"""Numbers of 4-bit floats (E2M1) with a scale for each block of a row, as a function."""

from __future__ import annotations

import functools

import onnx
import onnx.parser
from onnx import TensorProto
from onnx.helper import make_node

from llmexport.plugins.microscaling import VALUES

DOMAIN, NAME = "llmexport.packed", "DequantizeFp4"


@functools.cache
def function(opset: int) -> onnx.FunctionProto:
    """y [N, C] of numbers uint8 [N, C / 2], the first of two in the low half, and scales [N, blocks] of y's type.

    ONNX Runtime's CPU has no DequantizeLinear of this type. It folds the function when it loads a model.
    """
    table = ", ".join(map(str, VALUES))
    return onnx.parser.parse_function(
        f"""<domain: "{DOMAIN}", opset_import: ["" : {opset}]> {NAME} <block_size> (numbers, scales) => (y) {{
            mask = Constant <value = uint8 {{15}}> ()
            half = Constant <value = uint8 {{4}}> ()
            last = Constant <value_ints: ints = [-1]> ()
            table_wide = Constant <value = float[16] {{{table}}}> ()
            table = CastLike (table_wide, scales)
            low = BitwiseAnd (numbers, mask)
            high = BitShift <direction: string = "RIGHT"> (numbers, half)
            low_apart = Unsqueeze (low, last)
            high_apart = Unsqueeze (high, last)
            both = Concat <axis: int = -1> (low_apart, high_apart)
            places = Cast <to: int = {TensorProto.INT32}> (both)
            values = Gather (table, places)
            blocks = Shape (scales)
            size = Constant <value_ints: ints = @block_size> ()
            by_block = Concat <axis: int = 0> (blocks, size)
            grouped = Reshape (values, by_block)
            scales_apart = Unsqueeze (scales, last)
            scaled = Mul (grouped, scales_apart)
            rows = Shape <end: int = 1> (scales)
            whole = Concat <axis: int = 0> (rows, last)
            y = Reshape (scaled, whole)
        }}"""
    )


def node(numbers: str, scales: str, value: str, block_size: int) -> onnx.NodeProto:
    return make_node(NAME, [numbers, scales], [value], value, domain=DOMAIN, block_size=[block_size])


def attach(model: onnx.ModelProto) -> None:
    """Gives a model whose nodes call the function the function."""
    if not any(n.domain == DOMAIN for n in model.graph.node):
        return
    opset = next(o.version for o in model.opset_import if not o.domain)
    model.functions.append(function(opset))
    model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
