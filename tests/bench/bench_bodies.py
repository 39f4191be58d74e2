"""Times function bodies in ONNX Runtime on the CPU, beside its own operator: python tests/bench/bench_bodies.py

GatedDeltaRule at Qwen3.5's sizes, a prompt and a token, against LinearAttention of com.microsoft. The numbers first;
medians of --runs, body and operator in turn. Exit code 1 if the numbers differ.
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

from one_node import body_model, session

from llmexport.validate.compare import compare

G, H, D, V = 16, 32, 128, 128
SCALE = D**-0.5
CLOSE = 1e-5  # of values of order one in fp32: the contract of the op


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
    peer = operator()
    print(f"onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}")
    right = True
    for tokens in (512, 1):
        feed = example(tokens)
        wide = feed | {n: np.repeat(feed[n], H // G, 2) for n in ("q", "k")}
        flat = wide | {n: wide[n].reshape(1, tokens, -1) for n in "qkv"}
        y, after = ours.run(None, feed)
        expected, expected_after = peer.run(None, flat)
        error = max(compare(expected.reshape(y.shape), y).max_abs, compare(expected_after, after).max_abs)
        if error >= CLOSE:
            print(f"GatedDeltaRule T={tokens}: WRONG NUMBERS, not timed; error {error:.1e}")
            right = False
            continue
        seconds: dict[str, list[float]] = {"body": [], "LinearAttention": []}
        for _ in range(runs):
            for name, runtime, given in (("body", ours, feed), ("LinearAttention", peer, flat)):
                start = time.perf_counter()
                runtime.run(None, given)
                seconds[name].append(time.perf_counter() - start)
        said = ", ".join(f"{n} {statistics.median(s) * 1e3:.2f} ms" for n, s in seconds.items())
        print(f"GatedDeltaRule T={tokens}: {said}; error {error:.1e}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
