"""Quantising on export: the numbers that are written, what stays, and the folder as a checkpoint of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
import transformers
from arch_cases import CASES, Case
from commands import Run, runner
from decoders import Decoder, prompt
from quantised_checkpoints import tensor
from rounded import EXACT, KINDS, export, nearest, stored, tensors
from safetensors.torch import save_file
from tiny_configs import one_line
from torch import nn

from llmexport.export import archs, manifest, onnx_file, random_checkpoint, rounded_files, rounding
from llmexport.export.checkpoint import Checkpoint, open_checkpoint, read_header
from llmexport.export.cli.console import size
from llmexport.export.errors import ExportError
from llmexport.export.packed.experts import with_packed
from llmexport.export.quantize import Quantised, quantise
from llmexport.export.spec import Model
from llmexport.export.wanted import wanted_parameters
from llmexport.validate import loading
from llmexport.validate.compare import compare


def edited(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Changes tensors of a checkpoint of one file, in place."""
    [file] = folder.glob("*.safetensors")
    held = tensors(folder)
    change(held)
    save_file({n: tensor(a) for n, a in held.items()}, file, {"format": "pt"})


@pytest.mark.model
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_number_is_the_nearest_and_each_scale_that_of_compressed_tensors(kind, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(rounded_files, "CHUNK", 1000)  # several chunks a matrix, the last one shorter
    random_checkpoint.write(archs.load("llama"), tmp_path / "ck", dtype=dtype)
    export(tmp_path / "ck", tmp_path / "out", kind)
    plain, held = tensors(tmp_path / "ck"), tensors(tmp_path / "out")
    found = open_checkpoint(tmp_path / "out").matrices
    assert len(found) == 21
    for name, matrix in found.items():
        module, columns = name.removesuffix(".weight"), plain[name].shape[1]
        numbers, scales = nearest(plain[name], kind, min(columns, 128) if kind == "int4" else columns)
        assert held[f"{module}.weight_scale"].dtype == plain[name].dtype
        np.testing.assert_array_equal(held[f"{module}.weight_scale"], scales)
        np.testing.assert_array_equal(stored(held, module, kind), numbers)
        wide = scales.astype(np.float32)
        meant = numbers.astype(np.float32) * np.repeat(wide, columns // wide.shape[1], 1)
        np.testing.assert_array_equal(matrix.decode(held.__getitem__), meant)
    for name in plain.keys() - found:
        np.testing.assert_array_equal(held[name], plain[name])


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_scales_of_nothing_but_zeros_are_one(kind):
    rows = np.zeros((3, 64), ml_dtypes.bfloat16)
    rows[1, 5] = -2
    numbers, scales = rounding.ROUNDINGS[kind].round(rows, 32)
    assert scales[[0, 2]].astype(float).tolist() == [[1, 1]] * 2
    assert scales[1, 1] == 1
    zero = 0x88 if kind == "int4" else 0
    assert (numbers[[0, 2]] == zero).all()


@pytest.mark.quick
def test_scales_below_what_their_type_holds_are_one():
    rows = np.full((1, 32), 1e-7, np.float16)
    numbers, scales = rounding.ROUNDINGS["fp8"].round(rows, 32)
    assert (scales == 1).all()
    assert (numbers.astype(float) == 0).all()


def planned(case: Case, kind: str, size: int | None, folder: Path) -> tuple[Checkpoint, Model, Any, Quantised]:
    """What would be written of a tiny checkpoint of holes, whose head stays."""
    named = archs.load(case.arch)
    changes = {k: v for k, v in case.changes.items() if k != "vision_config"}
    config = {"model_type": named.model_types[0], **named.tiny, **changes}
    random_checkpoint.write(named, folder, config=config, hollow=True, part="text")
    found = open_checkpoint(folder)
    asked = onnx_file.Request(archs.choose(None, found.config), found, quantize=kind, group_size=size)
    request, model, _ = onnx_file.open_model(asked)
    found = request.checkpoint
    own = {g.name: wanted_parameters(request.arch, found, model, g.assembly) for g in model.graphs}
    return found, model, own, quantise(kind, size, False, request.arch, found, model.graphs, own, folder)


# Their matrices are [inputs, outputs].
TURNED = ("gpt2", "openai_gpt")


@pytest.mark.model
def test_what_is_written_of_every_architecture_reads_back_as_the_same_model(tmp_path):
    for i, case in enumerate(c for c in CASES if c.arch not in TURNED):
        found, model, own, made = planned(case, KINDS[i % 3], None, tmp_path / case.name)
        checkpoint = made.checkpoint
        read, again, _ = onnx_file.open_model(onnx_file.Request(archs.choose(None, checkpoint.config), checkpoint))
        assert again == with_packed(model, read.arch, checkpoint), case
        assert {g.name: wanted_parameters(read.arch, checkpoint, model, g.assembly) for g in model.graphs} == own, case
        assert checkpoint.names >= found.tensors.keys(), case
        for name, matrix in checkpoint.matrices.items():
            assert matrix.shape == found.tensors[name].shape, case
        # As large as it is, what is copied has not changed, and no two tensors overlap.
        for file in made.files:
            spans = sorted((t.offset, t.nbytes) for p in file.pieces for t in p.tensors)
            ends = [len(file.header), *(offset + size for offset, size in spans)]
            assert [offset for offset, _ in spans] == ends[:-1], case


@pytest.mark.model
def test_tables_heads_norms_routers_and_gates_stay(tmp_path):
    left = {
        "llama": "embed_tokens lm_head",
        "gemma2": "embed_tokens",
        "mixtral": "embed_tokens lm_head block_sparse_moe.gate",
        "qwen3_5_moe": "embed_tokens lm_head mlp.gate shared_expert_gate conv1d",
        "deepseek_v3": "embed_tokens lm_head mlp.gate",
        "cohere": "embed_tokens",
        "t5": "shared relative_attention_bias lm_head",
        "rwkv": "embeddings head time_mix_key time_mix_value time_mix_receptance",
    }
    for arch, words in left.items():
        found, *_, made = planned(Case(arch, "tiny"), "int8", None, tmp_path / arch)
        plain = [n for n, t in found.tensors.items() if n not in made.checkpoint.matrices and len(t.shape) > 1]
        kinds = {w for w in words.split() for n in plain if n.removesuffix(".weight").endswith(w)}
        assert kinds == set(words.split()), arch
        assert all(n.removesuffix(".weight").endswith(tuple(words.split())) for n in plain), arch


@pytest.mark.model
@pytest.mark.parametrize("arch", ["llama", "gemma2", "qwen3", "phi3", "olmo2", "cohere2", "starcoder2"])
def test_the_config_tells_which_linear_layers_of_transformers_are_quantised(arch, tmp_path):
    found, _, _, made = planned(Case(arch, "tiny"), "int4", 32, tmp_path / "ck")
    said = json.loads(made.told.files["config.json"])["quantization_config"]
    config = transformers.AutoConfig.for_model(**{k: v for k, v in found.config.items() if k != "dtype"})
    model = getattr(transformers, found.config["architectures"][0])(config)
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert linear - set(said["ignore"]) == {n.removesuffix(".weight") for n in made.checkpoint.matrices}
    assert [g["targets"] for g in said["config_groups"].values()] == [["Linear"]]
    assert said["config_groups"]["group_0"]["input_activations"] is None


@pytest.mark.model
def test_groups_are_as_large_as_fill_a_row(tmp_path):
    wide = {"hidden_size": 192, "head_dim": 32, "intermediate_size": 288, "num_attention_heads": 4}
    changed = Case("llama", "wide", {**wide, "num_hidden_layers": 1})
    *_, made = planned(changed, "int4", None, tmp_path / "a")
    shared = {n.split(".")[-2]: m.scales.block for n, m in made.checkpoint.matrices.items()}
    assert shared == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), (1, 64)),
        "o_proj": (1, 128),
        "down_proj": (1, 32),
    }
    assert made.told.notes == (
        "int4: 'model.layers.0.self_attn.q_proj.weight' (and 4 more like it) has groups of 64, "
        "as 128 do not fill its rows of 192",
        "int4: 'model.layers.0.mlp.down_proj.weight' has groups of 32, as 128 do not fill its rows of 288",
    )
    said = json.loads(made.told.files["config.json"])["quantization_config"]["config_groups"]
    assert {g["weights"]["group_size"]: g["targets"] for g in said.values()} == {
        64: ["Linear"],
        128: ["model.layers.0.self_attn.o_proj"],
        32: ["model.layers.0.mlp.down_proj"],
    }
    *_, made = planned(changed, "int4", 32, tmp_path / "b")
    assert {m.scales.block for m in made.checkpoint.matrices.values()} == {(1, 32)}
    assert made.told.notes == ()


@pytest.mark.model
def test_a_matrix_that_no_groups_fill_stays_and_is_named(tmp_path):
    narrow = Case("llama", "narrow", {"intermediate_size": 80, "num_hidden_layers": 2})
    found, *_, made = planned(narrow, "int4", None, tmp_path / "ck")
    name = "model.layers.0.mlp.down_proj.weight"
    assert name not in made.checkpoint.matrices
    assert made.checkpoint.tensors[name].dtype == found.tensors[name].dtype
    assert f"int4: '{name}' (and 1 more like it) is not rounded, no groups of 32 or more fill its rows of 80" in (
        made.told.notes
    )
    assert "model.layers.0.mlp.down_proj" in made.checkpoint.config["quantization_config"]["ignore"]


@pytest.mark.model
def test_experts_in_one_tensor_that_have_no_names_one_by_one_stay(tmp_path):
    [case] = [c for c in CASES if c.name == "gemma4_text-experts"]
    *_, made = planned(case, "fp8", None, tmp_path / "stack")
    assert any("experts.gate_up_proj' (and " in n and "is not rounded: experts in" in n for n in made.told.notes)


@pytest.mark.model
def test_experts_one_by_one_share_the_size_of_their_groups(tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 96}
    *_, made = planned(Case("mixtral", "narrow", sizes), "int4", None, tmp_path / "ck")
    experts = [m for n, m in made.checkpoint.matrices.items() if ".experts." in n]
    assert {m.scales.block for m in experts} == {(1, 32)}
    first, second = (n for n in made.told.notes if "experts" in n)
    assert first.endswith("has groups of 32, as 128 do not fill the rows of all experts")
    assert second.endswith("has groups of 32, as 128 do not fill its rows of 96")


@pytest.mark.model
@pytest.mark.parametrize(
    ("arch", "kind"),
    [("llama", k) for k in KINDS]
    + [("mixtral", "int4"), ("deepseek_v3", "int8"), ("gpt_oss", "int4"), ("glm4", "fp8")],
)
def test_the_folder_is_a_checkpoint_of_the_same_graph_and_its_logits_are_those_of_pytorch(arch, kind, tmp_path):
    random_checkpoint.write(archs.load(arch), tmp_path / "ck", shard_bytes=100_000)
    made = export(tmp_path / "ck", tmp_path / "out", kind)
    assert made.placed == "quantised"
    again = export(tmp_path / "out", tmp_path / "again", None)
    assert (tmp_path / "again/model.onnx").read_bytes() == (tmp_path / "out/model.onnx").read_bytes()
    assert again.graphs == made.graphs
    ours, theirs = (Decoder(tmp_path / "out", runner) for runner in ("torch", "onnx"))
    options = onnxruntime.SessionOptions()
    # Else products of int4 are taken in 8 bits.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    theirs.session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx", options)
    ids, mask = prompt()
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    for step in (slice(0, -1), slice(-1, None)):
        # The mask is of all tokens so far.
        so_far = mask[:, : mask.shape[1] if step.stop is None else step.stop]
        expected, found = (d.step(ids[:, step], positions[:, step], so_far) for d in (ours, theirs))
        difference = compare(expected, found, mask[:, step] != 0)
        assert difference.scale > 0.5
        assert difference.excess(EXACT) <= 1, difference


@pytest.mark.model
def test_a_vision_tower_stays_in_either_part(tmp_path):
    random_checkpoint.write(archs.load("qwen3_5"), tmp_path / "ck", part="all")
    for part in ("all", "text"):
        made = export(tmp_path / "ck", tmp_path / part, "int8", part=part)
        names = open_checkpoint(tmp_path / part).matrices
        assert names
        assert not [n for n in names if "visual" in n]
        assert any("a vision tower is not" in n for n in made.notes)
        assert {w.file for w in made.weights} == {p.name for p in (tmp_path / part).glob("*.safetensors")}
    assert len(made.graphs) == 1
    # Some published configs tell of it where they tell of the text model.
    config = json.loads((tmp_path / "all" / "config.json").read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (tmp_path / "all" / "config.json").write_text(json.dumps(config))
    again = export(tmp_path / "all", tmp_path / "again", None)
    assert [g.name for g in again.graphs] == ["vision", "decoder"]
    assert "visual" in dict(loading.load(again, None).model.named_children())


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(monkeypatch, capsys)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    random_checkpoint.write(archs.load("llama"), tmp_path / "ck")
    return tmp_path / "ck"


@pytest.mark.model
def test_the_command_says_what_is_new_and_replaces_what_it_wrote(run, checkpoint, tmp_path):
    edited(checkpoint, lambda held: held.update({"lm_head.weight": held["lm_head.weight"].astype(np.float16)}))
    (checkpoint / "generation_config.json").write_text("{}")
    command = ("onnx", "--checkpoint", checkpoint, "-o", tmp_path / "out", "--quantize", "int4", "--digest")
    code, out, err = run(*command, "--group-size", 32)
    assert code == 0
    weights = (tmp_path / "out/model.safetensors").stat().st_size
    assert f"1 files, {size(weights)}, quantised" in " ".join(out.split())
    new = sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    assert f"new bytes on disk {size(new)}" in " ".join(out.split())
    assert "note" not in err
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if p.suffix != ".json"}
    read = manifest.read(tmp_path / "out")
    assert [w.whole_sha256 is None for w in read.weights] == [False]
    assert [(w.bytes, w.placed) for w in read.weights] == [(weights, "quantised")]
    assert {p.name for p in (tmp_path / "out").iterdir()} == set(read.files)
    assert run(*command, "--group-size", 32, "--force")[0] == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if p.suffix != ".json"} == before


@pytest.mark.model
def test_files_are_no_larger_than_those_of_the_checkpoint_and_each_tensor_is_aligned(tmp_path):
    random_checkpoint.write(archs.load("llama"), tmp_path / "ck", shard_bytes=60_000)
    made = export(tmp_path / "ck", tmp_path / "out", "int4")
    assert 1 < len(made.weights) < len(list((tmp_path / "ck").glob("*.safetensors")))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    for file in made.weights:
        held, _ = read_header(tmp_path / "out" / file.file)
        assert {n for n, f in index["weight_map"].items() if f == file.file} == held.keys()
        assert sum(t.nbytes for t in held.values()) <= 61_000
        sizes = {"I64": 8, "I32": 4, "BF16": 2}
        assert not [t for t in held.values() if t.offset % sizes[t.dtype]]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in open_checkpoint(tmp_path / "out").tensors.values())


@pytest.mark.model
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--quantize int4 --block layer", "not --block layer: leave one of them out"),
        ("--quantize int4 --block all", "not --block all: leave one of them out"),
        ("--quantize int4 --weights copy", "not --weights copy: leave one of them out"),
        ("--quantize fp8 --weights link", "not --weights link: leave one of them out"),
        ("--quantize int8 --part vision", "not --part vision: leave one of them out"),
        ("--quantize int8 --group-size 32", "int8 has a scale for each row: leave it out"),
        ("--group-size 32", "--group-size is that of --quantize int4: pass both, or neither"),
        ("--quantize-head", "--quantize-head rounds as --quantize does: pass both, or neither"),
        ("--quantize int4 --group-size 48", "'48' is not one of"),
        ("--quantize int3", "'int3' is not one of 'int4', 'int8', 'fp8'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(options, said, run, checkpoint, tmp_path):
    code, _, err = run("onnx", "--checkpoint", checkpoint, "-o", tmp_path / "out", *options.split())
    assert code == 2
    assert said in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.model
def test_sizes_that_are_none_are_refused_of_python_too(checkpoint, tmp_path):
    for kind, group, said in [("int4", 48, "choose one of 128, 64, 32"), ("int2", None, "choose one of int4")]:
        with pytest.raises(ExportError, match=said):
            export(checkpoint, tmp_path / "out", kind, group)


@pytest.mark.model
def test_a_quantised_checkpoint_is_not_quantised_again(tmp_path):
    random_checkpoint.write(archs.load("llama"), tmp_path / "ck")
    export(tmp_path / "ck", tmp_path / "out", "int8")
    with pytest.raises(ExportError, match="is quantised, and is exported as it is: leave --quantize out") as error:
        export(tmp_path / "out", tmp_path / "again", "int4")
    one_line(error.value)


@pytest.mark.model
def test_a_model_of_turned_matrices_has_nothing_to_quantise(tmp_path):
    random_checkpoint.write(archs.load("gpt2"), tmp_path / "ck")
    with pytest.raises(ExportError, match="gpt2 has no linear layer here whose weight") as error:
        export(tmp_path / "ck", tmp_path / "out", "int8")
    one_line(error.value)


@pytest.mark.model
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_named_and_nothing_is_left(value, checkpoint, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"

    def damage(held: dict[str, np.ndarray]) -> None:
        held[name] = held[name].copy()
        held[name][7, 9] = value

    edited(checkpoint, damage)
    with pytest.raises(ExportError, match=f"'{name}' holds a number that is not finite") as error:
        export(checkpoint, tmp_path / "out", "int4")
    one_line(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["ck"]


@pytest.mark.model
def test_a_disk_that_is_too_small_is_told_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    monkeypatch.setattr(onnx_file, "build", lambda *_: pytest.fail("something was traced"))
    with pytest.raises(
        ExportError, match=r"cannot write 0\.0001.* GB of weights to .*: free space, or choose"
    ) as error:
        export(checkpoint, tmp_path / "out", "int4")
    one_line(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["ck"]


@pytest.mark.model
def test_an_interrupt_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    calls = []

    def stop(*_: object) -> None:
        calls.append(None)
        if len(calls) == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(rounded_files.interrupt, "check", stop)
    with pytest.raises(KeyboardInterrupt):
        export(checkpoint, tmp_path / "out", "int4")
    assert [p.name for p in tmp_path.iterdir()] == ["ck"]


CHILD = """
import sys
from pathlib import Path
from llmexport.export import archs, onnx_file
from llmexport.export.checkpoint import open_checkpoint
found = open_checkpoint(Path(sys.argv[1]))
onnx_file.write(onnx_file.Request(archs.choose(None, found.config), found, quantize="int4"), Path(sys.argv[2]))
# Not ru_maxrss, which begins with what the parent had.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
def test_a_model_of_70b_is_quantised_in_less_memory_than_its_table_takes(tmp_path):
    """Two of its layers, in their real widths, and both ends."""
    widths = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    config = {**archs.load("llama").tiny, **widths, "vocab_size": 128256, "num_hidden_layers": 2, "head_dim": 128}
    random_checkpoint.write(archs.load("llama"), tmp_path / "ck", config=config, hollow=True, shard_bytes=4 * 2**30)
    child = [sys.executable, "-c", CHILD, str(tmp_path / "ck"), str(tmp_path / "out")]
    done = subprocess.run(child, capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 1.5e9
    shutil.rmtree(tmp_path / "out")
