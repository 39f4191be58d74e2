"""The part of MoeExperts' function bodies that computes one expert."""

from __future__ import annotations

from llmexport.plugins.moe_experts.decoding import tables
from llmexport.plugins.moe_experts.formats import check
from llmexport.plugins.moe_experts.products import Product
from llmexport.plugins.packed_formats import PACKED
from llmexport.plugins.spec import Attribute

GATED = {
    "silu": """
          sigmoid = Sigmoid (gate_wide)
          gate_active = Mul (gate_wide, sigmoid)
          gated = Mul (gate_active, up_wide)""",
    "gelu_tanh": """
          gate_active = Gelu <approximate = "tanh"> (gate_wide)
          gated = Mul (gate_active, up_wide)""",
    "gelu_erf": """
          gate_active = Gelu <approximate = "none"> (gate_wide)
          gated = Mul (gate_active, up_wide)""",
    "swiglu_clamped": """
          gate_low = Min (gate_wide, limit)
          up_low = Min (up_wide, limit)
          limit_below = Neg (limit)
          up_clamped = Max (up_low, limit_below)
          gate_steep = Mul (gate_low, alpha)
          sigmoid = Sigmoid (gate_steep)
          gate_active = Mul (gate_low, sigmoid)
          up_one = Add (up_clamped, float_one)
          gated = Mul (gate_active, up_one)""",
}
SHARED = ("x", "weights", "experts")  # the inputs that are not a row for each expert


def check_body(attributes: dict[str, Attribute], types: dict[str, str]) -> None:
    """Raises ValueError on what no body is written for."""
    if attributes["activation"] not in GATED:
        raise ValueError(f"GatedAct knows no activation {attributes['activation']!r}")
    check(str(attributes["format"]), int(attributes["group"]), bool(attributes["transposed"]), types)


def constants(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> str:
    """What `mlp` reads besides, the same for all experts."""
    steps = """
    number_zero = Constant <value_int = 0> ()
    number_one = Constant <value_int = 1> ()"""
    if attributes["activation"] == "swiglu_clamped":
        steps += f"""
    alpha = Constant <value_float = {attributes["alpha"]}> ()
    limit = Constant <value_float = {attributes["limit"]}> ()
    float_one = Constant <value_float = 1.0> ()"""
    if attributes["format"] in PACKED:
        steps += f"""
    {tables(attributes, types, sizes)}"""
    return steps


def mlp(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int], product: Product) -> str:
    """Makes `result` [rows, C] of `inputs` [rows, C] by the weights NAME_e of an expert, NAME an input of the op."""
    two_halves = sizes["Q"] if attributes["transposed"] else sizes["P"]
    if attributes["interleaved"]:
        split = f"""
          pairs_shape = Constant <value_ints = [-1, {two_halves // 2}, 2]> ()
          pairs = Reshape (both, pairs_shape)
          gate = Gather <axis = 2> (pairs, number_zero)
          up = Gather <axis = 2> (pairs, number_one)"""
    else:
        split = """
          gate, up = Split <axis = -1, num_outputs = 2> (both)"""
    given = (attributes, types, sizes)
    return f"""
          {product("both", "inputs", "gate_up", *given)}{split}
          gate_wide = Cast <to = 1> (gate)
          up_wide = Cast <to = 1> (up){GATED[str(attributes["activation"])]}
          gated_rounded = CastLike (gated, x)
          {product("result", "gated_rounded", "down", *given)}"""
