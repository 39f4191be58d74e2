"""Times function bodies in ONNX Runtime on the CPU, beside its own operator: python tests/bench/bench_bodies.py

GatedDeltaRule at Qwen3.5's sizes, a prompt and a token: its body, which is a Scan over chunks, a Scan over tokens, and
LinearAttention of com.microsoft. The numbers first; then CPU time, one thread, medians of --runs, in turn. Exit code 1
if the numbers differ.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

sys.path.insert(0, str(Path(__file__).parents[1]))

from one_node import body_model

from llmexport.validate.compare import compare

G, H, D, V = 16, 32, 128, 128
SCALE = D**-0.5
CLOSE = 1e-5  # of values of order one in fp32: the contract of the op


# The recurrence, a token at a time.
BY_TOKEN = f"""<ir_version: 10, opset_import: ["" : 23]>
by_token (float[B,T,{H},{D}] q, float[B,T,{H},{D}] k, float[B,T,{H},{V}] v, float[B,T,{H}] g, float[B,T,{H}] beta,
    float[B,{H},{D},{V}] state) => (float[B,T,{H},{V}] y, float[B,{H},{D},{V}] after) {{
  last = Constant <value_ints = [-1]> ()
  both = Constant <value_ints = [-2, -1]> ()
  factor = Constant <value_float = {SCALE}> ()
  q_scaled = Mul (q, factor)
  q_rows = Unsqueeze (q_scaled, last)
  k_rows = Unsqueeze (k, last)
  g_wide = Unsqueeze (g, both)
  beta_wide = Unsqueeze (beta, last)
  decay = Exp (g_wide)
  after, y = Scan <num_scan_inputs = 5, scan_input_axes = [1, 1, 1, 1, 1], scan_output_axes = [1],
    body = token (float[] s, float[] q_t, float[] k_t, float[] v_t, float[] decay_t, float[] beta_t)
        => (float[] s_next, float[] y_t) {{
      zero = Constant <value_ints = [-2]> ()
      s_old = Mul (s, decay_t)
      k_line = Transpose <perm = [0, 1, 3, 2]> (k_t)
      v_known_row = MatMul (k_line, s_old)
      v_known = Squeeze (v_known_row, zero)
      v_missed = Sub (v_t, v_known)
      v_wanted = Mul (v_missed, beta_t)
      v_row = Unsqueeze (v_wanted, zero)
      added = Mul (k_t, v_row)
      s_next = Add (s_old, added)
      q_line = Transpose <perm = [0, 1, 3, 2]> (q_t)
      y_row = MatMul (q_line, s_next)
      y_t = Squeeze (y_row, zero)
    }}
  > (state, q_rows, k_rows, v, decay, beta_wide)
}}"""


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def operator() -> onnxruntime.InferenceSession:
    """LinearAttention on q, k, v of [B, T, H * D], as many key heads as value heads."""
    inputs = ["q", "k", "v", "state", "g", "beta"]
    given = {"update_rule": "gated_delta", "q_num_heads": H, "kv_num_heads": H, "scale": SCALE}
    node = helper.make_node("LinearAttention", inputs, ["y", "after"], domain="com.microsoft", **given)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in (*inputs, "y", "after")]
    graph = helper.make_graph([node], "one", values[:6], values[6:])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return session(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def example(tokens: int) -> dict[str, np.ndarray]:
    """Unit keys and queries, decays and betas of any size, a state that is not zero."""
    random = np.random.default_rng(tokens)
    q, k = (random.standard_normal((1, tokens, G, D), np.float32) for _ in range(2))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v, state = random.standard_normal((1, tokens, H, V), np.float32), random.standard_normal((1, H, D, V), np.float32)
    g, beta = (random.random((1, tokens, H), np.float32) for _ in range(2))
    return {"q": q, "k": k, "v": v, "g": -g, "beta": beta, "state": state}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    sizes = {"G": G, "H": H, "D": D, "V": V}
    ours = session(body_model("GatedDeltaRule", {"scale": SCALE, "l2_norm": False}, "float32", sizes))
    by_token = session(onnx.parser.parse_model(BY_TOKEN))
    peer = operator()
    print(f"onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}")
    right = True
    for tokens in (512, 1):
        feed = example(tokens)
        wide = feed | {n: np.repeat(feed[n], H // G, 2) for n in ("q", "k")}
        flat = wide | {n: wide[n].reshape(1, tokens, -1) for n in "qkv"}
        expected, expected_after = peer.run(None, flat)
        runs_of = (ours.run(None, feed), by_token.run(None, wide))
        error = max(
            compare(reference, found).max_abs
            for run in runs_of
            for reference, found in zip((expected.reshape(run[0].shape), expected_after), run, strict=True)
        )
        if error >= CLOSE:
            print(f"GatedDeltaRule T={tokens}: WRONG NUMBERS, not timed; error {error:.1e}")
            right = False
            continue
        timed = {"chunks": (ours, feed), "tokens": (by_token, wide), "LinearAttention": (peer, flat)}
        seconds: dict[str, list[float]] = {name: [] for name in timed}
        for _ in range(runs):
            for name, (runtime, given) in timed.items():
                start = time.process_time()
                runtime.run(None, given)
                seconds[name].append(time.process_time() - start)
        said = ", ".join(f"{n} {statistics.median(s) * 1e3:.2f} ms" for n, s in seconds.items())
        print(f"GatedDeltaRule T={tokens}: {said}; error {error:.1e}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
