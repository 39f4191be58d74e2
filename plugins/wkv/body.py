"""The ONNX function body of Wkv: a Scan over tokens."""

from __future__ import annotations

from llmexport.plugins.spec import Attribute

NOTHING = -1e38  # the maximum before the first token: exp of its difference to any other is 0


def body(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> str:
    """One body for TensorRT and ONNX Runtime, which before 1.24 wants the shapes of a Scan's outputs said."""
    c = sizes["C"]
    return f"""
    key_wide = Cast <to = 1> (key)
    value_wide = Cast <to = 1> (value)
    keys = Transpose <perm = [1, 0, 2]> (key_wide)
    values = Transpose <perm = [1, 0, 2]> (value_wide)
    first_keys = Add (keys, time_first)
    last = Constant <value_ints = [-1]> ()
    present_columns = Unsqueeze (present, last)
    present_rows = Transpose <perm = [1, 0, 2]> (present_columns)
    present_wide = Cast <to = 1> (present_rows)
    zero = Constant <value_float = 0.0> ()
    grown = Exp (time_decay)
    decay = Neg (grown)
    nothing = Constant <value_float = {NOTHING}> ()
    is_empty = Equal (denominator, zero)
    maximum_begin = Where (is_empty, nothing, maximum)
    numerator_begin = Where (is_empty, zero, numerator)
    next_numerator, next_denominator, next_maximum, ys = Scan <
      num_scan_inputs = 4,
      body = token (float[] n, float[] d, float[] m, float[] k, float[] k_first, float[] v, float[] p) => (
          float[rows, {c}] n_next, float[rows, {c}] d_next, float[rows, {c}] m_next, float[rows, {c}] y_t) {{
        {_added("read", "m", "k_first")}
        y_t = Div (read_n, read_d)
        m_decayed = Add (m, decay)
        {_added("after", "m_decayed", "k")}
        is_padding = Equal (p, zero)
        n_next = Where (is_padding, n, after_n)
        d_next = Where (is_padding, d, after_d)
        m_next = Where (is_padding, m, after_m)
      }}
    > (numerator_begin, denominator, maximum_begin, keys, first_keys, values, present_wide)
    y_wide = Transpose <perm = [1, 0, 2]> (ys)
    y = CastLike (y_wide, key)"""


def _added(name: str, most: str, exponent: str) -> str:
    """The states n and d, of this maximum, with a term of this exponent."""
    return f"""
        {name}_m = Max ({most}, {exponent})
        {name}_old_less = Sub ({most}, {name}_m)
        {name}_old = Exp ({name}_old_less)
        {name}_new_less = Sub ({exponent}, {name}_m)
        {name}_new = Exp ({name}_new_less)
        {name}_n_old = Mul ({name}_old, n)
        {name}_n_new = Mul ({name}_new, v)
        {name}_n = Add ({name}_n_old, {name}_n_new)
        {name}_d_old = Mul ({name}_old, d)
        {name}_d = Add ({name}_d_old, {name}_new)"""
