"""The part of MoeExperts' function body for ONNX Runtime that multiplies one row by numbers of 4 bits as they lie."""

from __future__ import annotations

from llmexport.plugins.moe_experts.decoding import factored, grouping, table, widened_scales
from llmexport.plugins.moe_experts.products import biased, wide
from llmexport.plugins.packed_formats import PACKED
from llmexport.plugins.spec import Attribute


def is_of_use(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> bool:
    """Whether `by_nibbles` is another form than `wide`, of one of the two matrices at least."""
    return any(_fits(name, attributes, types, sizes) for name in ("gate_up", "down"))


def nibble_values(attributes: dict[str, Attribute], types: dict[str, str]) -> str:
    """What `by_nibbles` reads besides, the same for all experts."""
    values = PACKED[str(attributes["format"])].by_byte("gate_up_zeros" in types).values()
    return f"""
    sum_first = Constant <value_ints = [0]> ()
    sum_second = Constant <value_ints = [1]> ()
    {table("nibble_values", *values)}"""


def by_nibbles(
    result: str, inputs: str, name: str, attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]
) -> str:
    """Of one row, in fp32: each byte of an expert's weights is looked up in a table of what its two numbers make with
    the two inputs that they multiply, and the sum of a group is scaled. No weight is made. As `wide` where a byte's
    numbers may have two scales, where groups do not fill rows, and in other types."""
    if not _fits(name, attributes, types, sizes):
        return wide(result, inputs, name, attributes, types, sizes)
    columns, group = grouping(name, attributes, sizes)
    groups, sums, scales = columns // group, f"{result}_sums", f"{name}_scales_turned"
    steps = [
        f"{result}_pairs_shape = Constant <value_ints = [{columns // 2}, 2]> ()",
        f"{result}_pairs = Reshape ({inputs}, {result}_pairs_shape)",
        f"{result}_lookup = MatMul ({result}_pairs, nibble_values)",
        f"{name}_turned = Transpose <perm = [1, 0]> ({name}_e)",
        f"{name}_places = Cast <to = 6> ({name}_turned)",
        f"{result}_terms = GatherElements <axis = 1> ({result}_lookup, {name}_places)",
        f"{result}_groups_shape = Constant <value_ints = [{groups}, {group // 2}, -1]> ()",
        f"{result}_groups = Reshape ({result}_terms, {result}_groups_shape)",
        f"{sums} = ReduceSum <keepdims = 0> ({result}_groups, sum_second)",
        f"{scales} = Transpose <perm = [1, 0]> ({name}_scales_e)",
    ]
    if f"{name}_zeros" in types:
        # A zero point counts as often as its group has inputs.
        steps += [
            f"{result}_inputs_shape = Constant <value_ints = [{groups}, {group}]> ()",
            f"{result}_inputs = Reshape ({inputs}, {result}_inputs_shape)",
            f"{result}_inputs_sum = ReduceSum <keepdims = 1> ({result}_inputs, sum_second)",
            f"{name}_zeros_turned = Transpose <perm = [1, 0]> ({name}_zeros_e)",
            f"{name}_zeros_wide = Cast <to = 1> ({name}_zeros_turned)",
            f"{result}_zeros = Mul ({name}_zeros_wide, {result}_inputs_sum)",
            f"{result}_centred = Sub ({sums}, {result}_zeros)",
        ]
        sums = f"{result}_centred"
    wider, scales = widened_scales(scales, name, [groups, -1], attributes)
    more, row = factored(f"{result}_column", name, 1, attributes, types)
    steps += [
        *wider,
        f"{result}_scaled = Mul ({sums}, {scales})",
        f"{result}_column = ReduceSum <keepdims = 0> ({result}_scaled, sum_first)",
        *more,
        f"{result}_product = Reshape ({row}, one_row)",
        biased(result, name, types),
    ]
    return "\n          ".join(steps)


def _fits(name: str, attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> bool:
    form, (columns, group) = PACKED.get(str(attributes["format"])), grouping(name, attributes, sizes)
    if types["x"] != "float32" or form is None or form.per_byte == 1:
        return False
    return group % 2 == 0 and columns % group == 0
