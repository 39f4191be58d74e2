"""A folder that is no checkpoint in safetensors is named as what it is, with what to do."""

import pytest
from tiny_configs import one_line

from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.errors import ExportError


def refusal(folder):
    with pytest.raises(ExportError) as error:
        open_checkpoint(folder)
    return one_line(error.value)


@pytest.mark.parametrize("config", [False, True], ids=["without a config", "with one"])
@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "merge"),
        (["adapter_model.bin"], "'adapter_model.bin' is an adapter: merge it"),
        (["model-q4.gguf", "README.md"], "'model-q4.gguf' is weights of llama.cpp: take the safetensors checkpoint"),
        (["a.gguf", "b.gguf", "c.gguf", "d.gguf"], "'a.gguf', 'b.gguf', 'c.gguf', ... are weights of llama.cpp"),
        (["pytorch_model.bin"], "'pytorch_model.bin' is pickled weights: weights are read from safetensors only"),
        (["consolidated.00.pth", "params.json"], "'consolidated.00.pth' is pickled weights"),
        (["model.onnx"], "'model.onnx' is an ONNX model already"),
        (["model_index.json"], "a diffusers pipeline: give the folder of its text model"),
        (["consolidated.safetensors", "params.json"], "weights as Mistral publishes them"),
        (["tf_model.h5"], "weights of TensorFlow: convert them"),
    ],
)
def test_it_is_named_as_what_it_is(files, said, config, tmp_path):
    for file in files:
        (tmp_path / file).write_bytes(b"x")
    if config:
        (tmp_path / "config.json").write_text("{}")
    assert said in refusal(tmp_path)


def test_an_empty_folder_is_called_empty(tmp_path):
    assert "has no config.json: the folder is empty, get one with `hf download" in refusal(tmp_path)


@pytest.mark.parametrize("inner", ["inner", "snapshots/0123abcd"])
def test_a_checkpoint_one_folder_below_is_pointed_at(inner, tmp_path):
    (tmp_path / inner).mkdir(parents=True)
    (tmp_path / inner / "config.json").write_text("{}")
    assert f"there is one in '{inner}': give that folder" in refusal(tmp_path)


def test_weights_without_their_config_are_called_so(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert (
        "has no config.json: 'model.safetensors' is the weights of a checkpoint: download its config.json too"
        in refusal(tmp_path)
    )
