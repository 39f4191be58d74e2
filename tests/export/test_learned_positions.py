"""GPT, GPT-2, GPT-Neo and OPT: the layouts that were published, and positions beyond the table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_configs import read, refusal

from llmexport.export import archs, graph_file, manifest, onnx_file, random_checkpoint
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.errors import ExportError
from llmexport.run.checks import check_prompt, positions
from llmexport.run.errors import RunError

# What the files hold beside weights: masks, what those fill with, and a number that no one reads.
BESIDE = {
    "gpt2": {"h.1.attn.bias": (1, 1, 512, 512), "h.1.attn.masked_bias": ()},
    "openai_gpt": {"h.1.attn.bias": (1, 1, 512, 512)},
    "gpt_neo": {"h.1.attn.attention.bias": (1, 1, 512, 512), "h.1.attn.attention.masked_bias": ()},
    "opt": {"decoder.version": (1,)},
}


class Checked(Exception):
    """All that is checked before the first trace is."""


def checked(source: Path, folder: Path) -> None:
    opened = open_checkpoint(source)
    folder.mkdir()
    onnx_file.fill(onnx_file.Request(archs.choose(None, opened.config), opened), folder)


@pytest.mark.parametrize("base", [True, False], ids=["base", "whole"])
@pytest.mark.parametrize("arch", BESIDE)
def test_published_names_are_read_with_their_start_and_without(arch: str, base: bool, tmp_path, monkeypatch) -> None:
    def traced(*_: object) -> object:
        raise Checked

    named = archs.load(arch)
    random_checkpoint.write(named, tmp_path / "ck", dtype="float32")
    files = sorted((tmp_path / "ck").glob("*.safetensors"))
    tensors = {n: t for file in files for n, t in load_file(file).items()}
    tensors |= {named.base + n: np.ones(shape, np.float32) for n, shape in BESIDE[arch].items()}
    (tmp_path / "ck" / "model.safetensors.index.json").unlink()
    for file in files:
        file.unlink()
    path = tmp_path / "ck" / "model.safetensors"
    save_file({n.removeprefix(named.base) if base else n: t for n, t in tensors.items()}, path)
    monkeypatch.setattr(graph_file, "trace_all", traced)
    with pytest.raises(Checked):
        checked(tmp_path / "ck", tmp_path / "out")
    save_file(tensors | {f"{named.base}other": np.ones(3, np.float32)}, path)
    with pytest.raises(ExportError, match=f"does not use: {named.base}other"):
        checked(tmp_path / "ck", tmp_path / "other")


@pytest.mark.model
@pytest.mark.parametrize("case", ["gpt2", "opt"])
def test_a_prompt_has_no_more_tokens_than_the_table_has_positions(case: str, exported) -> None:
    export = manifest.read(exported(case))
    assert positions(export) == 512
    check_prompt(export, [3] * 512)
    with pytest.raises(RunError, match="the prompt has 513 tokens, the model takes 512: give a shorter one"):
        check_prompt(export, [3] * 513)


@pytest.mark.parametrize(
    ("arch", "changes", "said"),
    [
        ("gpt2", {"n_head": 5}, "n_embd 64 is not a multiple of 5 attention heads"),
        ("gpt2", {"max_position_embeddings": 511}, "max_position_embeddings is 511, only 512 is supported here"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True, only False"),
        ("openai_gpt", {"afn": "gelu_new"}, "afn is 'gelu_new', this architecture knows 'gelu'"),
        ("gpt_neo", {"attention_types": [[["global"], 2]]}, "that make 3 layers of 'global' and 'local'"),
        ("gpt_neo", {"attention_types": [[["global", "far"], 1], [["local"], 1]]}, "attention_types is "),
        ("gpt_neo", {"attention_types": "global"}, "attention_types is 'global'"),
        ("gpt_neo", {"attention_layers": ["global"] * 3}, "attention_layers is "),
        ("opt", {"scale_embeddings": True}, "scale_embeddings is True, only False"),
        ("starcoder2", {"mlp_type": "gated"}, "mlp_type is 'gated', only 'default'"),
    ],
)
def test_what_makes_another_model_is_refused(arch: str, changes: dict[str, object], said: str) -> None:
    assert said in refusal(arch, **changes)


def test_the_layers_of_gpt_neo_may_be_listed_as_well() -> None:
    assert read("gpt_neo", attention_layers=["global", "local", "global"]) == read("gpt_neo")
