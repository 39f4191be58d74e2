"""The part of MoeExperts' function bodies that makes an expert's weights of what is stored of it."""

from __future__ import annotations

from llmexport.plugins.packed_formats import PACKED
from llmexport.plugins.spec import Attribute


def tables(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> str:
    """values: those in a byte, the low nibble first; scale_values: what a byte of scales means."""
    form, group = PACKED[str(attributes["format"])], int(attributes["group"])
    values = form.values_with("gate_up_zeros" in types)
    if form.per_byte == 2:
        values = tuple(v for byte in range(256) for v in (values[byte % 16], values[byte // 16]))
    steps = [
        "two = Constant <value_ints = [2]> ()",
        f"values = Constant <value = float[256, {form.per_byte}] {{{', '.join(map(str, values))}}}> ()",
    ]
    if form.scales:
        # 2^128 is no fp32.
        scales = ", ".join("inf" if v == 2.0**128 else str(v) for v in form.scales)
        steps.append(f"scale_values = Constant <value = float[256] {{{scales}}}> ()")
    for name, columns in _columns(sizes).items():
        if columns % min(group, columns):
            at = ", ".join(str(c // group) for c in range(columns))
            steps.append(f"{name}_group_of_column = Constant <value_ints = [{at}]> ()")
    return "\n    ".join(steps)


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

    steps = [
        f"{name}_bytes = Cast <to = 6> ({name}_e)",
        f"{name}_values = Gather <axis = 0> (values, {name}_bytes)",
        f"{name}_groups_shape = Constant <value_ints = {[0, -1, group] if whole else [0, -1]}> ()",
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
    if form.scales:
        steps += [
            f"{name}_scales_bytes = Cast <to = 6> ({scales})",
            f"{name}_scales_wide = Gather <axis = 0> (scale_values, {name}_scales_bytes)",
        ]
        scales = f"{name}_scales_wide"
    steps += [
        f"{name}_scales_spread = {of_groups(scales)}",
        f"{weights} = Mul ({codes}, {name}_scales_spread)",
    ]
    if f"{name}_factors" in types:
        # Rows of gate and of up are halves, or alternate.
        parts = 2 if name == "gate_up" else 1
        steps += [
            f"{name}_factor_shape = Constant <value_ints = [{parts}, 1]> ()",
            f"{name}_factor = Reshape ({name}_factors_e, {name}_factor_shape)",
            f"{name}_parts_shape = Constant <value_ints = "
            f"{[-1, parts, columns] if attributes['interleaved'] else [parts, -1]}> ()",
            f"{name}_parts = Reshape ({weights}, {name}_parts_shape)",
            f"{name}_weights = Mul ({name}_parts, {name}_factor)",
        ]
        weights = f"{name}_weights"
    steps += [
        f"{name}_rows_shape = Constant <value_ints = [-1, {columns}]> ()",
        f"{name}_stored = Reshape ({weights}, {name}_rows_shape)",
    ]
    return "\n          ".join(steps)


def _columns(sizes: dict[str, int]) -> dict[str, int]:
    return {"gate_up": sizes["C"], "down": sizes["P"] // 2}
