"""ONNX function bodies of CausalConv1d, and the parts of them that others have too."""

from __future__ import annotations

from llmexport.plugins.spec import Attribute

LAST = 2**63 - 1


def by_operator(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> str | None:
    """The body for ONNX Runtime alone: of float32 its own CausalConvWithState, which rounds other types otherwise."""
    if types["x"] != "float32":
        return None
    bias = "bias" if "bias" in types else ""
    given = f'channels_last = 1, activation = "{attributes["activation"]}"'
    return f"""
    y, state_after_all = com.microsoft.CausalConvWithState <{given}> (x, weight, {bias}, state)
    seen = Concat <axis = 1> (state, x)
    {last_seen("next_state", sizes)}"""


def last_seen(target: str, sizes: dict[str, int]) -> str:
    """Makes `target`, the inputs before token `end`, of `seen`, the state and the inputs behind it."""
    kept, channels = sizes["S"], sizes["C"]
    return f"""
    end_wide = Cast <to = 7> (end)
    column = Constant <value_ints = [-1, 1, 1]> ()
    first = Reshape (end_wide, column)
    offsets = Constant <value = int64[{kept}, 1] {{{", ".join(map(str, range(kept)))}}}> ()
    place = Add (first, offsets)
    shape = Constant <value_ints = [1, {kept}, {channels}]> ()
    places = Expand (place, shape)
    {target} = GatherElements <axis = 1> (seen, places)"""


def convolved(x: str, weight: str, target: str, sizes: dict[str, int]) -> str:
    """Makes `target` of `seen`, with SiLU, in the type of `x`: each tap's products with a slice of it."""
    taps = sizes["K"]
    ends = [i - sizes["S"] or LAST for i in range(taps)]
    slices = [
        f"""from_{i} = Constant <value_ints = [{i}]> ()
    to_{i} = Constant <value_ints = [{end}]> ()
    beyond_{i} = Constant <value_ints = [{i + 1}]> ()
    seen_{i} = Slice (seen_wide, from_{i}, to_{i}, of_tokens)
    tap_{i} = Slice (taps_wide, from_{i}, beyond_{i}, of_tokens)
    product_{i} = Mul (seen_{i}, tap_{i})"""
        for i, end in enumerate(ends)
    ]
    sums = [f"sum_{i} = Add ({'product_0' if i == 1 else f'sum_{i - 1}'}, product_{i})" for i in range(1, taps)]
    lines = "\n".join([*slices, *sums])
    return f"""
    of_tokens = Constant <value_ints = [1]> ()
    seen_wide = Cast <to = 1> (seen)
    taps = Transpose <perm = [1, 2, 0]> ({weight})
    taps_wide = Cast <to = 1> (taps)
    {lines}
    sum_rounded = CastLike (sum_{taps - 1}, {x})
    sum_wide = Cast <to = 1> (sum_rounded)
    sum_sigmoid = Sigmoid (sum_wide)
    silu = Mul (sum_wide, sum_sigmoid)
    {target} = CastLike (silu, {x})"""
