"""What others do with `model.onnx`: the oldest ONNX Runtime that is allowed, and tools that rewrite the file."""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
import torch
import towers
import transformers
from arch_cases import TOWERS, others_slow
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from llmexport.export import archs, manifest, onnx_file, random_checkpoint
from llmexport.export.checkpoint import open_checkpoint
from llmexport.validate.compare import compare
from llmexport.validate.runtime import OLDEST_RUNTIME
from llmexport.validate.tolerance import TOLERANCE, tolerance

pytestmark = pytest.mark.model

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
    allowed = tolerance("float32", manifest.read(export))
    wanted = reference(checkpoint)
    assert found.keys() == wanted.keys()
    assert {n: d.max_abs for n, d in ((n, compare(wanted[n], found[n])) for n in wanted) if d.excess(allowed) > 1} == {}


def folded(export: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model that the lines of export/README.md fold and quantise in `folder`: folded.onnx and int8.onnx."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "export/README.md").read_text(), re.DOTALL)
    [lines] = [block for block in blocks if "quantize_dynamic" in block]
    names = {"onnxruntime": onnxruntime, "quantize_dynamic": quantize_dynamic}
    monkeypatch.chdir(folder)
    exec(lines.replace("OUT/", f"{export}/"), names)
    return folder / "folded.onnx"


def weighted(model: onnx.ModelProto, operator: str) -> list[onnx.NodeProto]:
    """The nodes of this type whose second input is a constant."""
    constants = {t.name for t in model.graph.initializer}
    return [n for n in model.graph.node if n.op_type == operator and n.input[1] in constants]


def arrays(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


@pytest.fixture(scope="module")
def wide_of_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export in fp32 of a checkpoint in bf16, whose weights come through Transpose and Cast."""
    folder = tmp_path_factory.mktemp("bf16")
    random_checkpoint.write(archs.load("gemma"), folder / "checkpoint", dtype="bfloat16")
    checkpoint = open_checkpoint(folder / "checkpoint")
    request = onnx_file.Request(archs.load("gemma"), checkpoint)
    onnx_file.write(request, folder / "out", force=False)
    return folder / "out"


def test_onnx_runtime_quantises_every_matrix_to_8_bits(wide_of_bf16: Path, tmp_path: Path, monkeypatch) -> None:
    plain = onnx.load(folded(wide_of_bf16, tmp_path, monkeypatch))
    quantised = onnx.load(tmp_path / "int8.onnx")
    matrices = [n.input[1] for n in weighted(plain, "MatMul")]
    assert len(matrices) == 3 * 7 + 1
    assert len(weighted(quantised, "MatMulInteger")) == len(matrices)
    assert not weighted(quantised, "MatMul")
    values, scales = arrays(plain), arrays(quantised)
    # The rms of a step's roundoff beside that of the weights; as much again, independent of it, of the other factor.
    # An error passes on at its relative size; that all point one way is the worst case.
    steps = [scales[f"{n}_scale"].item() / 12**0.5 / np.sqrt((values[n] ** 2).mean()) for n in matrices]
    (_, wanted), (_, found) = (run(m, tmp_path) for m in (wide_of_bf16 / "model.onnx", tmp_path / "int8.onnx"))
    worst = max(compare(wanted[n], found[n]).rms_ratio for n in wanted)
    assert 0 < worst < 2**0.5 * sum(steps) < 0.5


def test_onnx_runtime_quantises_every_matrix_to_4_bits(wide_of_bf16: Path, tmp_path: Path, monkeypatch) -> None:
    """The numbers are those of the weights that the 4 bits stand for."""
    plain = onnx.load(folded(wide_of_bf16, tmp_path, monkeypatch))
    made = MatMulNBitsQuantizer(onnx.load(tmp_path / "folded.onnx"), block_size=32, is_symmetric=True)
    made.process()
    made.model.save_model_to_file(str(tmp_path / "int4.onnx"), True)
    quantised = onnx.load(tmp_path / "int4.onnx")
    matrices = {n.name: n.input[1] for n in weighted(plain, "MatMul")}
    values, stored = arrays(plain), arrays(quantised)
    nodes = weighted(quantised, "MatMulNBits")
    assert len(nodes) == len(matrices) == 3 * 7 + 1
    for node in nodes:
        packed, scale = stored[node.input[1]], stored[node.input[2]]
        codes = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:2], 32) - 8.0
        name = next(m for m in matrices.values() if node.input[1].startswith(f"{m}_"))
        rows, columns = values[name].shape
        step = np.abs(scale).reshape(columns, -1, 1)
        meant = (codes * scale.reshape(columns, -1, 1)).reshape(columns, -1)[:, :rows].T.astype(np.float32)
        # Half a step; a whole one at the end that 4 bits lack.
        assert (np.abs(meant - values[name]) <= step.repeat(32, 2).reshape(columns, -1)[:, :rows].T * 1.001).all()
        [tensor] = [t for t in plain.graph.initializer if t.name == name]
        tensor.CopyFrom(onnx.numpy_helper.from_array(meant, name))
    onnx.save(plain, tmp_path / "meant.onnx")
    (_, wanted), (_, found) = (run(tmp_path / f"{n}.onnx", tmp_path) for n in ("meant", "int4"))
    assert max(compare(wanted[n], found[n]).excess(TOLERANCE["float32"]) for n in wanted) <= 1


@pytest.mark.slow
def test_experts_one_by_one_are_put_together_for_good_where_a_model_is_folded(tmp_path: Path, monkeypatch) -> None:
    """What a session then opens are stacks that lie in a file; else it makes each beside its parts, in memory."""
    random_checkpoint.write(archs.load("mixtral"), tmp_path / "ck")
    made = onnx_file.write(onnx_file.Request(archs.load("mixtral"), open_checkpoint(tmp_path / "ck")), tmp_path / "out")
    stacks = {t.name: t.dims for t in onnx.load(folded(tmp_path / "out", tmp_path, monkeypatch)).graph.initializer}
    assert sum(len(d) == 3 and d[0] == made.config["num_local_experts"] for d in stacks.values()) == 2 * 3
    (_, wanted), (_, found) = (run(m, tmp_path) for m in (tmp_path / "out/model.onnx", tmp_path / "folded.onnx"))
    assert max(compare(wanted[n], found[n]).max_abs for n in wanted) == 0


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
REWRITTEN = ("gemma2", "gpt_oss", "mixtral", "qwen3_5_moe")
TOOLS = (surgeon, slim, sanitize)


@pytest.mark.parametrize(
    ("tool", "arch"),
    others_slow(list(itertools.product(TOOLS, REWRITTEN)), list(zip((*TOOLS, surgeon), REWRITTEN, strict=True))),
)
def test_a_tool_that_rewrites_the_file_leaves_its_numbers(
    tool: Callable[[Path, Path], None], arch: str, tiny_checkpoint, exported, tmp_path: Path
) -> None:
    folder = exported(arch, weights="copy")
    tool(folder / "model.onnx", tmp_path / "model.onnx")
    written = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    bodies = {f.name for f in onnx.load(folder / "model.onnx", load_external_data=False).functions}
    assert {f.name for f in written.functions} == bodies
    check(run(tmp_path / "model.onnx", tmp_path)[1], tiny_checkpoint(arch), folder)


# Runs a model of pictures in argv[1] on the arrays in argv[2], writes its first output to argv[3], prints its version.
SEE = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
numpy.save(sys.argv[3], session.run(None, dict(numpy.load(sys.argv[2])))[0])
print(onnxruntime.__version__)
"""
GRIDS = {c.arch: np.array([[1, 4, 6], [1, 2, 2], [2, 2, 4]]) if c in towers.PACKED else 2 for c in TOWERS}


def see(model: Path, arch: str, folder: Path, checkpoint: Path, runtime: str = "") -> str:
    """Compares what a vision graph makes of pictures with transformers; returns the version that ran it."""
    feed = towers.pixels(checkpoint, GRIDS[arch])
    np.savez(folder / "pictures.npz", **feed)
    command = [sys.executable, "-c", SEE, str(model), str(folder / "pictures.npz"), str(folder / "features.npy")]
    environment = os.environ | ({"PYTHONPATH": runtime} if runtime else {})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    towers.check(towers.seen(towers.reference(checkpoint), feed), np.load(folder / "features.npy"))
    return done.stdout.strip()


SEEING = list(itertools.product(TOOLS, (c.arch for c in TOWERS)))


@pytest.mark.parametrize(("tool", "arch"), others_slow(SEEING, [(surgeon, TOWERS[-1].arch), (slim, TOWERS[0].arch)]))
def test_a_tool_that_rewrites_a_vision_graph_leaves_its_numbers(
    tool: Callable[[Path, Path], None], arch: str, tiny_checkpoint, exported, tmp_path: Path
) -> None:
    folder = exported(arch, weights="copy", part="all")
    tool(folder / "vision.onnx", tmp_path / "vision.onnx")
    see(tmp_path / "vision.onnx", arch, tmp_path, tiny_checkpoint(arch, "all"))


@pytest.mark.parametrize("arch", [c.arch for c in TOWERS])
def test_both_graphs_pass_the_checker_with_inferred_shapes(arch: str, exported) -> None:
    for name in ("vision", "decoder"):
        onnx.checker.check_model(str(exported(arch, weights="copy", part="all") / f"{name}.onnx"), full_check=True)


@pytest.mark.skipif(OLDEST not in os.environ, reason=f"{OLDEST} names no folder with an older ONNX Runtime")
@pytest.mark.parametrize("arch", [c.arch for c in TOWERS])
def test_the_oldest_runtime_sees_what_transformers_does(arch: str, tiny_checkpoint, exported, tmp_path: Path) -> None:
    folder = exported(arch, weights="copy", part="all")
    version = see(folder / "vision.onnx", arch, tmp_path, tiny_checkpoint(arch, "all"), os.environ[OLDEST])
    assert version == ".".join(map(str, OLDEST_RUNTIME))


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
    assert f"ONNX Runtime {oldest} " in (ROOT / "export/README.md").read_text()
