"""The ONNX function body of QkNormRope."""

from __future__ import annotations

import re

from llmexport.plugins.norm_body import rms_norm
from llmexport.plugins.spec import Attribute

LAST = 2**63 - 1


def body(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> str:
    """The operators that it stands for, so that ONNX Runtime computes the same nodes with it as without."""
    return step(attributes, types, sizes, "key", "value")


def step(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int], key: str, value: str) -> str:
    """What makes query, and `key` and `value` of the step's own tokens [B, G, T, D]."""
    wide = types["q"] != "float32"
    whole = 2 * sizes["R"] == sizes["D"]
    # As Rope's body: ONNX Runtime 1.23 wants the heads' number elsewhere, TensorRT-RTX 1.7 builds no interleaved one.
    standard = whole and not wide and not attributes["interleaved"]
    shared = "" if standard else _angles(wide)
    apart = "" if sizes["Q"] == sizes["D"] else "q_only = Slice (q, zero, head_size, last_axis, one)"
    heads = [_head(x, y, attributes, sizes, types, wide, standard) for x, y in (("q", "query"), ("k", key))]
    text = "\n".join([apart, shared, *heads, f"{value} = Transpose <perm = [0, 2, 1, 3]> (v)"])
    return f"{_constants(text, sizes)}\n{text}"


def _head(
    x: str,
    y: str,
    attributes: dict[str, Attribute],
    sizes: dict[str, int],
    types: dict[str, str],
    wide: bool,
    standard: bool,
) -> str:
    """What makes y of x."""
    weight = f"{x}_weight"
    normed = weight in types
    before, after = normed and attributes["norm_first"], normed and not attributes["norm_first"]
    given = "q_only" if x == "q" and sizes["Q"] != sizes["D"] else x
    source, turned = f"{x}_normed" if before else given, f"{y}_turned" if after else y
    turn = f"{turned} = RotaryEmbedding ({x}_heads, cos, sin)"
    steps = [
        rms_norm(given, weight, source, x, attributes, types) if before else "",
        f"{x}_heads = Transpose <perm = [0, 2, 1, 3]> ({source})",
        turn if standard else _turn(x, turned, sizes, wide, bool(attributes["interleaved"])),
        rms_norm(turned, weight, y, x, attributes, types) if after else "",
    ]
    return "\n".join(steps)


def _angles(wide: bool) -> str:
    """cos and sin for all heads."""
    cast = """cos_wide = Cast <to = 1> (cos)
    sin_wide = Cast <to = 1> (sin)"""
    cos, sin = ("cos_wide", "sin_wide") if wide else ("cos", "sin")
    return f"""{cast if wide else ""}
    c = Unsqueeze ({cos}, one)
    s = Unsqueeze ({sin}, one)"""


def _constants(text: str, sizes: dict[str, int]) -> str:
    """Those that the text reads."""
    rotated = 2 * sizes["R"]
    values = {"minus_one": -1, "zero": 0, "one": 1, "two": 2, "last_axis": 3, "end": LAST, "rotated": rotated}
    values["head_size"] = sizes["D"]
    constants = {n: [v] for n, v in values.items()} | {"shape": [0, 0, 0, rotated]}
    read = {n: v for n, v in constants.items() if re.search(rf"[(,] ?{n}\b", text)}
    return "\n".join(f"{n} = Constant <value_ints = {v}> ()" for n, v in read.items())


def _turn(x: str, target: str, sizes: dict[str, int], wide: bool, interleaved: bool) -> str:
    """Turns {x}_heads; what is beyond the rotated part keeps its bits."""
    whole = 2 * sizes["R"] == sizes["D"]
    heads = f"{x}_heads"
    part = heads if whole else f"{x}_part"
    pairs = f"{x}_wide" if wide else part
    turned = target if whole else f"{x}_rotated"
    fp32 = f"{x}_fp32" if wide else turned
    halves = f"{x}_first, {x}_second = Split <axis = -1, num_outputs = 2> ({pairs})"
    strided = f"""{x}_first = Slice ({pairs}, zero, end, last_axis, two)
    {x}_second = Slice ({pairs}, one, end, last_axis, two)"""
    beside = f"""{x}_evens = Unsqueeze ({x}_cosine, minus_one)
    {x}_odds = Unsqueeze ({x}_sine, minus_one)
    {x}_stack = Concat <axis = -1> ({x}_evens, {x}_odds)
    {fp32} = Reshape ({x}_stack, shape)"""
    return f"""
    {"" if whole else f"{part} = Slice ({heads}, zero, rotated, last_axis, one)"}
    {f"{pairs} = Cast <to = 1> ({part})" if wide else ""}
    {strided if interleaved else halves}
    {x}_first_c = Mul ({x}_first, c)
    {x}_second_s = Mul ({x}_second, s)
    {x}_cosine = Sub ({x}_first_c, {x}_second_s)
    {x}_second_c = Mul ({x}_second, c)
    {x}_first_s = Mul ({x}_first, s)
    {x}_sine = Add ({x}_second_c, {x}_first_s)
    {beside if interleaved else f"{fp32} = Concat <axis = -1> ({x}_cosine, {x}_sine)"}
    {f"{turned} = CastLike ({fp32}, {x})" if wide else ""}
    {"" if whole else f"{x}_rest = Slice ({heads}, rotated, end, last_axis, one)"}
    {"" if whole else f"{target} = Concat <axis = -1> ({turned}, {x}_rest)"}"""
