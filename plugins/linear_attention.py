"""Function bodies of the delta rules for ONNX Runtime alone: its own operator LinearAttention."""

from __future__ import annotations

from llmexport.plugins.gated_delta_rule.body import L2_EPSILON
from llmexport.plugins.spec import Attribute


def linear_attention(attributes: dict[str, Attribute], sizes: dict[str, int], *, decay: str, key_heads: int) -> str:
    """LinearAttention of com.microsoft on inputs of float32. decay: the value that holds g, [B, T, H] or [B, T, H * D];
    key_heads: those of q and k, which consecutive heads of v may share.

    Of a vector x of D numbers RMSNormalization makes x / sqrt((sum of squares + D epsilon) / D).
    """
    heads, size = sizes["H"], sizes["D"]
    steps = [
        f"scale = Constant <value_float = {attributes['scale']}> ()",
        "flat = Constant <value_ints = [0, 0, -1]> ()",
    ]
    for name in ("q", "k"):
        unit = name
        if attributes["l2_norm"]:
            unit = f"{name}_unit"
            numbers = ", ".join([repr(size**-0.5)] * size)
            steps += [
                f"{name}_weight = Constant <value = float[{size}] {{{numbers}}}> ()",
                f"{unit} = RMSNormalization <axis = -1, epsilon = {L2_EPSILON / size}> ({name}, {name}_weight)",
            ]
        steps.append(f"{name}_flat = Reshape ({unit}, flat)")
    return "\n    ".join(
        [
            *steps,
            "q_scaled = Mul (q_flat, scale)",
            "v_flat = Reshape (v, flat)",
            'y_flat, next_state = com.microsoft.LinearAttention <update_rule = "gated_delta", scale = 1.0, '
            f"q_num_heads = {key_heads}, kv_num_heads = {heads}> (q_scaled, k_flat, v_flat, state, {decay}, beta)",
            f"y_heads = Constant <value_ints = [0, 0, {heads}, {sizes['V']}]> ()",
            "y = Reshape (y_flat, y_heads)",
        ]
    )
