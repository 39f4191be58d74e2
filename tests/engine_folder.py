"""A folder with an engine that no TensorRT has built: for what is checked before one is asked."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from llmexport.export.engine_record import Engine, Library, Plan
from llmexport.export.identity import WeightFile
from llmexport.export.spec import Port

PLAN = "model.plan"
PROFILE = {"batch": (1, 1, 4), "sequence": (1, 8, 64), "past": (0, 8, 64), "total": (1, 16, 128)}


def ports(dtype: str) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """The inputs and outputs of the graph; toy_model.py computes it."""
    ids = Port("input_ids", ("batch", "sequence"), "int64", "tokens")
    past = Port("past", ("batch", 2, "past", 8), dtype, "state")
    present = Port("present", ("batch", 2, "total", 8), dtype, "state")
    return (ids, past), (Port("logits", ("batch", "sequence", 31), dtype, "logits"), present)


def make_engine(folder: Path, model_sha256: str = "b" * 64, dtype: str = "float16") -> Path:
    """The folder, made, with a plan of 1000 bytes, a plugin library and engine.json."""
    inputs, outputs = ports(dtype)
    folder.mkdir()
    plan, library = bytes(range(250)) * 4, folder / "plugins.so"
    (folder / PLAN).write_bytes(plan)
    library.write_bytes(b"a plugin library")
    built = Plan(
        file=PLAN,
        bytes=len(plan),
        sha256=hashlib.sha256(plan).hexdigest(),
        model_sha256=model_sha256,
        inputs=inputs,
        outputs=outputs,
        carried={"past": "present"},
        layers={"PLUGIN_V3": 3},
        plugins={"Rope": 3},
        messages=("WARNING: x",),
        seconds=1.5,
    )
    engine = Engine(
        backend="tensorrt-rtx",
        version="1.7.1.116",
        target="NVIDIA GPUs of compute capability 8.0 and later",
        built_on=None,
        arch="llama",
        block=None,
        dtype=dtype,
        weights=(WeightFile("w.safetensors", 8, "link", "c" * 64, "d" * 64, None, 1, 2),),
        checked="1 of 1 files: every byte as recorded",
        profile=PROFILE,
        plugins=(Library(str(library), hashlib.sha256(library.read_bytes()).hexdigest()),),
        graphs={"model": built},
    )
    (folder / "engine.json").write_text(json.dumps(engine.as_data()))
    return folder
