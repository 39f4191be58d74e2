"""The ladder passes what is right, and finds what is wrong, where it is wrong."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from arch_cases import CASES, FIRST, IN_FP16, PRIMARY, SLOTS, Case, in_each_dtype, others_slow
from reseal import reseal
from rungs import EVERYWHERE, OF_A_BLOCK
from safetensors.numpy import load_file, save_file
from tiny_configs import read

from llmexport.export import archs, manifest, onnx_file, random_checkpoint
from llmexport.export.assembly import named_blocks
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.errors import EngineError, ExportError
from llmexport.export.spec import PAST, SEQUENCE, SOURCE, Rotary
from llmexport.graphs.bodies import op_of
from llmexport.validate import drive, forms, ladder, loading, stages, thresholds, whole
from llmexport.validate import page as files

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("up_to_onnx_runtime")]


def climb(folder: Path, **options: Any) -> dict[str, ladder.Rung]:
    export = manifest.read(folder)
    report = ladder.climb(export, **{"rungs": OF_A_BLOCK if export.block else EVERYWHERE, **options})
    return {r.name: r for r in report.rungs}


@pytest.fixture
def copy(exported, tmp_path: Path) -> Path:
    """An export with its own files, for a test to damage."""
    return Path(shutil.copytree(exported("gemma"), tmp_path / "export"))


def edit_model(folder: Path, op: str, change) -> None:
    """Changes the last node of type `op`."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    node = [n for n in model.graph.node if op_of(n) == op][-1]
    change(node, model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    reseal(folder)


CLIMBED = in_each_dtype(FIRST, ("float32", "float16"))


@pytest.mark.parametrize(
    ("case", "dtype"),
    others_slow(CLIMBED, [(c, d) for c, d in CLIMBED if d == "float32" or c in IN_FP16]),
    ids=str,
)
def test_every_rung_of_a_right_export_passes(case: Case, dtype: str, exported) -> None:
    rungs = climb(exported(case, dtype))
    wide = {} if dtype == "float32" else {"PyTorch / transformers, float32": "pass"}
    assert {n: r.status for n, r in rungs.items()} == wide | {
        "PyTorch / transformers": "pass",
        "blocks: ONNX Runtime / PyTorch": "pass",
        "ONNX Runtime / PyTorch": "pass",
    }
    steps = {d["step"] for d in rungs["blocks: ONNX Runtime / PyTorch"].details}
    found = manifest.read(exported(case, dtype))
    assert steps == {found.place(g.name, s.name) for g in found.graphs for s in g.assembly.steps}


IN_SLOTS = [(c, d) for c in FIRST for d in ("float32", "float16") if c.arch in (*PRIMARY, "gemma3_text")]
IN_SLOTS_ONCE = [(c, d) for c, d in IN_SLOTS if c.arch == "gpt_oss" and d == "float16"]


@pytest.mark.parametrize(("case", "dtype"), others_slow(IN_SLOTS, IN_SLOTS_ONCE), ids=str)
def test_every_rung_of_a_right_export_with_a_static_cache_passes(case: Case, dtype: str, exported) -> None:
    rungs = climb(exported(case, dtype, slots=SLOTS))
    assert {(r.status, r.note) for r in rungs.values()} == {("pass", "")}
    assert {d["step"] for d in rungs["blocks: ONNX Runtime / PyTorch"].details} >= {"slots", "layers.0", "layers.1"}


def test_a_model_without_rope_has_no_positions(exported) -> None:
    case = Case("llama4", "llama4-no-rope", {"no_rope_layers": [0] * 4})
    assert "position_ids" not in [p.name for p in manifest.read(exported(case)).graphs[0].assembly.inputs]
    assert {r.status for r in climb(exported(case)).values()} == {"pass"}


def test_a_wrong_node_fails_its_own_block_and_no_other(copy: Path) -> None:
    edit_model(
        copy,
        "Attention",
        lambda node, model: [setattr(a, "f", a.f * 1.01) for a in node.attribute if a.name == "scale"],
    )
    rungs = climb(copy)
    blocks = rungs["blocks: ONNX Runtime / PyTorch"]
    wrong = {d["step"] for d in blocks.details if d["difference"].excess(blocks.tolerance) > 1}
    assert (blocks.status, wrong) == ("fail", {"layers.2"})
    assert rungs["ONNX Runtime / PyTorch"].status == "fail"
    assert rungs["PyTorch / transformers"].status == "pass"


def test_experts_in_a_wrong_order_are_found(exported, tmp_path: Path) -> None:
    """Gate and up of one expert exchanged: the stack's shape stays."""
    folder = Path(shutil.copytree(exported("mixtral"), tmp_path / "export"))

    model = onnx.load(folder / "model.onnx", load_external_data=False)
    stack = next(n for n in model.graph.node if n.op_type == "Concat" and "model.layers.1.block_sparse" in n.name)
    gate, up = (i for i, n in enumerate(stack.input) if re.search(r"experts\.1\.w[13]", n))
    stack.input[gate], stack.input[up] = stack.input[up], stack.input[gate]
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    reseal(folder)
    blocks = climb(folder)["blocks: ONNX Runtime / PyTorch"]
    wrong = {d["step"] for d in blocks.details if d["difference"].excess(blocks.tolerance) > 1}
    assert (blocks.status, wrong) == ("fail", {"layers.1"})


def exchange_norms(node: onnx.NodeProto, model: onnx.ModelProto) -> None:
    """Two norms of equal shape: no shape tells, only numbers do."""
    names = {t.name: t for t in model.graph.initializer}
    first, second = names["model.layers.0.input_layernorm.weight"], names["model.layers.1.input_layernorm.weight"]
    first.external_data[1].value, second.external_data[1].value = (
        second.external_data[1].value,
        first.external_data[1].value,
    )
    first.external_data[0].value, second.external_data[0].value = (
        second.external_data[0].value,
        first.external_data[0].value,
    )


def test_a_wrong_weight_binding_is_found(copy: Path) -> None:
    edit_model(copy, "AddRmsNorm", exchange_norms)
    assert climb(copy)["ONNX Runtime / PyTorch"].status == "fail"


def widen(node: onnx.NodeProto, model: onnx.ModelProto) -> None:
    """Makes a mask's window endless."""
    [first] = [n for n in model.graph.node if node.input[0] in n.output]
    [limit] = [t for t in model.graph.initializer if t.name == first.input[1]]
    limit.CopyFrom(onnx.numpy_helper.from_array(np.array(10**6, np.int64), limit.name))


def test_a_model_that_ignores_its_window_is_found(exported, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported("mistral"), tmp_path / "export"))
    edit_model(folder, "Less", widen)
    assert climb(folder)["ONNX Runtime / PyTorch"].status == "fail"


LONGROPE = {
    "original_max_position_embeddings": 900,
    "max_position_embeddings": 4096,
    "sliding_window": 600,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 900,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
        "long_factor": [1.0, 2, 3, 4, 5, 6, 7, 8],
    },
}
# Thresholds that no prompt of the ladder reaches, as all that are published.
FAR = {
    "mistral": {"sliding_window": 900},
    "gemma2": {"sliding_window": 900},
    "phi3": LONGROPE,
    "llama4": {"floor_scale": 900, "attention_chunk_size": 900},
}


@pytest.mark.usefixtures("static_caches")
@pytest.mark.parametrize("arch", others_slow([*FAR], ["llama4"]))
def test_thresholds_within_a_static_cache_are_crossed_and_none_beyond_it(arch: str, tmp_path: Path) -> None:
    """The slots end within the step across the second threshold, or right at it."""
    ends = {"phi3": (603, {600}), "llama4": (903, {900})}
    slots, crossed = ends.get(arch, (1024, {900}))
    report = ladder.climb(manifest.read(export_of(tmp_path, arch, FAR[arch], cache="static", max_tokens=slots)))
    assert set(report.prompt["crossed"]) == crossed
    assert {(r.status, r.note) for r in report.rungs} == {("pass", "")}


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return functools.cache(lambda arch: export_of(tmp_path_factory.mktemp(arch), arch, FAR[arch]))


@pytest.mark.parametrize("arch", FAR)
def test_thresholds_beyond_the_prompt_are_crossed(arch: str, far) -> None:
    report = ladder.climb(manifest.read(far(arch)), rungs=EVERYWHERE)
    known = {v for v in FAR[arch].values() if isinstance(v, int)} - {4096}
    assert report.prompt["tokens"] < min(known)
    assert set(report.prompt["crossed"]) == known
    assert {(r.status, r.note) for r in report.rungs} == {("pass", "")}


MISREAD_FAR = {
    "window off by one": ("mistral", "Mask", "window", 901),
    "window dropped": ("mistral", "Mask", "window", None),
    "window of SinkAttention dropped": ("gemma2", "Attention", "window", 0),
    "LongRoPE's long factors": ("phi3", "LongScaling", "long", [1.0, 2, 3, 4, 5, 6, 7, 8.5]),
    "LongRoPE's length": ("phi3", "LongScaling", "original_positions", 1000),
    "chunk off by one": ("llama4", "Mask", "chunk", 899),
    "temperature's scale": ("llama4", "Temperature", "scale", 0.11),
    "temperature's interval": ("llama4", "Temperature", "interval", 899),
}


@pytest.mark.parametrize("name", MISREAD_FAR)
def test_what_is_misread_beyond_the_prompt_is_found(name: str, far, tmp_path: Path) -> None:
    arch, cls, field, value = MISREAD_FAR[name]
    folder = Path(shutil.copytree(far(arch), tmp_path / "export"))
    misread(folder, cls, field, value)
    assert climb(folder)["PyTorch / transformers"].status == "fail"


def ignore_window(node: onnx.NodeProto, model: onnx.ModelProto) -> None:
    """Gives a layer with a window the function body of one without."""
    [full] = {n.op_type for n in model.graph.node if op_of(n) == "SinkAttention"} - {node.op_type}
    node.op_type = full


def scale_more(node: onnx.NodeProto, model: onnx.ModelProto) -> None:
    """Makes the logarithm of a temperature count for 10 % more."""
    names = {t.name: t for t in model.graph.initializer}
    [scale] = [names[n] for m in model.graph.node if node.output[0] in m.input for n in m.input if n in names]
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float32(1.1), scale.name))


@pytest.mark.parametrize(
    ("arch", "op", "change", "step"),
    [
        ("mistral", "Less", widen, "mask_window_900"),
        ("gemma2", "SinkAttention", ignore_window, "layers.2"),
        ("llama4", "Log", scale_more, "temperature"),
    ],
)
def test_what_a_file_computes_wrong_beyond_the_prompt_is_found_in_its_step(
    arch: str, op: str, change, step: str, far, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(far(arch), tmp_path / "export"))
    edit_model(folder, op, change)
    rungs = climb(folder)
    blocks = rungs["blocks: ONNX Runtime / PyTorch"]
    wrong = {d["step"] for d in blocks.details if d["difference"].excess(blocks.tolerance) > 1}
    assert (wrong, rungs["ONNX Runtime / PyTorch"].status) == ({step}, "fail")


def test_a_threshold_whose_caches_would_be_too_large_is_said_not_to_be_crossed(
    far, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drive, "MOST_PAST", 0)
    rungs = climb(far("mistral"))
    assert all("not run past [900] tokens" in r.note for r in rungs.values())
    blocks = rungs["blocks: ONNX Runtime / PyTorch"]
    assert {d["step"] for d in blocks.details if d["run"] == "898 + 13 tokens"} == {"mask_window_900"}


@pytest.mark.parametrize("arch", archs.names())
def test_a_block_alone_crosses_its_threshold(arch: str) -> None:
    for step in named_blocks(read(arch)).values():
        at = thresholds.threshold(step.block)
        sizes = thresholds.block_sizes(step.block)
        # An encoder's text has no past.
        runs = [(s[PAST], s.get(SOURCE, s[PAST] + s[SEQUENCE])) for s in sizes]
        assert not at or any(past <= max(at - thresholds.BEFORE, 21) and at < total for past, total in runs)


def test_weights_of_zero_prove_nothing(exported, tmp_path: Path) -> None:
    random_checkpoint.write(archs.load("llama"), tmp_path / "ck")
    for shard in (tmp_path / "ck").glob("*.safetensors"):
        tensors = {n: np.zeros_like(t) for n, t in load_file(shard).items()}
        save_file(tensors, shard, metadata={"format": "pt"})
    request = onnx_file.Request(archs.load("llama"), open_checkpoint(tmp_path / "ck"))
    onnx_file.write(request, tmp_path / "out", force=False)
    rungs = climb(tmp_path / "out")
    assert {r.status for r in rungs.values()} == {"fail"}
    assert all("proves nothing" in r.note for r in rungs.values())


def test_a_mask_alone_is_run_past_its_window(exported, tmp_path: Path) -> None:
    folder = export_of(tmp_path, "mistral", {"sliding_window": 100}, block="mask")
    edit_model(folder, "Less", widen)
    assert climb(folder)["ONNX Runtime / PyTorch"].status == "fail"


def test_a_mask_that_shows_padding_is_found(exported, tmp_path: Path) -> None:
    folder = export_of(tmp_path, "llama", {}, block="mask")
    edit_model(folder, "Equal", lambda node, model: node.input.__setitem__(1, node.input[0]))
    assert climb(folder)["ONNX Runtime / PyTorch"].status == "fail"


def export_of(folder: Path, arch: str, changes: dict[str, Any], **request: Any) -> Path:
    random_checkpoint.write(archs.load(arch), folder / "ck", config={**archs.load(arch).tiny, **changes})
    checkpoint = open_checkpoint(folder / "ck")
    wanted = onnx_file.Request(archs.load(arch), checkpoint, **request)
    onnx_file.write(wanted, folder / "out", force=False)
    return folder / "out"


MISREAD = {
    "RoPE scaling dropped": ("llama", "Rotary", "scaling", None),
    "another RoPE base": ("qwen2", "Rotary", "theta", 10000.0),
    "norm offset dropped": ("gemma", "Norm", "offset", 0.0),
    "embedding not scaled": ("gemma", "Embedding", "scale", 1.0),
    "embedding scale rounded to two decimals": ("gemma", "Embedding", "scale", 8.01),
    "another epsilon": ("llama", "Norm", "epsilon", 1e-3),
    "GELU for SiLU": ("llama", "Mlp", "activation", "gelu_tanh"),
    "erf for tanh": ("gemma", "Mlp", "activation", "gelu_erf"),
    "window dropped": ("mistral", "Mask", "window", None),
    "RoPE turned by halves": ("glm4", "Attention", "interleaved", False),
    "window of a span dropped": ("gpt_oss", "Attention", "window", 0),
    "YaRN's magnitude dropped": ("gpt_oss", "YarnScaling", "magnitude", 1.0),
    "another activation of experts": ("gpt_oss", "Experts", "alpha", 1.0),
    "scores of all experts": ("gpt_oss", "Router", "scoring", "softmax"),
    "weights of experts not renormalised": ("mixtral", "Router", "renormalise", False),
    "weights of experts on their output": ("llama4", "Experts", "scale_input", False),
    "chunk dropped": ("llama4", "Mask", "chunk", None),
    "another temperature": ("llama4", "Temperature", "interval", 4),
    "cap on attention dropped": ("gemma2", "Attention", "softcap", 1e6),
    "cap on logits dropped": ("gemma2", "Head", "softcap", 0.0),
    "one RoPE for all kinds of layers": ("gemma3_text", "Rotary", "theta", 10000.0),
    "clip dropped": ("olmo", "Attention", "clip", None),
    "LongRoPE's lengths": ("phi3-longrope-long", "LongScaling", "original_positions", 512),
    "dynamic RoPE's factor": ("internlm2-bias", "DynamicScaling", "factor", 3.0),
    "dynamic RoPE's length": ("internlm2-bias", "DynamicScaling", "original_positions", 27),
    "LongRoPE's magnitude of long texts": ("phimoe-long-plain", "LongScaling", "long_magnitude", None),
    "experts within the jitter": ("phimoe", "Router", "jitter", 0.1),
    "a delta net's epsilon": ("qwen3_5_moe", "GatedDeltaNet", "epsilon", 1e-2),
    "hidden states not rescaled": ("rwkv", "ChannelMix", "scale", 1.0),
    "a head's norm of another epsilon": ("rwkv7", "DeltaTimeMix", "epsilon", 1.0),
    "an encoder's attention scaled": ("bert", "Attention", "scale", 0.2),
}
DTYPES = ("float32", "float16", "bfloat16")
# All where roundoff hides most; the first nine in every dtype.
MISREAD_IN = [(n, d) for i, n in enumerate(MISREAD) for d in (DTYPES if i < 9 else DTYPES[-1:])]
MISREAD_AT_ONCE = [(n, d) for n, d in MISREAD_IN if d == DTYPES[-1] and MISREAD[n][0] in PRIMARY]


@pytest.mark.parametrize(("name", "dtype"), others_slow(MISREAD_IN, MISREAD_AT_ONCE))
def test_a_config_that_was_misread_is_found_in_every_dtype(name: str, dtype: str, exported, tmp_path: Path) -> None:
    """The specs in the manifest made wrong, as a wrong data file would make them; transformers reads the config."""
    case, cls, field, value = MISREAD[name]
    which = next(c for c in CASES if c.name == case)
    folder = Path(shutil.copytree(exported(which, dtype), tmp_path / "export"))
    misread(folder, cls, field, value)
    reference = climb(folder)["PyTorch / transformers" + ("" if dtype == "float32" else ", float32")]
    assert reference.status == "fail"


def misread(folder: Path, cls: str, field: str, value: Any) -> None:
    data = json.loads((folder / "manifest.json").read_text())
    changed = [spec for block in data["blocks"] for spec in specs(block) if spec["is"] == cls]
    assert changed
    for spec in changed:
        spec[field] = value
    (folder / "manifest.json").write_text(json.dumps(data))
    reseal(folder)


def specs(data: Any) -> Iterator[dict[str, Any]]:
    """Every block inside a manifest's data."""
    if isinstance(data, dict):
        if "is" in data:
            yield data
        data = list(data.values())
    if isinstance(data, list):
        for value in data:
            yield from specs(value)


def test_bf16_says_why_onnx_runtime_was_not_run(exported) -> None:
    rungs = climb(exported("gemma", "bfloat16"))
    assert rungs["PyTorch / transformers"].status == "pass"
    assert rungs["ONNX Runtime / PyTorch"].status == "not run"
    assert "no bfloat16 MatMul" in rungs["ONNX Runtime / PyTorch"].note


def test_a_verdict_says_when_transformers_was_not_asked(exported, monkeypatch: pytest.MonkeyPatch) -> None:
    found = manifest.read(exported("gemma"))
    assert ladder.climb(found).verdict == "every rung that was run passed"
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    assert "not compared with transformers" in ladder.climb(found).verdict


def test_chosen_rungs_are_run_alone(exported) -> None:
    rungs = climb(exported("gemma"), rungs=["onnxruntime"])
    assert {(r.key, n, r.status) for n, r in rungs.items()} == {("onnxruntime", "ONNX Runtime / PyTorch", "pass")}


def test_a_rung_is_chosen_by_the_name_that_the_report_gives_it(exported) -> None:
    report = ladder.climb(manifest.read(exported("gemma")))
    assert tuple(dict.fromkeys(r.key for r in report.rungs)) == ladder.RUNGS


def test_a_chosen_rung_that_cannot_run_is_not_passed_over(exported) -> None:
    report = ladder.climb(manifest.read(exported("gemma", "bfloat16")), rungs=["transformers", "onnxruntime"])
    assert {r.key: r.status for r in report.rungs} == {"transformers": "pass", "onnxruntime": "not run"}
    assert not report.passed


def test_a_rung_that_is_not_there_is_an_error_that_names_those_that_are(exported) -> None:
    with pytest.raises(ExportError, match="no rung 'engin': choose among transformers, blocks, onnxruntime"):
        ladder.climb(manifest.read(exported("gemma")), rungs=["engin"])


def test_a_block_has_the_rungs_of_forms_alone(tmp_path: Path) -> None:
    folder = export_of(tmp_path, "gemma", {}, block="mlp")
    assert {r.key for r in climb(folder, rungs=["onnxruntime"]).values()} == {"onnxruntime"}
    for others in (["transformers"], ["blocks", "onnxruntime"]):
        with pytest.raises(ExportError, match="is one block, whose rungs are onnxruntime"):
            climb(folder, rungs=others)


def test_a_fault_that_cannot_be_traced_is_reported_with_the_reason(copy, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*given: object) -> str:
        raise EngineError("the process\n  died")

    monkeypatch.setattr(whole, "FORMS", [dataclasses.replace(forms.ONNX_RUNTIME, trace=stopped)])
    edit_model(copy, "AddRmsNorm", exchange_norms)
    [rung] = climb(copy, rungs=["onnxruntime"]).values()
    assert (rung.status, rung.note) == ("fail", "the process died")


def test_a_report_in_which_nothing_ran_has_not_passed() -> None:
    assert not ladder.Report([ladder.Rung("x", "not run", "why")], {}, {}).passed


def test_without_transformers_its_rung_says_how_to_get_it(exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    rung = climb(exported("gemma"))["PyTorch / transformers"]
    assert (rung.status, "pip install" in rung.note) == ("not run", True)


@pytest.mark.parametrize(("key", "value"), [("use_cache", "x"), ("rms_norm_eps", 1)])
def test_a_config_that_transformers_does_not_take_leaves_its_rung_and_says_why(
    key: str, value: object, exported
) -> None:
    found = manifest.read(exported("gemma"))
    changed = {**found.config, key: value}
    found = dataclasses.replace(found, config=changed, text_config=changed)
    [rung] = ladder.climb(found, rungs=["transformers"], tokens=2).rungs
    assert rung.status == "not run"
    assert re.match(rf"transformers does not take this config: .*{key}.*", rung.note)
    assert "\n" not in rung.note


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_prompts_are_odd_padded_and_longer_than_every_window(case: Case, exported) -> None:
    found = manifest.read(exported(case))
    prompt = stages.prompt(found)
    assert prompt.ids.shape[1] % 2 == 1
    # The length that angles change at is crossed by a stage of its own.
    assert prompt.ids.shape[1] > max(thresholds.threshold(b) for b in found.blocks if not isinstance(b, Rotary))
    assert prompt.mask[1, 0] == 0
    assert prompt.mask.any(1).all()


def test_report_files_say_the_same_in_json_and_html(copy: Path) -> None:
    found = manifest.read(copy)
    report = ladder.climb(found, rungs=EVERYWHERE)
    files.write(found, report)
    data = json.loads((copy / "report.json").read_text())
    assert data["verdict"] == report.verdict
    page = (copy / "report.html").read_text()
    assert data["passed"] is True
    assert len(data["rungs"]) == 3
    for rung in data["rungs"]:
        assert rung["name"] in page
