"""What a model wants is held against the checkpoint before anything is traced, and costs no more than that has."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from arch_cases import CASES
from safetensors.numpy import load_file, save_file
from tiny_configs import one_line

from llmexport.export import archs, graph_file, random_checkpoint, wanted
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.errors import ExportError
from llmexport.export.graph_file import load_block
from llmexport.export.onnx_file import Request, fill, open_model, read_model


@pytest.fixture
def no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def trace(*_: object) -> None:
        raise AssertionError("traced before the checkpoint was checked")

    monkeypatch.setattr(graph_file, "trace_all", trace)


def opened(folder: Path, arch: str, **changes: object) -> Request:
    """The architecture's tiny checkpoint of holes, whose config says something else."""
    if not folder.exists():
        random_checkpoint.write(archs.load(arch), folder, hollow=True)
    checkpoint = open_checkpoint(folder)
    config = {k: v for k, v in (checkpoint.config | changes).items() if v is not ...}
    return Request(archs.choose(None, config), dataclasses.replace(checkpoint, config=config))


def holding(request: Request, *names: str) -> Request:
    """The same of a checkpoint that holds these tensors too."""
    some = next(iter(request.checkpoint.tensors.values()))
    tensors = {**request.checkpoint.tensors, **{n: dataclasses.replace(some, name=n) for n in names}}
    return dataclasses.replace(request, checkpoint=dataclasses.replace(request.checkpoint, tensors=tensors))


def refusal(request: Request, folder: Path) -> str:
    with pytest.raises(ExportError) as error:
        fill(request, folder)
    return one_line(error.value)


@pytest.mark.usefixtures("no_trace")
@pytest.mark.parametrize(
    ("arch", "changes", "said"),
    [
        ("llama", {"hidden_size": 96}, "is [256, 64] in the checkpoint, config.json makes it [256, 96]"),
        ("llama", {"vocab_size": 300}, "makes it [300, 64]"),
        ("llama", {"num_attention_heads": 8, "head_dim": 16}, "q_proj.weight is [64, 64] in the checkpoint"),
        ("llama", {"intermediate_size": 2**20}, "makes it [1048576, 64]"),
        ("llama", {"attention_bias": True}, "lacks 12 tensors"),
        ("llama", {"num_hidden_layers": 4}, "num_hidden_layers 4, the checkpoint holds 3 layers"),
        ("llama", {"num_hidden_layers": 2}, "holds 9 tensors that this architecture does not use"),
        ("mixtral", {"num_local_experts": 4096}, "asks for more than 1120 tensors"),
        ("mixtral", {"num_local_experts": 5}, "lacks 9 tensors"),
        ("qwen3_5_moe", {"num_experts": 4096}, "makes it [4096, "),
    ],
)  # fmt: skip
def test_a_config_that_does_not_fit_is_told_before_a_trace(arch, changes, said, tmp_path):
    assert said in refusal(opened(tmp_path / "ck", arch, **changes), tmp_path)


AHEAD = [n for n in archs.names() if archs.load(n).ahead]


@pytest.mark.usefixtures("no_trace")
@pytest.mark.parametrize("arch", AHEAD)
def test_a_module_that_guesses_ahead_is_passed_over_where_it_follows_the_layers(arch, tmp_path):
    request = opened(tmp_path / "ck", arch)
    own = ("eh_proj", "enorm", "hnorm", "embed_tokens", "shared_head.head", "shared_head.norm")
    own += ("input_layernorm", "self_attn.o_proj", "mlp.gate", "mlp.experts.7.down_proj")
    module = [f"model.layers.3.{n}.weight" for n in own]
    # Who comes to tracing has checked.
    with pytest.raises(AssertionError, match="traced"):
        fill(holding(request, *module), tmp_path)
    # Of the layer after it, of a layer that the config does not count, and of no layer that there is.
    strays = ("4.enorm", "3.enorm.extra", "3.mlp.experts.8.down_proj", "3.self_attn.gate")
    for names in (*([*module, f"model.layers.{s}.weight"] for s in strays), ["model.layers.3.input_layernorm.weight"]):
        line = refusal(holding(request, *names), tmp_path)
        assert f"holds 1 tensors that this architecture does not use: {names[-1]}" in line


@pytest.mark.usefixtures("no_trace")
def test_keys_and_values_are_passed_over_in_layers_that_read_anothers_alone(tmp_path):
    case = next(c for c in CASES if c.name == "gemma4_text-shared-keys")
    named = archs.load(case.arch)
    random_checkpoint.write(named, tmp_path / "ck", config={**named.tiny, **case.changes}, hollow=True)
    request = opened(tmp_path / "ck", case.arch, model_type=case.arch)
    published = [f"model.layers.{i}.self_attn.{n}.weight" for i in (2, 3, 4) for n in ("k_proj", "v_proj", "k_norm")]
    with pytest.raises(AssertionError, match="traced"):
        fill(holding(request, *published), tmp_path)
    for stray in ("5.self_attn.k_proj.weight", "4.self_attn.v_norm.weight", "3.self_attn.k_proj.bias"):
        line = refusal(holding(request, *published, f"model.layers.{stray}"), tmp_path)
        assert f"holds 1 tensors that this architecture does not use: model.layers.{stray}" in line


@pytest.mark.usefixtures("no_trace")
def test_values_of_a_layer_whose_keys_are_its_values_are_refused(tmp_path):
    stray = "model.layers.2.self_attn.v_proj.weight"
    line = refusal(holding(opened(tmp_path / "ck", "gemma4_text"), stray), tmp_path)
    assert f"holds 1 tensors that this architecture does not use: {stray}" in line


@pytest.mark.usefixtures("no_trace")
@pytest.mark.parametrize("names", ["as published", "of another kind"])
def test_a_config_of_millions_of_experts_costs_what_the_checkpoint_holds(names, tmp_path, monkeypatch):
    request = opened(tmp_path / "ck", "mixtral", num_local_experts=4096, num_hidden_layers=4096)
    if names == "of another kind":
        held = {f"x.{n}": t for n, t in request.checkpoint.tensors.items()}
        request = dataclasses.replace(request, checkpoint=dataclasses.replace(request.checkpoint, tensors=held))
    made = []
    real = wanted.checkpoint_name
    monkeypatch.setattr(wanted, "checkpoint_name", lambda *a: made.append(1) or real(*a))
    line = refusal(request, tmp_path)
    assert "the checkpoint holds" in line
    assert len(made) < 50


def test_a_random_checkpoint_of_millions_of_tensors_is_refused_before_they_are_made(tmp_path):
    tiny = dict(archs.load("mixtral").tiny) | {"num_local_experts": 4096, "num_hidden_layers": 4096}
    with pytest.raises(ExportError, match="asks for more than 262144 tensors"):
        random_checkpoint.write(archs.load("mixtral"), tmp_path / "ck", config=tiny, hollow=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("hollow", "hidden", "said"), [(True, 2**20, "TB of weights, at most 18"), (False, 2**16, "GB are free")]
)
def test_a_random_checkpoint_beyond_any_disk_is_refused(hollow, hidden, said, tmp_path):
    sizes = {"hidden_size": hidden, "intermediate_size": hidden, "vocab_size": hidden, "num_hidden_layers": 200}
    tiny = dict(archs.load("llama").tiny) | sizes | {"num_attention_heads": 64, "num_key_value_heads": 64}
    with pytest.raises(ExportError) as error:
        random_checkpoint.write(archs.load("llama"), tmp_path / "ck", config=tiny, hollow=hollow)
    assert said in one_line(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arch", ["gpt_oss", "llama4", "qwen3_5_moe"])
@pytest.mark.model
def test_what_is_known_before_a_trace_is_what_the_graph_takes(arch):
    for block in {s.block for s in read_model(archs.load(arch), archs.load(arch).tiny).steps}:
        ports = {p.name for p in block.inputs}
        graph = load_block(block, "float32").graph
        taken = {
            v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in graph.input if v.name not in ports
        }
        assert {path: held.shape for path, held in wanted.load_parameters(block).items()} == taken


def renamed(folder: Path, rename, drop: str = "") -> Path:
    """The checkpoint in one file, its tensors renamed."""
    held = {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}
    for path in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        path.unlink()
    save_file({rename(n): t for n, t in held.items() if n != drop}, folder / "model.safetensors")
    return folder


def base(name: str) -> str:
    return name.removeprefix("model.")


@pytest.mark.parametrize("arch", ["qwen3", "gemma2", "qwen3_5_moe"])
def test_a_base_model_with_a_tied_table_has_all_its_tensors(arch, tmp_path):
    """Numbers do not change with a name: each tensor of the checkpoint is used, under the name it has there."""
    tiny = dict(archs.load(arch).tiny) | {"tie_word_embeddings": True}
    random_checkpoint.write(archs.load(arch), tmp_path / "ck", config=tiny)
    plain = open_checkpoint(tmp_path / "ck")
    checkpoint = open_checkpoint(renamed(tmp_path / "ck", base))
    request, model, [note] = open_model(Request(archs.choose(None, checkpoint.config), checkpoint))
    found = wanted.wanted_parameters(request.arch, checkpoint, model, model.graphs[0].assembly)
    known = wanted.wanted_parameters(archs.load(arch), plain, model, model.graphs[0].assembly)
    assert {s: {p: base(w.name) for p, w in own.items()} for s, own in known.items()} == {
        s: {p: w.name for p, w in own.items()} for s, own in found.items()
    }
    assert {n for own in found.values() for w in own.values() for n in w.sources} == checkpoint.tensors.keys()
    assert "its names lack 'model.'" in note


@pytest.mark.usefixtures("no_trace")
def test_a_base_model_without_a_head_is_told_so(tmp_path):
    random_checkpoint.write(archs.load("qwen3"), tmp_path / "ck")
    folder = renamed(tmp_path / "ck", base, drop="lm_head.weight")
    line = refusal(opened(folder, "qwen3"), tmp_path)
    assert line.startswith("checkpoint lacks 1 tensors that its config.json asks for: lm_head.weight. ")
    assert "A base model has no head that gives logits: take the whole model that it is the base of" in line


@pytest.mark.usefixtures("no_trace")
def test_names_with_a_wrapper_before_them_are_told_so(tmp_path):
    random_checkpoint.write(archs.load("qwen3"), tmp_path / "ck")
    folder = renamed(tmp_path / "ck", lambda n: f"_orig_mod.{n}")
    assert "Names start with '_orig_mod.' there" in refusal(opened(folder, "qwen3"), tmp_path)
