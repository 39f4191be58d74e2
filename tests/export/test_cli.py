"""The commands as a user meets them: what they print, and how they refuse."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Run, runner
from layouts import mxfp4
from safetensors.numpy import load_file, save_file

from llmexport.export import archs, device, engine, output, random_checkpoint, trace
from llmexport.export.cli.console import Console
from llmexport.export.cli.main import COMMANDS
from llmexport.export.device import Device
from llmexport.export.errors import EngineError
from llmexport.plugins import library
from llmexport.plugins.spec import all_ops


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a command in this process, in an empty folder; returns its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    return runner(monkeypatch, capsys)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A fresh checkpoint in one shard per 60 kB, for a test to damage."""
    random_checkpoint.write(archs.load("gemma"), tmp_path / "ck", shard_bytes=60_000)
    return tmp_path / "ck"


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def edit_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Changes the tensors of the first shard, and the index with them."""
    shard = first_shard(folder)
    tensors = load_file(shard)
    before = set(tensors)
    change(tensors)
    save_file(tensors, shard)
    edit_index(folder, lambda m: [m.pop(n) for n in before - set(tensors)] and None)
    edit_index(folder, lambda m: m.update(dict.fromkeys(tensors, shard.name)))


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def truncate(folder: Path) -> None:
    shard = first_shard(folder)
    os.truncate(shard, shard.stat().st_size - 100)


def long_header(folder: Path) -> None:
    shard = first_shard(folder)
    shard.write_bytes((10**6).to_bytes(8, "little") + shard.read_bytes()[8:])


def edit_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    shard = first_shard(folder)
    data = shard.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def entries(header: dict[str, Any]) -> list[dict[str, Any]]:
    return [e for n, e in header.items() if n != "__metadata__"]


def overlap(header: dict[str, Any]) -> None:
    second = sorted(entries(header), key=lambda e: e["data_offsets"])[1]
    second["data_offsets"] = [b - 2 for b in second["data_offsets"]]


def out_of_range(header: dict[str, Any]) -> None:
    last = max(entries(header), key=lambda e: e["data_offsets"])
    last["data_offsets"][1] += 10**6


def reshape(tensors: dict[str, np.ndarray]) -> None:
    name = next(n for n, t in tensors.items() if t.ndim == 2)
    tensors[name] = tensors[name][:-1]


def retype(tensors: dict[str, np.ndarray]) -> None:
    name = next(iter(tensors))
    tensors[name] = tensors[name].astype(np.int32)


def drop(folder: Path, end: str) -> None:
    """Takes away the first tensor whose name ends so."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(n for n in index if n.endswith(end))
    tensors = load_file(folder / index[name])
    del tensors[name]
    save_file(tensors, folder / index[name])
    edit_index(folder, lambda m: m.pop(name) and None)


def only_head(tensors: dict[str, np.ndarray]) -> None:
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


BAD: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no such folder": (shutil.rmtree, ["ck"]),
    "no config.json": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "config of another family": (lambda f: edit_config(f, model_type="bart"), ["bart", "gemma", "qwen2"]),
    "unknown key": (lambda f: edit_config(f, final_logit_softcapping=30.0), ["final_logit_softcapping=30.0"]),
    "unsupported value": (lambda f: edit_config(f, hidden_act="relu"), ["hidden_act", "relu"]),
    "missing shard": (lambda f: first_shard(f).unlink(), ["model-00001-of-"]),
    "truncated shard": (truncate, ["model-00001-of-"]),
    "header longer than the file": (long_header, ["model-00001-of-", "header"]),
    "overlapping offsets": (lambda f: edit_header(f, overlap), ["model-00001-of-"]),
    "offsets out of range": (lambda f: edit_header(f, out_of_range), ["model-00001-of-"]),
    "wrong shape": (lambda f: edit_tensors(f, reshape), ["model.embed_tokens.weight", "[255, 64]", "[256, 64]"]),
    "wrong dtype": (lambda f: edit_tensors(f, retype), ["I32", "BF16"]),
    "missing tensor": (lambda f: edit_tensors(f, lambda t: t.popitem() and None), ["lacks 1 tensors"]),
    "unexpected tensors": (
        lambda f: edit_tensors(f, lambda t: t.update({f"x.{i}": np.zeros(2, np.float32) for i in range(12)})),
        ["12 tensors", "x.0", "and 2 more"],
    ),
    "index that leaves the folder": (
        lambda f: edit_index(f, lambda m: m.update({next(iter(m)): "../other.safetensors"})),
        ["../other.safetensors"],
    ),
    "layers that do not fit the config": (lambda f: edit_config(f, num_hidden_layers=2), ["layers.2."]),
    "more layers than there are": (
        lambda f: edit_config(f, num_hidden_layers=4096),
        ["num_hidden_layers 4096", "holds 3 layers"],
    ),
    "another kind of head": (
        lambda f: edit_config(f, architectures=["GemmaForSequenceClassification"]),
        ["GemmaForSequenceClassification", "GemmaForCausalLM"],
    ),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), ["adapter", "merge"]),
    "tied table stored as a head": (lambda f: edit_tensors(f, only_head), ["lacks 1 tensors", "embed_tokens"]),
    "a number for architectures": (lambda f: edit_config(f, architectures=5), ["architectures 5", "GemmaForCausalLM"]),
    "a vocabulary of 2**62": (lambda f: edit_config(f, vocab_size=2**62), ["vocab_size is 4611686018427387904"]),
    "heads that do not divide": (lambda f: edit_config(f, num_key_value_heads=3), ["4 attention heads", "3"]),
    "only pickled weights": (
        lambda f: ([p.unlink() for p in f.glob("*.safe*")], (f / "pytorch_model.bin").write_bytes(b"x")),
        ["safetensors"],
    ),
}


# The same of one with experts in 4 bits.
BAD_EXPERTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "more experts than are stored": (lambda f: edit_config(f, num_local_experts=8), ["is [4, ", "makes it [8, "]),
    "fewer experts than are stored": (lambda f: edit_config(f, num_local_experts=2), ["is [4, ", "makes it [2, "]),
    "more experts a token than there are": (
        lambda f: edit_config(f, num_experts_per_tok=9),
        ["num_experts_per_tok is 9, there are 4 experts"],
    ),
    "scales without blocks": (lambda f: drop(f, "_blocks"), ["lacks 1 tensors", "_blocks"]),
    "blocks without scales": (lambda f: drop(f, "_scales"), ["lacks 1 tensors", "_scales"]),
    "4 bits that the config does not tell of": (
        lambda f: edit_config(f, quantization_config=None),
        ["experts are in MXFP4", "config.json says nothing"],
    ),
    "another quantisation": (
        lambda f: edit_config(f, quantization_config={"quant_method": "fp8"}),
        ["quantised (fp8)", "and no tensor is"],
    ),
    "layer_types that are too short": (
        lambda f: edit_config(f, layer_types=["full_attention"]),
        ["layer_types must list 3 kinds"],
    ),
    "an unknown kind of layer": (
        lambda f: edit_config(f, layer_types=["full_attention", "mamba", "full_attention"]),
        ["layer_types names mamba, known are"],
    ),
    "an unknown type of RoPE": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "ntk", "factor": 2.0}),
        ["RoPE of type 'ntk' is not supported"],
    ),
    "nothing of RoPE": (lambda f: edit_config(f, rope_parameters=None), ["says nothing of RoPE", "rope_parameters"]),
    "a window beyond int32": (lambda f: edit_config(f, sliding_window=2**32 + 2), ["sliding_window is 4294967298"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_checkpoint_gives_one_clear_line_and_leaves_nothing(name: str, run: Run, checkpoint: Path) -> None:
    refuses(run, checkpoint, *BAD[name])


@pytest.mark.parametrize("name", BAD_EXPERTS)
def test_a_bad_checkpoint_of_experts_gives_one_clear_line(name: str, run: Run, tmp_path: Path) -> None:
    refuses(run, mxfp4(tmp_path / "ck"), *BAD_EXPERTS[name], "--block", "moe")


def refuses(run: Run, checkpoint: Path, damage: Callable[[Path], object], words: list[str], *options: str) -> None:
    damage(checkpoint)
    before = contents(checkpoint.parent)
    code, out, err = run("onnx", "--checkpoint", checkpoint, "-o", "out", "-q", *options)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    assert contents(checkpoint.parent) == before


def test_an_unknown_architecture_is_answered_with_the_nearest_names(run: Run) -> None:
    code, _, err = run("onnx", "--arch", "gema", "-o", "out")
    assert (code, "did you mean gemma" in err) == (2, True)


def test_an_architecture_that_is_not_the_configs_is_refused(run: Run, checkpoint: Path) -> None:
    code, _, err = run("onnx", "--arch", "llama", "--checkpoint", checkpoint, "-o", "out")
    assert code == 2
    assert "--arch llama exports model_type llama, skywork, but config.json says 'gemma'" in err


def test_an_existing_output_is_refused_without_force_and_replaced_with_it(run: Run, checkpoint: Path) -> None:
    assert run("onnx", "--checkpoint", checkpoint, "-o", "out")[0] == 0
    (checkpoint.parent / "out" / "model.onnx").write_text("x")
    before = contents(checkpoint.parent)
    code, _, err = run("onnx", "--checkpoint", checkpoint, "-o", "out")
    assert (code, "--force" in err) == (2, True)
    assert contents(checkpoint.parent) == before
    assert run("onnx", "--checkpoint", checkpoint, "-o", "out", "--force")[0] == 0
    assert (checkpoint.parent / "out" / "model.onnx").read_bytes() != b"x"


def test_what_a_user_put_into_an_export_is_named_and_kept(run: Run, checkpoint: Path) -> None:
    assert run("onnx", "--checkpoint", checkpoint, "-o", "out")[0] == 0
    (checkpoint.parent / "out" / "mine.txt").write_text("x")
    before = contents(checkpoint.parent)
    code, _, err = run("onnx", "--checkpoint", checkpoint, "-o", "out", "--force", "-q")
    assert (code, "also holds 'mine.txt'" in err) == (2, True)
    assert contents(checkpoint.parent) == before


def test_force_does_not_replace_a_folder_that_is_no_export(run: Run, checkpoint: Path) -> None:
    (checkpoint.parent / "home").mkdir()
    (checkpoint.parent / "home" / "thesis.txt").write_text("x")
    code, _, err = run("onnx", "--checkpoint", checkpoint, "-o", "home", "--force")
    assert (code, "manifest.json" in err) == (2, True)
    assert (checkpoint.parent / "home" / "thesis.txt").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_disk_that_refuses_gives_one_line_and_keeps_the_old_output(
    code: int, run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("onnx", "--checkpoint", checkpoint, "-o", "out")[0] == 0
    before = contents(checkpoint.parent)

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code), "out")

    monkeypatch.setattr(output.os, "fsync", refuse)
    exit_code, _, err = run("onnx", "--checkpoint", checkpoint, "-o", "out", "--force", "-q")
    assert exit_code == 2
    assert err.count("\n") == 1
    assert os.strerror(code) in err
    assert contents(checkpoint.parent) == before


def test_ctrl_c_at_any_step_leaves_everything_as_it_was(
    run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("onnx", "--checkpoint", checkpoint, "-o", "out")[0] == 0
    before = contents(checkpoint.parent)
    steps: list[str] = []

    def stop_at(limit: int) -> Callable[..., None]:
        def progress(self: Console, what: str, done: int, of: int) -> None:
            steps.append(what)
            if len(steps) > limit:
                raise KeyboardInterrupt

        return progress

    monkeypatch.setattr(Console, "progress", stop_at(10**6))
    assert run("onnx", "--checkpoint", checkpoint, "-o", "other")[0] == 0
    count = len(steps)
    shutil.rmtree(checkpoint.parent / "other")
    assert count > 5
    for limit in range(count):
        steps.clear()
        monkeypatch.setattr(Console, "progress", stop_at(limit))
        code, _, err = run("onnx", "--checkpoint", checkpoint, "-o", "out", "--force")
        assert code == 2
        assert err.strip().startswith("error: interrupted")
        assert contents(checkpoint.parent) == before


def test_a_bug_keeps_its_traceback(run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setenv("LLMEXPORT_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(trace, "trace_block", broken)
    code, out, err = run("onnx", "--checkpoint", checkpoint, "-o", "out", "--json")
    assert (code, "RuntimeError: a bug" in json.loads(out)["error"]) == (3, True)
    assert "Traceback (most recent call last)" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, run: Run) -> None:
    code, out, _ = run(*(["plugins", "build"] if command == "plugins" else [command]), "--help")
    assert (code, "--json" in out, "--quiet" in out) == (0, True, True)


def test_json_is_all_that_stdout_holds(run: Run, checkpoint: Path) -> None:
    _, out, _ = run("onnx", "--checkpoint", checkpoint, "-o", "out", "--json")
    assert json.loads(out)["arch"] == "gemma"
    _, out, _ = run("archs", "--json")
    assert {a["arch"] for a in json.loads(out)} >= {"gemma", "llama", "mistral", "qwen2"}


def test_json_errors_are_json_too(run: Run) -> None:
    code, out, err = run("validate", "nowhere", "--json")
    assert (code, json.loads(out)["error"]) == (2, err.removeprefix("error: ").strip())


def test_what_is_left_out_is_noted_on_stderr_and_in_the_json(run: Run, checkpoint: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "attn_factor": 0.5}
    edit_config(checkpoint, rope_parameters=rope)
    code, out, err = run("onnx", "--checkpoint", checkpoint, "-o", "out", "--block", "norm", "--json")
    [note] = json.loads(out)["notes"]
    assert code == 0
    assert "attn_factor 0.5 is left out, as transformers does" in note
    assert f"note: {note}\n" in err


def test_quiet_says_nothing(run: Run, checkpoint: Path) -> None:
    assert run("onnx", "--checkpoint", checkpoint, "-o", "out", "--quiet") == (0, "", "")


def test_the_built_in_config_exports_without_a_checkpoint(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("onnx", "--arch", "gemma", "--block", "attention", "-o", "out")
    assert (code, "2 Rope" in out) == (0, True)
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_windows_keep_the_slots_that_are_asked_for(run: Run) -> None:
    static = ("onnx", "--arch", "mistral", "--cache", "static", "--max-tokens", "64")
    for slots, asked in (("last", ()), ("all", ("--window-slots", "all"))):
        code, out, _ = run(*static, *asked, "-o", slots, "--json")
        assert (code, json.loads(out)["window_slots"]) == (0, slots)


def test_block_all_makes_a_folder_a_block(run: Run, tmp_path: Path) -> None:
    assert run("onnx", "--arch", "gemma", "--block", "all", "-o", "out")[0] == 0
    assert {"attention", "mlp", "norm", "head"} < {p.name for p in (tmp_path / "out").iterdir()}
    assert run("onnx", "--arch", "gemma", "--block", "all", "-o", "out", "--force")[0] == 0


def test_an_unknown_block_is_answered_with_the_blocks(run: Run) -> None:
    code, _, err = run("onnx", "--arch", "gemma", "--block", "moe", "-o", "out")
    assert (code, "attention, " in err) == (2, True)


def test_a_failed_rung_is_exit_code_1(run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmexport.validate import tolerance
    from llmexport.validate.tolerance import Tolerance

    run("onnx", "--checkpoint", checkpoint, "-o", "out")
    monkeypatch.setitem(tolerance.TOLERANCE, "float32", Tolerance(1e-12, 1e-12))
    code, out, _ = run("validate", "out")
    assert (code, "fail" in out) == (1, True)


def test_doctor_names_the_command_that_fixes_what_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmexport.export.cli import doctor

    found = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "" if name == "tensorrt-rtx" else found(name))
    code, out, _ = run("doctor")
    assert (code, "pip install tensorrt-rtx" in out) == (2, True)


@pytest.mark.parametrize("here", [Device("NVIDIA H200", (9, 0)), Device("NVIDIA L4", (8, 9)), "no GPU is found here"])
def test_doctor_says_what_does_not_run_on_the_gpu(
    run: Run, monkeypatch: pytest.MonkeyPatch, here: Device | str
) -> None:
    from llmexport.export.cli import doctor

    monkeypatch.setattr(doctor, "_loadable", lambda library: library)
    monkeypatch.setattr(device, "first", lambda: here)
    _, out, _ = run("doctor", "--json")
    [gpu] = [f for f in json.loads(out) if f["what"] == "GPU"]
    fix = "engines of tensorrt-rtx run not on the NVIDIA H200 (compute capability 9.0) that is here: install tensorrt, "
    fixes = {"NVIDIA H200": fix + "and take --backend tensorrt", "NVIDIA L4": ""}
    wanted = (here.text, fixes[here.name]) if isinstance(here, Device) else ("", here)
    assert (gpu["found"], gpu["fix"]) == wanted


def test_deploy_asks_for_a_missing_backend_before_it_does_anything(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = run("deploy", "--arch", "gemma", "--backend", "tensorrt")
    assert (code, "pip install tensorrt " in err) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_ops_says_what_the_library_serves(run: Run) -> None:
    _, out, _ = run("ops", "--json")
    listed = {o["op"]: o for o in json.loads(out)["ops"]}
    assert listed.keys() == all_ops().keys()
    assert listed["MoeRoute"]["outputs"] == ["weights", "experts"]
    assert listed["Rope"]["inputs"] == {"x": ["B", "H", "T", "D"], "cos": ["B", "T", "R"], "sin": ["B", "T", "R"]}
    assert listed["AddRmsNorm"]["attributes"]["epsilon"] == "float"


def test_plugins_build_without_nvcc_names_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.shutil, "which", lambda name: None if "nvcc" in name else f"/usr/bin/{name}")
    code, _, err = run("plugins", "build")
    assert (code, "apt install cuda-nvcc" in err) == (2, True)


def test_deploy_does_the_three_steps_and_prints_one_story(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("deploy", "--arch", "gemma")
    assert code == 0
    for word in ("6 AddRmsNorm", "3 gated_act", "model.plan", "ONNX Runtime / PyTorch", "TensorRT's network", "decode"):
        assert word in out
    report = json.loads((tmp_path / "gemma-deploy" / "report.json").read_text())
    assert report["passed"]
    assert run("deploy", "--arch", "gemma", "-q")[0] == 2
    assert run("deploy", "--arch", "gemma", "-q", "--force")[0] == 0


def test_a_deploy_that_does_not_end_leaves_the_earlier_one(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run("deploy", "--arch", "gemma", "-q")[0] == 0
    before = contents(tmp_path)
    for stop in (KeyboardInterrupt, EngineError("no engine")):
        monkeypatch.setattr(engine, "build", raising(stop))
        assert run("deploy", "--arch", "gemma", "-q", "--force")[0] == 2
        assert contents(tmp_path) == before


def raising(error: Any) -> Callable[..., None]:
    def broken(*_: object, **__: object) -> None:
        raise error

    return broken


def test_random_weights_never_replace_a_checkpoint_that_is_not_random(run: Run, checkpoint: Path) -> None:
    (checkpoint / "llmexport-random.json").unlink()
    before = contents(checkpoint)
    assert run("checkpoint", "--arch", "gemma", "-o", checkpoint, "--force")[0] == 2
    assert contents(checkpoint) == before


@pytest.mark.parametrize("arguments", [("validate", "x", "--seed", "-1"), ("onnx",), ("engine", "x", "--backend", "y")])
def test_wrong_options_are_one_json_error_with_exit_code_2(arguments: tuple[str, ...], run: Run) -> None:
    code, out, _ = run(*arguments, "--json")
    assert (code, list(json.loads(out))) == (2, ["error"])


def test_the_folder_of_all_blocks_names_its_blocks_to_who_validates_it(run: Run) -> None:
    run("onnx", "--arch", "gemma", "--block", "all", "-o", "out")
    code, _, err = run("validate", "out")
    assert (code, "head, layer, mask" in err) == (2, True)


def test_an_output_folder_whose_parent_cannot_be_written_is_one_line(run: Run) -> None:
    code, _, err = run("onnx", "--arch", "gemma", "-o", "no/such/place/out", "-q")
    assert (code, err.count("\n")) == (2, 1)
