"""The part of MoeExperts' function bodies that multiplies rows by a matrix of an expert, and adds its bias.

A product is written by `plain`, `wide` or `by_rows` here, or `by_nibbles` elsewhere, of result, inputs, name,
attributes, types and sizes: RESULT [rows, out] of INPUTS [rows, in] by what is stored of NAME_e, and NAME_bias_e.
"""

from __future__ import annotations

from collections.abc import Callable

from llmexport.plugins.moe_experts.decoding import matrix
from llmexport.plugins.spec import Attribute

Product = Callable[[str, str, str, dict[str, Attribute], dict[str, str], dict[str, int]], str]
# The least and the most rows of an expert that `by_rows` multiplies otherwise, by whether weights are [in, out].
FEW = {False: (4, 64), True: (2, 8)}
BLOCK_BYTES = 2**19  # of weights [in, out] in fp32: a core's cache holds them while the rows pass


def plain(
    result: str, inputs: str, name: str, attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]
) -> str:
    """In x's type."""
    stored = matrix(name, attributes, types, sizes)
    return f"""{stored}{_product(f"{result}_product", inputs, f"{name}_cast", attributes)}
          {biased(result, name, types)}"""


def wide(
    result: str, inputs: str, name: str, attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]
) -> str:
    """In fp32, rounded to x's type: ONNX Runtime's CPU has no other products, and would turn weights [out, in] in
    memory before it widens them."""
    return f"""{matrix(name, attributes, types, sizes)}
          {_widened(result, inputs, name)}{_product(f"{result}_wide", f"{result}_inputs", f"{name}_wide", attributes)}
          {result}_product = CastLike ({result}_wide, x)
          {biased(result, name, types)}"""


def by_rows(
    result: str, inputs: str, name: str, attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]
) -> str:
    """As `wide`, but if `is_few_e`, in a form that is faster for few rows: ONNX Runtime's CPU packs the second factor
    of several rows anew at each product, if it is no constant.

    Weights [out, in] are the first factor then. Those of [in, out] are read in blocks of rows; what a block multiplies
    is a column for each row of inputs, a product of a matrix and a vector, for which nothing is packed. The result is
    the sum over blocks.
    """
    few = (_blocks if attributes["transposed"] else _turned)(f"{result}_few", f"{result}_inputs", name, sizes)
    many = _product(f"{result}_many", f"{result}_inputs", f"{name}_wide", attributes)
    return f"""{matrix(name, attributes, types, sizes)}
          {_widened(result, inputs, name)}
          {result}_wide = If (is_few_e) <
            then_branch = few_{result} () => (float[] {result}_few) {{{few}
            }},
            else_branch = many_{result} () => (float[] {result}_many) {{{many}
            }}
          >
          {result}_product = CastLike ({result}_wide, x)
          {biased(result, name, types)}"""


def block_height(rows: int, columns: int) -> int:
    """How many rows of weights [in, out] are a block: the most that divide them and whose bytes a cache holds."""
    most = max(1, BLOCK_BYTES // (4 * columns))
    return next(n for n in range(min(most, rows), 0, -1) if rows % n == 0)


def _product(result: str, inputs: str, weights: str, attributes: dict[str, Attribute]) -> str:
    if attributes["transposed"]:
        return f"""
          {result} = MatMul ({inputs}, {weights})"""
    return f"""
          {result}_matrix = Transpose <perm = [1, 0]> ({weights})
          {result} = MatMul ({inputs}, {result}_matrix)"""


def _widened(result: str, inputs: str, name: str) -> str:
    return f"""{name}_wide = Cast <to = 1> ({name}_cast)
          {result}_inputs = Cast <to = 1> ({inputs})"""


def biased(result: str, name: str, types: dict[str, str]) -> str:
    """RESULT of RESULT_product."""
    made = f"{result}_product"
    return f"{result} = " + (f"Add ({made}, {name}_bias_e)" if f"{name}_bias" in types else f"Identity ({made})")


def _turned(result: str, inputs: str, name: str, sizes: dict[str, int]) -> str:
    return f"""
              {result}_inputs = Transpose <perm = [1, 0]> ({inputs})
              {result}_turned = MatMul ({name}_wide, {result}_inputs)
              {result} = Transpose <perm = [1, 0]> ({result}_turned)"""


def _blocks(result: str, inputs: str, name: str, sizes: dict[str, int]) -> str:
    rows, columns = (sizes[n] for n in ("PQ" if name == "gate_up" else "RS"))
    height = block_height(rows, columns)
    count = rows // height
    return f"""
              {result}_weights_shape = Constant <value_ints = [{count}, 1, {height}, {columns}]> ()
              {result}_weights = Reshape ({name}_wide, {result}_weights_shape)
              {result}_matrices = Transpose <perm = [0, 1, 3, 2]> ({result}_weights)
              {result}_inputs_shape = Constant <value_ints = [-1, {count}, {height}, 1]> ()
              {result}_parts = Reshape ({inputs}, {result}_inputs_shape)
              {result}_vectors = Transpose <perm = [1, 0, 2, 3]> ({result}_parts)
              {result}_outputs = MatMul ({result}_matrices, {result}_vectors)
              {result}_first = Constant <value_ints = [0]> ()
              {result}_sums = ReduceSum <keepdims = 0> ({result}_outputs, {result}_first)
              {result}_last = Constant <value_ints = [-1]> ()
              {result} = Squeeze ({result}_sums, {result}_last)"""
