"""What others do with `model.onnx`: the oldest ONNX Runtime that is allowed, and tools that rewrite the file."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
import transformers

from llmexport.export import manifest
from llmexport.validate.compare import compare
from llmexport.validate.runners import OLDEST_RUNTIME
from llmexport.validate.tolerance import tolerance

OLDEST = "LLMEXPORT_OLDEST_ONNXRUNTIME"  # the folder that it is installed to
ROOT = Path(__file__).parents[2]
# Shorter and longer than the windows of the tiny configs, then two cached steps.
PROMPTS = (4, 40)
# Runs the steps in argv[2] through the model in argv[1]; logits to argv[3]. Prints the version that did.
RUN = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
types = {"tensor(float)": "float32"}
logits = {}
steps = numpy.load(sys.argv[2])
for prompt in sorted({name.split("-")[0] for name in steps}):
    past, total = {}, 0
    for i in range(3):
        ids = steps[f"{prompt}-{i}"]
        total += ids.shape[1]
        feed = {"input_ids": ids, "attention_mask": numpy.ones((1, total), "int64")}
        for port in session.get_inputs():
            if port.name == "position_ids":
                spread = (*port.shape[:-2], 1, ids.shape[1])
                feed[port.name] = numpy.broadcast_to(numpy.arange(total - ids.shape[1], total), spread).copy()
            elif port.name not in feed:
                shape = [{"batch": 1, "past": 0}.get(d, d) for d in port.shape]
                feed[port.name] = past.get(port.name, numpy.zeros(shape, types[port.type]))
        names = [port.name for port in session.get_outputs()]
        made = dict(zip(names, session.run(None, feed)))
        logits[f"{prompt}-{i}"] = made["logits"]
        past = {n.replace("present", "past_key_values"): v for n, v in made.items()}
numpy.savez(sys.argv[3], **logits)
print(onnxruntime.__version__)
"""


def steps() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {f"{n}-{i}": random.integers(3, 256, (1, n if i == 0 else 1)) for n in PROMPTS for i in range(3)}


@functools.cache
def reference(checkpoint: Path) -> dict[str, np.ndarray]:
    """The logits of transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()
    found, cache = {}, None
    for name, ids in steps().items():
        with torch.no_grad():
            made = model(input_ids=torch.tensor(ids), past_key_values=None if name.endswith("-0") else cache)
        found[name], cache = made.logits.numpy(), made.past_key_values
    return found


def run(model: Path, folder: Path, runtime: str = "") -> tuple[str, dict[str, np.ndarray]]:
    """The version of the ONNX Runtime in the folder `runtime`, else the installed one, and its logits."""
    np.savez(folder / "steps.npz", **steps())
    command = [sys.executable, "-c", RUN, str(model), str(folder / "steps.npz"), str(folder / "logits.npz")]
    environment = os.environ | ({"PYTHONPATH": runtime} if runtime else {})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), dict(np.load(folder / "logits.npz"))


def check(found: dict[str, np.ndarray], checkpoint: Path, export: Path) -> None:
    allowed = tolerance("float32", manifest.read(export).assembly)
    wanted = reference(checkpoint)
    assert found.keys() == wanted.keys()
    assert {n: d.max_abs for n, d in ((n, compare(wanted[n], found[n])) for n in wanted) if d.excess(allowed) > 1} == {}


def surgeon(source: Path, target: Path) -> None:
    onnx.save(gs.export_onnx(gs.import_onnx(onnx.load(source))), target)


def slim(source: Path, target: Path) -> None:
    pytest.importorskip("onnxslim", reason="pip install -e '.[test]'").slim(str(source), str(target))


def sanitize(source: Path, target: Path) -> None:
    code = "import sys; from polygraphy.tools import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "surgeon", "sanitize", "--fold-constants", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Two bodies of one op; experts beside a bias; experts alone; a Scan.
@pytest.mark.parametrize("arch", ["gemma2", "gpt_oss", "mixtral", "qwen3_5_moe"])
@pytest.mark.parametrize("tool", [surgeon, slim, sanitize])
def test_a_tool_that_rewrites_the_file_leaves_its_numbers(
    tool: Callable[[Path, Path], None], arch: str, tiny_checkpoint, exported, tmp_path: Path
) -> None:
    folder = exported(arch, weights="copy")
    tool(folder / "model.onnx", tmp_path / "model.onnx")
    written = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    bodies = {f.name for f in onnx.load(folder / "model.onnx", load_external_data=False).functions}
    assert {f.name for f in written.functions} == bodies
    check(run(tmp_path / "model.onnx", tmp_path)[1], tiny_checkpoint(arch), folder)


# Those with experts, two bodies of one op, and heads that share a key in ONNX's Attention.
@pytest.mark.skipif(OLDEST not in os.environ, reason=f"{OLDEST} names no folder with an older ONNX Runtime")
@pytest.mark.parametrize("arch", ["gpt_oss", "llama4", "mixtral", "qwen2_moe", "qwen3_5_moe", "gemma2", "llama"])
def test_the_oldest_runtime_gives_the_logits_of_transformers(
    arch: str, tiny_checkpoint, exported, tmp_path: Path
) -> None:
    version, found = run(exported(arch) / "model.onnx", tmp_path, os.environ[OLDEST])
    assert version == ".".join(map(str, OLDEST_RUNTIME))
    check(found, tiny_checkpoint(arch), exported(arch))


def test_the_oldest_runtime_is_the_same_everywhere() -> None:
    oldest = ".".join(map(str, OLDEST_RUNTIME))
    assert re.findall(r'"onnxruntime(?:-gpu)?>=([\d.]+);', (ROOT / "pyproject.toml").read_text()) == [oldest] * 2
    assert re.findall(r"onnxruntime==([\d.]+)", (ROOT / ".ci" / "run").read_text()) == [oldest]
    assert f"ONNX Runtime {oldest} " in (ROOT / "README.md").read_text()
