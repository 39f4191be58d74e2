"""The part of MoeExperts' function bodies that multiplies rows by a matrix of an expert, and adds its bias.

A product is written by `plain`, `wide`, `by_rows` or `by_table` of result, inputs, name, attributes, types and sizes:
RESULT [rows, out] of INPUTS [rows, in] by what is stored of NAME_e, and NAME_bias_e.
"""

from __future__ import annotations

from collections.abc import Callable

from llmexport.plugins.moe_experts.decoding import factored, has_pairs, matrix, widened_scales
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
          {_biased(result, name, types)}"""


def wide(
    result: str, inputs: str, name: str, attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]
) -> str:
    """In fp32, rounded to x's type: ONNX Runtime's CPU has no other products, and would turn weights [out, in] in
    memory before it widens them."""
    return f"""{matrix(name, attributes, types, sizes)}
          {_widened(result, inputs, name)}{_product(f"{result}_wide", f"{result}_inputs", f"{name}_wide", attributes)}
          {result}_product = CastLike ({result}_wide, x)
          {_biased(result, name, types)}"""


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
          {_biased(result, name, types)}"""


def by_table(
    result: str, inputs: str, name: str, attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]
) -> str:
    """Of one row, in fp32, without making the weights of it: each byte of nibbles is looked up in a table of what its
    two numbers make with the two inputs that they multiply, and the sum of a group is scaled. As `wide` where that
    does not do."""
    if not _by_table(name, attributes, types, sizes):
        return wide(result, inputs, name, attributes, types, sizes)
    columns = sizes["C"] if name == "gate_up" else sizes["P"] // 2
    group = min(int(attributes["group"]), columns)
    groups, sums, scales = columns // group, f"{result}_sums", f"{name}_scales_turned"
    steps = [
        f"{result}_pairs_shape = Constant <value_ints = [{columns // 2}, 2]> ()",
        f"{result}_pairs = Reshape ({inputs}, {result}_pairs_shape)",
        f"{result}_table = MatMul ({result}_pairs, pair_values)",
        f"{name}_turned = Transpose <perm = [1, 0]> ({name}_e)",
        f"{name}_places = Cast <to = 6> ({name}_turned)",
        f"{result}_looked_up = GatherElements <axis = 1> ({result}_table, {name}_places)",
        f"{result}_groups_shape = Constant <value_ints = [{groups}, {group // 2}, -1]> ()",
        f"{result}_groups = Reshape ({result}_looked_up, {result}_groups_shape)",
        f"{sums} = ReduceSum <keepdims = 0> ({result}_groups, one)",
        f"{scales} = Transpose <perm = [1, 0]> ({name}_scales_e)",
    ]
    if f"{name}_zeros" in types:
        # A zero point counts as often as its group has inputs.
        steps += [
            f"{result}_inputs_shape = Constant <value_ints = [{groups}, {group}]> ()",
            f"{result}_inputs = Reshape ({inputs}, {result}_inputs_shape)",
            f"{result}_inputs_sum = ReduceSum <keepdims = 1> ({result}_inputs, one)",
            f"{name}_zeros_turned = Transpose <perm = [1, 0]> ({name}_zeros_e)",
            f"{name}_zeros_wide = Cast <to = 1> ({name}_zeros_turned)",
            f"{result}_zeros = Mul ({name}_zeros_wide, {result}_inputs_sum)",
            f"{result}_centred = Sub ({sums}, {result}_zeros)",
        ]
        sums = f"{result}_centred"
    scales = widened_scales(scales, name, [groups, -1], attributes, steps)
    steps += [
        f"{result}_scaled = Mul ({sums}, {scales})",
        f"{result}_column = ReduceSum <keepdims = 0> ({result}_scaled, leading)",
    ]
    row = factored(f"{result}_column", name, 1, attributes, types, steps)
    steps += [f"{result}_product = Reshape ({row}, in_a_row)", _biased(result, name, types)]
    return "\n          ".join(steps)


def uses_tables(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> bool:
    """Whether `by_table` is another form than `wide`."""
    return any(_by_table(name, attributes, types, sizes) for name in ("gate_up", "down"))


def _by_table(name: str, attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> bool:
    return types["x"] == "float32" and has_pairs(name, attributes, sizes)


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


def _biased(result: str, name: str, types: dict[str, str]) -> str:
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
