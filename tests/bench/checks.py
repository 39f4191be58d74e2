"""What must hold before a time counts; a process of its own, so that it does not weigh on the timed ones.

    python tests/bench/checks.py parity CHECKPOINT MODEL   logits against transformers, prefill and decode
    python tests/bench/checks.py opens MODEL               ONNX Runtime makes a session: reads every weight
    python tests/bench/checks.py references MODEL          every weight lies inside a file that is there

The last line printed is the result, the exit code 1 when the check fails.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from llmexport.validate.compare import compare
from llmexport.validate.tolerance import TOLERANCE

PREFILL, STEPS, BATCH = 63, 3, 2


def session(model: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def reference_logits(checkpoint: Path, ids_BT: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
    """fp32 logits of transformers without a cache, and the (layers, kv heads, head size) of its cache."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        logits_BTV = model(torch.from_numpy(ids_BT)).logits.numpy()
    config = model.config
    return logits_BTV, (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)


def exported_logits(model: Path, ids_BT: np.ndarray, cache: tuple[int, int, int]) -> np.ndarray:
    """Logits of the ONNX model: one prefill of `PREFILL` tokens, then a token at a time through its cache."""
    layers, kv_heads, head_size = cache
    run = session(model)
    inputs = {value.name for value in run.get_inputs()}
    names = [f"{i}.{part}" for i in range(layers) for part in ("key", "value")]
    past = {name: np.zeros((BATCH, kv_heads, 0, head_size), np.float32) for name in names}
    logits, done = [], 0
    for end in range(PREFILL, ids_BT.shape[1] + 1):
        feeds = {
            "input_ids": ids_BT[:, done:end],
            "attention_mask": np.ones((BATCH, end), np.int64),
            "position_ids": np.tile(np.arange(done, end), (BATCH, 1)),
            **{f"past_key_values.{name}": value for name, value in past.items()},
        }
        feeds = {name: value for name, value in feeds.items() if name in inputs}
        step, *present = run.run(["logits", *(f"present.{name}" for name in names)], feeds)
        past = dict(zip(names, present, strict=True))
        logits.append(step)
        done = end
    return np.concatenate(logits, axis=1)


def parity(checkpoint: Path, model: Path) -> tuple[bool, str]:
    ids_BT = np.random.default_rng(0).integers(3, 512, (BATCH, PREFILL + STEPS))
    reference_BTV, cache = reference_logits(checkpoint, ids_BT)
    difference = compare(reference_BTV, exported_logits(model, ids_BT, cache))
    return difference.excess(TOLERANCE["float32"]) <= 1, f"{difference.max_abs:.1e}"


def opens(model: Path) -> tuple[bool, str]:
    session(model)
    return True, "yes"


def references(model: Path) -> tuple[bool, str]:
    """For weights larger than memory: no session, but every offset and length is checked against its file."""
    found = 0
    for weight in onnx.load(model, load_external_data=False).graph.initializer:
        if weight.data_location != onnx.TensorProto.EXTERNAL:
            continue
        place = {entry.key: entry.value for entry in weight.external_data}
        file = model.parent / place["location"]
        if not file.is_file() or int(place["offset"]) + int(place["length"]) > file.stat().st_size:
            return False, f"{weight.name} lies outside {file.name}"
        found += 1
    return found > 0, f"{found} weights in place"


if __name__ == "__main__":
    checks: dict[str, Callable[..., tuple[bool, str]]]
    checks = {"parity": parity, "opens": opens, "references": references}
    passed, result = checks[sys.argv[1]](*map(Path, sys.argv[2:]))
    print(result)
    sys.exit(0 if passed else 1)
