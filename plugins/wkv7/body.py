"""The ONNX function body of Wkv7: a Scan over tokens, as KimiDeltaRule's."""

from __future__ import annotations

import math

from llmexport.plugins.scan import by_token
from llmexport.plugins.spec import Attribute

RATE = -math.exp(-0.5)  # the log of the fastest decay


def body(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> str:
    """Every tensor of the Scan is [T, B, H, ., .]; kappa before the state, r and v are columns, all others rows.

    ONNX Runtime before 1.24 wants the shapes of a Scan's outputs said.
    """
    h, d, v = (sizes[n] for n in "HDV")
    return f"""
    last = Constant <value_ints = [-1]> ()
    row = Constant <value_ints = [-2]> ()
    behind = Constant <value_ints = [2, 3]> ()
    zero = Constant <value_float = 0.0> ()
    rate = Constant <value_float = {RATE}> ()
    present_wide = Cast <to = 1> (present)
    present_here = Unsqueeze (present_wide, behind)
    is_padding = Equal (present_here, zero)
    w_wide = Cast <to = 1> (w)
    opened = Sigmoid (w_wide)
    decay_log_all = Mul (opened, rate)
    decay_log = Where (is_padding, zero, decay_log_all)
    decay_wide = Exp (decay_log)
    r_wide = Cast <to = 1> (r)
    v_wide = Cast <to = 1> (v)
    k_all = Cast <to = 1> (k)
    k_wide = Where (is_padding, zero, k_all)
    kappa_wide = Cast <to = 1> (kappa)
    a_wide = Cast <to = 1> (a)
    back_all = Mul (kappa_wide, a_wide)
    back_wide = Where (is_padding, zero, back_all)
    {by_token("r", "r_wide", "last")}
    {by_token("decay", "decay_wide", "row")}
    {by_token("k", "k_wide", "row")}
    {by_token("v", "v_wide", "last")}
    {by_token("kappa", "kappa_wide", "last")}
    {by_token("back", "back_wide", "row")}
    next_state, y_tokens = Scan <
      num_scan_inputs = 6,
      body = token (float[] s, float[] r_t, float[] decay_t, float[] k_t, float[] v_t, float[] kappa_t, float[] back_t)
        => (float[rows, {h}, {v}, {d}] s_next, float[rows, {h}, {v}, 1] y_t) {{
        known = MatMul (s, kappa_t)
        removed = MatMul (known, back_t)
        decayed = Mul (s, decay_t)
        kept = Sub (decayed, removed)
        added = MatMul (v_t, k_t)
        s_next = Add (kept, added)
        y_t = MatMul (s_next, r_t)
      }}
    > (state, r_by_token, decay_by_token, k_by_token, v_by_token, kappa_by_token, back_by_token)
    y_rows = Squeeze (y_tokens, last)
    y_wide = Transpose <perm = [1, 0, 2, 3]> (y_rows)
    y = CastLike (y_wide, v)"""
