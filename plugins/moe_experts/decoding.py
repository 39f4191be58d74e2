"""The part of MoeExperts' function bodies that makes an expert's weights of what is stored of it."""

from __future__ import annotations

import math

from llmexport.plugins.packed_formats import PACKED
from llmexport.plugins.spec import Attribute


def tables(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> str:
    """values: that of each byte, or low_values and high_values: those of its nibbles; scale_values: what a byte of
    scales means."""
    form = PACKED[str(attributes["format"])]
    steps = ["two = Constant <value_ints = [2]> ()", "one_row = Constant <value_ints = [1, -1]> ()"]
    steps += [table(name, values) for name, values in form.by_byte("gate_up_zeros" in types).items()]
    if form.scales:
        # 2^128 is no fp32.
        steps.append(table("scale_values", tuple(math.inf if v == 2.0**128 else v for v in form.scales)))
    for name in ("gate_up", "down"):
        columns, group = grouping(name, attributes, sizes)
        if columns % group:
            at = ", ".join(str(c // group) for c in range(columns))
            steps.append(f"{name}_group_of_column = Constant <value_ints = [{at}]> ()")
    return "\n    ".join(steps)


def table(name: str, *rows: tuple[float, ...]) -> str:
    """NAME [rows, 256], which `looked_up` reads."""
    values = ", ".join(str(v) for row in rows for v in row)
    return f"{name} = Constant <value = float[{len(rows)}, 256] {{{values}}}> ()"


def looked_up(made: str, stored: str, *names: str) -> list[str]:
    """MADE of the bytes stored, by a table of one row [1, n]; by those of two nibbles side by side [n, 2].

    Of GatherElements ONNX Runtime copies a number in a tenth of the time that Gather takes for it.
    """
    flat, places = f"{made}_flat", f"{made}_places"
    steps = [f"{flat} = Reshape ({stored}, one_row)", f"{places} = Cast <to = 6> ({flat})"]
    if len(names) == 1:
        return [*steps, f"{made} = GatherElements <axis = 1> ({names[0]}, {places})"]
    parts = {f"{made}_{n}": n for n in names}
    return [
        *steps,
        *(f"{part} = GatherElements <axis = 1> ({n}, {places})" for part, n in parts.items()),
        f"{made}_apart = Concat <axis = 0> ({', '.join(parts)})",
        f"{made} = Transpose <perm = [1, 0]> ({made}_apart)",
    ]


def matrix(name: str, attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> str:
    """NAME_cast, the weight of expert e in x's type, rows and columns as they are stored, of NAME_e and what else there
    is of it."""
    if attributes["format"] not in PACKED:
        return f"{name}_cast = CastLike ({name}_e, x)"
    return f"""{_decoded(name, attributes, types, sizes)}
          {name}_cast = CastLike ({name}_stored, x)"""


def _decoded(name: str, attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> str:
    """The weight of expert e in fp32, [rows, columns]."""
    form, (columns, group) = PACKED[str(attributes["format"])], grouping(name, attributes, sizes)
    # Groups are a dimension where they fill a row; else what they share is laid out column by column.
    whole = columns % group == 0

    def of_groups(what: str) -> str:
        return f"Unsqueeze ({what}, two)" if whole else f"Gather <axis = 1> ({what}, {name}_group_of_column)"

    steps = [
        *looked_up(f"{name}_values", f"{name}_e", *form.by_byte()),
        f"{name}_groups_shape = Constant <value_ints = {[-1, columns // group, group] if whole else [-1, columns]}> ()",
        f"{name}_groups = Reshape ({name}_values, {name}_groups_shape)",
    ]
    codes, scales, weights = f"{name}_groups", f"{name}_scales_e", f"{name}_scaled"
    if f"{name}_zeros" in types:
        steps += [
            f"{name}_zeros_bytes = Cast <to = 6> ({name}_zeros_e)",
            f"{name}_zeros_wide = Cast <to = 1> ({name}_zeros_bytes)",
            f"{name}_zeros_spread = {of_groups(f'{name}_zeros_wide')}",
            f"{name}_centred = Sub ({codes}, {name}_zeros_spread)",
        ]
        codes = f"{name}_centred"
    wider, scales = widened_scales(scales, name, [-1, -(-columns // group)], attributes)
    steps += [
        *wider,
        f"{name}_scales_spread = {of_groups(scales)}",
        f"{weights} = Mul ({codes}, {name}_scales_spread)",
    ]
    more, weights = factored(weights, name, columns, attributes, types)
    steps += [
        *more,
        f"{name}_rows_shape = Constant <value_ints = [-1, {columns}]> ()",
        f"{name}_stored = Reshape ({weights}, {name}_rows_shape)",
    ]
    return "\n          ".join(steps)


def widened_scales(scales: str, name: str, shape: list[int], attributes: dict[str, Attribute]) -> tuple[list[str], str]:
    """What makes NAME's `scales` fp32 of this shape, if they are stored otherwise, and what they are called then."""
    if not PACKED[str(attributes["format"])].scales:
        return [], scales
    steps = [
        *looked_up(f"{name}_scales_values", scales, "scale_values"),
        f"{name}_scales_shape = Constant <value_ints = {shape}> ()",
        f"{name}_scales_wide = Reshape ({name}_scales_values, {name}_scales_shape)",
    ]
    return steps, f"{name}_scales_wide"


def factored(
    values: str, name: str, columns: int, attributes: dict[str, Attribute], types: dict[str, str]
) -> tuple[list[str], str]:
    """What multiplies `values` [rows, columns] with the factors of NAME's parts, if it has any, and what they are
    called then."""
    if f"{name}_factors" not in types:
        return [], values
    # Rows of gate and of up are halves, or alternate.
    parts = 2 if name == "gate_up" else 1
    shape = [-1, parts, columns] if attributes["interleaved"] else [parts, -1]
    steps = [
        f"{name}_factor_shape = Constant <value_ints = [{parts}, 1]> ()",
        f"{name}_factor = Reshape ({name}_factors_e, {name}_factor_shape)",
        f"{name}_parts_shape = Constant <value_ints = {shape}> ()",
        f"{name}_parts = Reshape ({values}, {name}_parts_shape)",
        f"{name}_weights = Mul ({name}_parts, {name}_factor)",
    ]
    return steps, f"{name}_weights"


def grouping(name: str, attributes: dict[str, Attribute], sizes: dict[str, int]) -> tuple[int, int]:
    """The columns of NAME, and how many of them share a scale."""
    columns = sizes["C"] if name == "gate_up" else sizes["P"] // 2
    return columns, min(int(attributes["group"]), columns)
