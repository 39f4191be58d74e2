"""The ONNX function body of GatedDeltaNet: that of GatedDeltaRule between a convolution, gates and a gated norm."""

from __future__ import annotations

from llmexport.plugins.causal_conv1d.body import convolved, last_seen
from llmexport.plugins.gated_delta_rule.body import body as rule
from llmexport.plugins.spec import Attribute

LINEAR_FROM = 20.0  # above it softplus(x) is x, as in torch


def body(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> str:
    h, d, v = (sizes[n] for n in "HDV")
    keys = (sizes["C"] - h * v) // 2
    return f"""
    seen = Concat <axis = 1> (conv_state, mixed)
    {convolved("mixed", "conv_weight", "convolved", sizes)}
    {last_seen("next_conv_state", sizes)}
    parts = Constant <value_ints = [{keys}, {keys}, {h * v}]> ()
    q_flat, k_flat, v_flat = Split <axis = -1> (convolved, parts)
    key_heads = Constant <value_ints = [0, 0, {keys // d}, {d}]> ()
    value_heads = Constant <value_ints = [0, 0, {h}, {v}]> ()
    q = Reshape (q_flat, key_heads)
    k = Reshape (k_flat, key_heads)
    v = Reshape (v_flat, value_heads)
    {_gates()}
    {rule(attributes, types, sizes | {"G": keys // d})}
    {_norm(attributes)}"""


def _gates() -> str:
    """g and beta."""
    return f"""
    behind = Constant <value_ints = [-1]> ()
    shown = Unsqueeze (present, behind)
    shown_wide = Cast <to = 1> (shown)
    a_wide = Cast <to = 1> (a)
    dt_bias_wide = Cast <to = 1> (dt_bias)
    step = Add (a_wide, dt_bias_wide)
    linear_from = Constant <value_float = {LINEAR_FROM}> ()
    is_linear = Greater (step, linear_from)
    step_curved = Softplus (step)
    step_positive = Where (is_linear, step, step_curved)
    a_log_wide = Cast <to = 1> (a_log)
    rate = Exp (a_log_wide)
    rate_down = Neg (rate)
    g_of_all = Mul (rate_down, step_positive)
    g = Mul (g_of_all, shown_wide)
    b_wide = Cast <to = 1> (b)
    beta_fp32 = Sigmoid (b_wide)
    beta_of_all = CastLike (beta_fp32, b)
    beta = Mul (beta_of_all, shown)"""


def _norm(attributes: dict[str, Attribute]) -> str:
    """gated, of y; what is rounded after the weight is normalised in fp32, as in AddRmsNorm's body."""
    rounds, epsilon = attributes["round_before_weight"], float(attributes["epsilon"])
    widened = "Identity" if rounds else "Cast <to = 1>"
    return f"""
    norm_of = {widened} (y)
    norm_by = {widened} (norm_weight)
    normed = RMSNormalization <axis = -1, epsilon = {epsilon}, stash_type = 1> (norm_of, norm_by)
    normed_wide = Cast <to = 1> (normed)
    z_wide = Cast <to = 1> (z)
    z_sigmoid = Sigmoid (z_wide)
    z_active = {"Mul (z_wide, z_sigmoid)" if attributes["activation"] == "silu" else "Identity (z_sigmoid)"}
    gated_wide = Mul (normed_wide, z_active)
    gated = CastLike (gated_wide, z)"""
