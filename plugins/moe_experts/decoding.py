"""The part of MoeExperts' function bodies that makes an expert's weights of what is stored of it."""

from __future__ import annotations

import math
from collections.abc import Collection

from llmexport.plugins.packed_formats import PACKED, Format
from llmexport.plugins.spec import Attribute


def tables(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> str:
    """values: that of each byte, or low_values and high_values: those of its nibbles; scale_values: what a byte of
    scales means."""
    form, group = PACKED[str(attributes["format"])], int(attributes["group"])
    steps = ["two = Constant <value_ints = [2]> ()", "in_a_row = Constant <value_ints = [1, -1]> ()"]
    steps += [table(name, values) for name, values in of_bytes(form, "gate_up_zeros" in types).items()]
    if form.scales:
        # 2^128 is no fp32.
        steps.append(table("scale_values", tuple(math.inf if v == 2.0**128 else v for v in form.scales)))
    for name, columns in _columns(sizes).items():
        if columns % min(group, columns):
            at = ", ".join(str(c // group) for c in range(columns))
            steps.append(f"{name}_group_of_column = Constant <value_ints = [{at}]> ()")
    return "\n    ".join(steps)


def pairs(attributes: dict[str, Attribute], types: dict[str, str]) -> str:
    """pair_values: what nibbles mean, the low ones' and the high ones'; leading: the first axis."""
    form = PACKED.get(str(attributes["format"]))
    if form is None or form.per_byte == 1:
        return ""
    return f"""
    leading = Constant <value_ints = [0]> ()
    {table("pair_values", *of_bytes(form, "gate_up_zeros" in types).values())}"""


def of_bytes(form: Format, zeros: bool) -> dict[str, tuple[float, ...]]:
    """What each byte holds, by the name of its table."""
    values = form.values_with(zeros)
    if form.per_byte == 1:
        return {"values": values}
    pairs = [(values[byte % 16], values[byte // 16]) for byte in range(256)]
    return dict(zip(("low_values", "high_values"), zip(*pairs, strict=True), strict=True))


def table(name: str, *rows: tuple[float, ...]) -> str:
    """NAME [rows, 256], which `looked_up` reads."""
    values = ", ".join(str(v) for row in rows for v in row)
    return f"{name} = Constant <value = float[{len(rows)}, 256] {{{values}}}> ()"


def looked_up(made: str, bytes: str, tables: Collection[str]) -> list[str]:
    """MADE [1, n] of the bytes, by a table of one row; by several, all of the first's, then all of the second's.

    Of GatherElements ONNX Runtime copies a number in a tenth of the time that Gather takes for it.
    """
    flat, places = f"{made}_flat", f"{made}_places"
    steps = [f"{flat} = Reshape ({bytes}, in_a_row)", f"{places} = Cast <to = 6> ({flat})"]
    parts = {f"{made}_by_{t}" if len(tables) > 1 else made: t for t in tables}
    steps += [f"{part} = GatherElements <axis = 1> ({t}, {places})" for part, t in parts.items()]
    return steps + ([f"{made} = Concat <axis = 0> ({', '.join(parts)})"] if len(parts) > 1 else [])


def matrix(name: str, attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> str:
    """NAME_cast, the weight of expert e in x's type, rows and columns as they are stored, of NAME_e and what else there
    is of it."""
    if attributes["format"] not in PACKED:
        return f"{name}_cast = CastLike ({name}_e, x)"
    return f"""{_decoded(name, attributes, types, sizes)}
          {name}_cast = CastLike ({name}_stored, x)"""


def _decoded(name: str, attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> str:
    """The weight of expert e in fp32, [rows, columns]."""
    form, columns = PACKED[str(attributes["format"])], _columns(sizes)[name]
    group = min(int(attributes["group"]), columns)
    # Groups are a dimension where they fill a row; else what they share is laid out column by column.
    whole = columns % group == 0

    def of_groups(what: str) -> str:
        return f"Unsqueeze ({what}, two)" if whole else f"Gather <axis = 1> ({what}, {name}_group_of_column)"

    by_byte = of_bytes(form, False)
    steps = [
        *looked_up(f"{name}_values", f"{name}_e", by_byte),
        # Nibbles lie side by side.
        f"{name}_in_order = {'Transpose <perm = [1, 0]>' if len(by_byte) > 1 else 'Identity'} ({name}_values)",
        f"{name}_groups_shape = Constant <value_ints = {[-1, columns // group, group] if whole else [-1, columns]}> ()",
        f"{name}_groups = Reshape ({name}_in_order, {name}_groups_shape)",
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
    scales = widened_scales(scales, name, [-1, -(-columns // group)], attributes, steps)
    steps += [
        f"{name}_scales_spread = {of_groups(scales)}",
        f"{weights} = Mul ({codes}, {name}_scales_spread)",
    ]
    weights = factored(weights, name, columns, attributes, types, steps)
    steps += [
        f"{name}_rows_shape = Constant <value_ints = [-1, {columns}]> ()",
        f"{name}_stored = Reshape ({weights}, {name}_rows_shape)",
    ]
    return "\n          ".join(steps)


def widened_scales(scales: str, name: str, shape: list[int], attributes: dict[str, Attribute], steps: list[str]) -> str:
    """The name of NAME's `scales` of this shape in fp32, whose steps are added, if they are stored otherwise."""
    if not PACKED[str(attributes["format"])].scales:
        return scales
    steps += [
        *looked_up(f"{name}_scales_values", scales, ["scale_values"]),
        f"{name}_scales_shape = Constant <value_ints = {shape}> ()",
        f"{name}_scales_wide = Reshape ({name}_scales_values, {name}_scales_shape)",
    ]
    return f"{name}_scales_wide"


def factored(
    values: str, name: str, columns: int, attributes: dict[str, Attribute], types: dict[str, str], steps: list[str]
) -> str:
    """The name of `values` [rows, columns] times the factors of NAME's parts, whose steps are added, if it has any."""
    if f"{name}_factors" not in types:
        return values
    # Rows of gate and of up are halves, or alternate.
    parts = 2 if name == "gate_up" else 1
    shape = [-1, parts, columns] if attributes["interleaved"] else [parts, -1]
    steps += [
        f"{name}_factor_shape = Constant <value_ints = [{parts}, 1]> ()",
        f"{name}_factor = Reshape ({name}_factors_e, {name}_factor_shape)",
        f"{name}_parts_shape = Constant <value_ints = {shape}> ()",
        f"{name}_parts = Reshape ({values}, {name}_parts_shape)",
        f"{name}_weights = Mul ({name}_parts, {name}_factor)",
    ]
    return f"{name}_weights"


def has_pairs(name: str, attributes: dict[str, Attribute], sizes: dict[str, int]) -> bool:
    """Whether a byte holds two numbers of NAME that share a scale, and rows are whole groups."""
    form, columns = PACKED.get(str(attributes["format"])), _columns(sizes)[name]
    group = min(int(attributes["group"]), columns)
    return form is not None and form.per_byte == 2 and group % 2 == 0 and columns % group == 0


def _columns(sizes: dict[str, int]) -> dict[str, int]:
    return {"gate_up": sizes["C"], "down": sizes["P"] // 2}
