"""The ONNX function body of KimiDeltaRule: a Scan over tokens.

A decay of each channel leaves no product of keys that two tokens share: chunks, as GatedDeltaRule's body has them,
would hold a decay for every two tokens of each channel.
"""

from __future__ import annotations

from llmexport.plugins.gated_delta_rule.body import inputs
from llmexport.plugins.scan import by_token
from llmexport.plugins.spec import Attribute


def body(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> str:
    """Every tensor of the Scan is [T, B, H, ., .]; q, and k before the state, are rows, decays and k after it columns.

    ONNX Runtime before 1.24 wants the shapes of a Scan's outputs said.
    """
    h, d, v = (sizes[n] for n in "HDV")
    return f"""
    last = Constant <value_ints = [-1]> ()
    row = Constant <value_ints = [-2]> ()
    {inputs(attributes)}
    decay = Exp (g)
    beta_column = Unsqueeze (beta_wide, last)
    {by_token("q", "q_scaled", "row")}
    {by_token("k", "k_unit", "row")}
    {by_token("k_column", "k_unit", "last")}
    {by_token("v", "v_wide", "row")}
    {by_token("decay", "decay", "last")}
    {by_token("beta", "beta_column", "last")}
    next_state, y_tokens = Scan <
      num_scan_inputs = 6,
      body = token (float[] s, float[] q_t, float[] k_t, float[] k_c, float[] v_t, float[] decay_t, float[] beta_t) => (
          float[rows, {h}, {d}, {v}] s_next, float[rows, {h}, 1, {v}] y_t) {{
        s_kept = Mul (s, decay_t)
        known = MatMul (k_t, s_kept)
        missed = Sub (v_t, known)
        wanted = Mul (missed, beta_t)
        added = MatMul (k_c, wanted)
        s_next = Add (s_kept, added)
        y_t = MatMul (q_t, s_next)
      }}
    > (state, q_by_token, k_by_token, k_column_by_token, v_by_token, decay_by_token, beta_by_token)
    y_rows = Squeeze (y_tokens, row)
    y_wide = Transpose <perm = [1, 0, 2, 3]> (y_rows)
    y = CastLike (y_wide, v)"""
