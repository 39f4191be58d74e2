"""What lies in a folder that is no checkpoint in safetensors, and what to do with it."""

from __future__ import annotations

import os
from fnmatch import fnmatch
from pathlib import Path

from llmexport.export.errors import ExportError
from llmexport.export.values import show_name

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"

UNPICKLED = "weights are read from safetensors only, nothing is unpickled"
CONVERT = "convert them with transformers' from_pretrained and save_pretrained"

# What folders hold that are no checkpoints in safetensors: names (fnmatch), what that is, what to do. The first that
# fits is said.
OTHERS = (
    (ADAPTER, "an adapter", "merge it into its model: peft's merge_and_unload, then save_pretrained"),
    ("model_index.json", "a diffusers pipeline", "give the folder of its text model"),
    (SINGLE, "the weights of a checkpoint", "download its config.json too"),
    (INDEX, "the index of a checkpoint", "download its config.json too"),
    ("adapter_model.*", "an adapter", "merge it into its model: peft's merge_and_unload, then save_pretrained"),
    ("consolidated*.safetensors", "weights as Mistral publishes them", f"take those with config.json and {INDEX}"),
    ("*.safetensors", "weights with no index of shards", f"download {INDEX} too, or rename a single file to {SINGLE}"),
    ("*.gguf", "weights of llama.cpp", "take the safetensors checkpoint that they were made from"),
    ("*.onnx", "an ONNX model already", "take the safetensors checkpoint that it was made from"),
    *((f"*.{e}", "pickled weights", f"{UNPICKLED}: if you trust them, {CONVERT}") for e in ("bin", "pt", "pth")),
    ("*.h5", "weights of TensorFlow", CONVERT),
    ("*.msgpack", "weights of Flax", CONVERT),
    ("*.nemo", "weights of NeMo", "take its checkpoint in safetensors"),
    ("*.npz", "weights of numpy or MLX", "take its checkpoint in safetensors"),
)


def what_it_is(folder: Path) -> str:
    """What lies in a folder that is no checkpoint, and what to do."""
    files = sorted(path.name for path in folder.iterdir())
    if not files:
        return "the folder is empty, get one with `hf download <model> --local-dir <folder>`"
    for pattern, what, cure in OTHERS:
        if found := [file for file in files if fnmatch(file.lower(), pattern)]:
            return f"{few(found)} {'is' if len(found) == 1 else 'are'} {what}: {cure}"
    below = sorted(
        str(p.parent.relative_to(folder)) for g in ("*", "snapshots/*") for p in folder.glob(f"{g}/config.json")
    )
    if below:
        return f"there is one in {few(below)}: give that folder"
    return f"download config.json and {SINGLE}, or {INDEX} and its shards, into it"


def few(names: list[str]) -> str:
    return ", ".join(map(show_name, names[:3])) + (", ..." if len(names) > 3 else "")


def folder_path(path: str | os.PathLike[str]) -> Path:
    """A path that a caller gave. Raises ExportError on one that names nothing: empty, or with a NUL."""
    text = os.fspath(path)
    if not text or "\0" in text:
        raise ExportError(f"the path {text!r} names no folder: give one")
    return Path(path)
