"""Exports in 16 bits: right ones pass however far roundoff takes them, wrong ones are found."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from reseal import reseal
from rungs import EVERYWHERE

from llmexport.export import archs, manifest, onnx_file
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.spec import Attention, Experts, Mlp, Moe, Norm, Part, Router, causal_lm, decoder_layer
from llmexport.validate import drive, judge, ladder, loading
from llmexport.validate.compare import Difference, compare, median
from llmexport.validate.stages import Stage, opening
from llmexport.validate.tolerance import FACTOR, MOST, TOLERANCE, Tolerance, step_tolerance

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("up_to_onnx_runtime")]

NORM = Norm(64, 1e-6)
PYTORCH, FILE, BLOCKS = "PyTorch / transformers", "ONNX Runtime / PyTorch", "blocks: ONNX Runtime / PyTorch"


def rungs(folder: Path) -> dict[str, ladder.Rung]:
    return {r.name: r for r in ladder.climb(manifest.read(folder), rungs=EVERYWHERE).rungs}


@pytest.fixture(scope="module")
def rough(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A Llama of large weights, in whose logits 16 bits lose 12 roundoffs of the rms, exported in a dtype."""
    folder = tmp_path_factory.mktemp("rough")
    sizes: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(8)

    def make(dtype: str) -> Path:
        if not (folder / dtype).exists():
            model.to(getattr(torch, dtype)).save_pretrained(folder / f"{dtype}-checkpoint")
            checkpoint = open_checkpoint(folder / f"{dtype}-checkpoint")
            request = onnx_file.Request(archs.choose(None, checkpoint.config), checkpoint, dtype)
            onnx_file.write(request, folder / dtype, force=False)
        return folder / dtype

    return make


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_right_export_passes_where_transformers_is_as_far_from_fp32(dtype: str, rough) -> None:
    found = rungs(rough(dtype))
    assert {r.status for r in found.values()} <= {"pass", "not run"}
    # The fixed bound alone is about what this model makes of 16 bits.
    assert max(d["difference"].excess(TOLERANCE[dtype]) for d in found[PYTORCH].details) > 0.6
    assert found[f"{PYTORCH}, float32"].status == "pass"


def edited(folder: Path, tmp_path: Path, change: Callable[[onnx.ModelProto], None]) -> dict[str, ladder.Rung]:
    copy = Path(shutil.copytree(folder, tmp_path / "export"))
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    change(model)
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    reseal(copy)
    return rungs(copy)


def exchange_norms(model: onnx.ModelProto) -> None:
    names = [f"model.layers.{i}.input_layernorm.weight" for i in (0, 1)]
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name in names:
                node.input[i] = names[1 - names.index(name)]


def scale_scores(model: onnx.ModelProto) -> None:
    node = [n for n in model.graph.node if n.op_type == "Attention"][1]
    next(a for a in node.attribute if a.name == "scale").f *= 1.1


def forget_padding(model: onnx.ModelProto) -> None:
    node = [n for n in model.graph.node if n.op_type == "Attention"][-1]
    queries = onnx.helper.make_node("Not", [node.input[3]], ["hidden_keys"])
    everything = onnx.helper.make_node("Or", [node.input[3], "hidden_keys"], ["all_keys"])
    place = list(model.graph.node).index(node)
    node.input[3] = "all_keys"
    for i, new in enumerate((queries, everything)):
        model.graph.node.insert(place + i, new)


@pytest.mark.parametrize("change", [exchange_norms, scale_scores, forget_padding])
def test_a_wrong_file_is_found_though_its_model_is_rough(change: Callable[..., None], rough, tmp_path: Path) -> None:
    found = edited(rough("float16"), tmp_path, change)
    assert {n: r.status for n, r in found.items()} == {
        PYTORCH: "pass",
        f"{PYTORCH}, float32": "pass",
        BLOCKS: "fail",
        FILE: "fail",
    }


def test_a_yardstick_widens_a_tolerance_by_a_factor_and_never_narrows_it() -> None:
    base = TOLERANCE["float16"]
    near, far = Difference(1e-6, 1e-6, 1.0, 1.0), Difference(0.2, 0.05, 4.0, 8.0)
    assert base.widened(near) == base
    assert base.widened(far) == dataclasses.replace(base, max_abs=FACTOR * 0.05, rms_ratio=FACTOR * 0.05)


@pytest.mark.parametrize("rms", [1.0, math.nan, math.inf])
def test_no_yardstick_lets_everything_pass(rms: float) -> None:
    base = TOLERANCE["float16"]
    widened = base.widened(Difference(rms, rms, 1.0, 1.0))
    assert widened.rms_ratio == (MOST if math.isfinite(rms) else base.rms_ratio)
    assert Difference(1.0, 0.5, 1.0, 1.0).excess(widened) > 1


def test_a_median_is_of_each_error_in_units_of_its_reference() -> None:
    found = median([Difference(2.0, 0.1, 4.0, 1.0), Difference(1.0, 0.3, 1.0, 1.0), Difference(0.0, 0.2, 1.0, 1.0)])
    assert (found.max_abs, found.rms_ratio, found.scale) == (0.5, 0.2, 1.0)


def test_an_older_transformers_is_no_reference(rough, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loading.importlib.metadata.version
    monkeypatch.setattr(
        loading.importlib.metadata, "version", lambda name: "4.57.1" if name == "transformers" else real(name)
    )
    found = rungs(rough("float16"))
    for name in (PYTORCH, f"{PYTORCH}, float32"):
        assert found[name].status == "not run"
        assert found[name].note.startswith(
            "transformers 4.57.1 is installed, before 5.20 it is wrong for some architectures"
        )
    assert found[FILE].status == "pass"


def test_an_architecture_that_transformers_lacks_is_said(rough) -> None:
    later = dataclasses.replace(manifest.read(rough("float16")), reference=causal_lm("LlamaOfLaterForCausalLM"))
    rung = next(r for r in ladder.climb(later).rungs if r.name == PYTORCH)
    assert rung.status == "not run"
    assert "has no LlamaOfLaterForCausalLM: pip install -U transformers" in rung.note


def test_a_token_that_a_roundoff_sends_to_another_expert_does_not_condemn_its_step() -> None:
    layer = decoder_layer(NORM, Attention(64, 4, 2, 16), NORM, Moe(Router(64, 8, 2, "softmax"), Experts(64, 32, 8, 2)))
    plain = decoder_layer(NORM, Attention(64, 4, 2, 16), NORM, Mlp(64, 128, "silu"))
    wanted = np.random.default_rng(0).standard_normal((1, 40, 64)).astype(np.float32)
    found = wanted.copy()
    found[0, 7] = 1.0
    for block, dtype, passes in ((layer, "float16", True), (plain, "float16", False), (layer, "float32", False)):
        bound = step_tolerance(dtype, Part("", block, ""))
        assert (compare(wanted, found, strays=bound.strays).excess(bound) <= 1) == passes
    found[0, :20] = 1.0
    bound = step_tolerance("float16", Part("", layer, ""))
    assert compare(wanted, found, strays=bound.strays).excess(bound) > 1


ROUTED, DENSE = Tolerance(0.01, 0.005, scaled=True, strays=0.5), Tolerance(0.01, 0.005, scaled=True)


IDS = np.zeros((2, 40), np.int64)
# A prompt, two decode steps and a step across a threshold.
PROMPT = opening(IDS, np.ones_like(IDS))
FIRST = PROMPT.then("decode 1", "decode", IDS[:, :1])
ACROSS = Stage("across 0", "crossing", IDS[:1, :13], IDS[:1, :13], np.ones((1, 13), np.int64), IDS[:1, :13])
SCRIPT = (PROMPT, FIRST, FIRST.then("decode 2", "decode", IDS[:, :1]), ACROSS)


def run_of(noise: dict[int, float]) -> drive.Run:
    """Logits of the script's stages, some of which are `noise` of the rms off."""
    random = np.random.default_rng(0)
    made = [random.standard_normal((*stage.ids.shape, 32)) for stage in SCRIPT]
    made = [x + noise.get(i, 0.0) * random.standard_normal(x.shape) for i, x in enumerate(made)]
    return drive.Run(frozenset(), [{"logits": x} for x in made])


@pytest.mark.parametrize(
    ("noise", "tolerance", "status"),
    [
        ({1: 0.06, 2: 0.06}, ROUTED, "pass"),
        ({1: 0.06, 2: 0.06}, DENSE, "fail"),
        ({2: 0.7}, ROUTED, "fail"),
        ({0: 0.06}, ROUTED, "fail"),
        ({3: 0.06}, ROUTED, "fail"),
    ],
)
def test_a_strayed_token_puts_steps_that_read_it_off_and_no_others(
    noise: dict[int, float], tolerance: Tolerance, status: str
) -> None:
    right = run_of({})
    found = judge.compare_runs("x", SCRIPT, right, run_of(noise), {"logits": tolerance}, [right])
    assert found.status == status


def exchange_key_and_value(model: onnx.ModelProto) -> None:
    names = {"present.1.key": "present.1.value", "present.1.value": "present.1.key"}
    for node in model.graph.node:
        for held in (node.input, node.output):
            held[:] = [names.get(n, n) for n in held]


@pytest.mark.parametrize("arch", ["gpt_oss", "mixtral"])
def test_wrong_caches_are_found_though_tokens_may_stray(arch: str, exported, tmp_path: Path) -> None:
    found = edited(exported(arch, "float16"), tmp_path, exchange_key_and_value)
    assert (found[PYTORCH].status, found[FILE].status) == ("pass", "fail")


def test_a_rung_says_when_16_bits_are_too_few_to_tell() -> None:
    right, rough = run_of({}), run_of(dict.fromkeys(range(4), 0.4))
    for yardstick, said in ((rough, True), (right, False)):
        rung = judge.compare_runs("x", SCRIPT, right, rough, {"logits": DENSE}, [yardstick])
        assert (rung.status, rung.note.startswith("tells little")) == ("fail", said)
