"""Attention over slots by a mask, that of slots.py and static.py, as passes find it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
from slot_graphs import BACK, MASK, SLOTS, SPLIT, TURN, operands, tell

from llmexport.plugins.spec import DOMAIN

INPUTS = (
    "float[B,T,32] q, float[B,T,16] k, float[B,T,16] v, int64[B] length, int64[B] padding, float[B,T,4] cos, "
    "float[B,T,4] sin, float[B,2,9,8] pk, float[B,2,9,8] pv"
)
HELD = """int64[4] four = {0, 0, 4, 8}, int64[4] two = {0, 0, 2, 8}, int64[3] flat = {0, 0, 32}, int64[1] one = {1},
  int64[1] last = {2}, int64 none = {0}, int64 step = {1}, int64[3] row = {-1, 1, 1}, int64 window = {3},
  int64[1,1,9] slots = {0, 1, 2, 3, 4, 5, 6, 7, 8}, int64[9] flat_slots = {0, 1, 2, 3, 4, 5, 6, 7, 8},
  int64 slots9 = {9}, int64[3] all_of_row = {1, 1, 9}, float[4,1,1] slopes = {0.5, 0.25, 0.125, 0.0625},
  float hidden = {-32768}"""
WRITE = "[kj] all_k = TensorScatter<axis = -2>(pk, {k}, length) [vj] all_v = TensorScatter<axis = -2>(pv, vt, length)"
ATTEND = "[attention] a = Attention<scale = 0.3>({q}, all_k, all_v, mask)"
PLAIN = f"{MASK} {SPLIT} {TURN} {WRITE.format(k='kt')} {ATTEND.format(q='qt')} {BACK}"
CHUNK = "c1 = Div(slots, window) c2 = Div(own, window) same = Equal(c1, c2) le = And(le0, same)"


def model(nodes: str, outputs: str = "", keys: int | str = SLOTS) -> onnx.ModelProto:
    ends = f"float[B,T,32] y, float[B,2,{keys},8] all_k, float[B,2,{keys},8] all_v" + outputs
    header = f'<ir_version: 10, opset_import: ["": 24, "{DOMAIN}": 1]>'
    text = f"{header} g ({INPUTS}) => ({ends}) <{HELD}> {{ {nodes} }}"
    made = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    # Rope is ours, and onnx infers no shape behind it; of the steps' number it does not know that it is T.
    typed = {"qr": (1, "B", 4, "T", 8), "kr": (1, "B", 2, "T", 8), "mask": (9, "B", 1, "T", keys)}
    typed |= {"far": (7, "B", "T", SLOTS), "far4": (7, "B", 1, "T", SLOTS), "apart": (1, "B", 1, "T", SLOTS)}
    typed |= dict.fromkeys(("steep", "bias"), (1, "B", 4, "T", SLOTS))
    tell(made, typed)
    return made


def feed(count: int, tokens: int, before: list[int], padded: bool = True) -> dict[str, np.ndarray]:
    padding = np.array([0, 2, 1]) * padded
    return operands(count, tokens) | {"length": np.array(before), "padding": padding[:count]}
