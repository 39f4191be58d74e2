"""A folder with an engine that no TensorRT has built: for what is checked before one is asked."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from llmexport.export.binding import Binding, Operation, Source
from llmexport.export.checkpoint import read_header
from llmexport.export.engine_kernels import Kernel
from llmexport.export.engine_record import Engine, Library, Plan
from llmexport.export.exported import Export
from llmexport.export.identity import identify
from llmexport.export.spec import Port, Sizes
from llmexport.plugins.normed import ADDENDS, EXPERTS, NORM
from llmexport.plugins.normed_route import NORMED_ROUTES
from llmexport.plugins.shared_route import ROUTE, SHARED_ROUTES

PLAN, WEIGHTS = "model.plan", "w.safetensors"
PROFILE = {"batch": (1, 1, 4), "sequence": (1, 8, 64), "past": (0, 8, 64), "total": (1, 16, 128)}


# What an engine makes one op of, in a graph where they are apart.
FUSED = {"QkNormRope": ("Rope", "Rope"), "GatedDeltaNet": ("CausalConv1d", "GatedDeltaRule", "GatedRmsNorm")}
FUSED |= dict.fromkeys(ADDENDS, (EXPERTS, NORM)) | dict.fromkeys(SHARED_ROUTES, (ROUTE, "GatedAct"))
FUSED |= {plugin: (NORM, *FUSED.get(route, (route,))) for plugin, route in NORMED_ROUTES.items()}


def of_engine(ops: Mapping[str, int], plugins: Mapping[str, int]) -> dict[str, int]:
    """The ops of a graph as plugin layers: those of FUSED that `plugins` has more of stand for their parts."""
    expected = Counter(ops)
    for op, parts in FUSED.items():
        more = plugins.get(op, 0) - ops.get(op, 0)
        assert more >= 0
        expected += Counter({op: more})
        expected.subtract(Counter({part: more * parts.count(part) for part in parts}))
    assert min(expected.values(), default=0) >= 0
    return dict(+expected)


def ports(dtype: str) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """The inputs and outputs of the graph; toy_model.py computes it."""
    ids = Port("input_ids", ("batch", "sequence"), "int64", "tokens")
    past = Port("past", ("batch", 2, "past", 8), dtype, "state")
    present = Port("present", ("batch", 2, "total", 8), dtype, "state")
    return (ids, past), (Port("logits", ("batch", "sequence", 31), dtype, "logits"), present)


def make_engine(
    folder: Path, model_sha256: str = "b" * 64, dtype: str = "float16", weights: Mapping[str, np.ndarray] | None = None
) -> Path:
    """The folder, made, with a plan of 1000 bytes, a plugin library, `weights` that are inputs, and engine.json."""
    inputs, outputs = ports(dtype)
    folder.mkdir()
    save_file({"w": np.ones(3, np.float32)} | dict(weights or {}), folder / WEIGHTS)
    stored, shard = read_header(folder / WEIGHTS)
    bindings = {
        name: Binding(
            array.dtype.name,
            array.T.shape,
            (Source(name, WEIGHTS, stored[name].offset, array.dtype.name, array.shape),),
            (Operation("transpose", (1, 0)),),
        )
        for name, array in (weights or {}).items()
    }
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
        bindings=bindings,
        layers={"PLUGIN_V3": 3},
        plugins={"Rope": 3},
        messages=("WARNING: x",),
        seconds=1.5,
        kernels=(
            Kernel("a_myl0_1", "gemm", ("a", "w/cast")),
            Kernel("rope", "plugin", ("rope",), 2),
            Kernel("b", "copy", ()),
        ),
    )
    engine = Engine(
        backend="tensorrt-rtx",
        version="1.7.1.116",
        target="NVIDIA GPUs of compute capability 8.0 and later, but not 9.x (H100, H200), 10.x (B200), 11.x (Thor)",
        least=(8, 0),
        built_on=None,
        arch="llama",
        block=None,
        dtype=dtype,
        weights_at="beside" if weights else "inside",
        weights=(identify(folder / WEIGHTS, shard, "link", whole=False)[0],),
        checked="1 of 1 files: every byte as recorded",
        profile=PROFILE,
        plugins=(Library(str(library), hashlib.sha256(library.read_bytes()).hexdigest()),),
        graphs={"model": built},
    )
    (folder / "engine.json").write_text(json.dumps(engine.as_data()))
    return folder


def add_engine(export: Export, sizes: Mapping[str, Sizes]) -> None:
    """An engine.json beside an export, and a plan of each of its graphs, which no TensorRT has built."""
    plans = {}
    for graph in export.graphs:
        data = graph.name.encode()
        (export.folder / f"{graph.name}.plan").write_bytes(data)
        plans[graph.name] = Plan(
            file=f"{graph.name}.plan",
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            model_sha256=graph.sha256,
            inputs=tuple(p.typed(export.dtype) for p in graph.assembly.inputs),
            outputs=tuple(p.typed(export.dtype) for p in graph.assembly.outputs),
            carried=graph.carried,
            bindings={},
            layers={},
            plugins={},
            messages=(),
            seconds=0.0,
        )
    engine = Engine(
        backend="tensorrt-rtx",
        version="1.7.1.116",
        target="",
        least=(8, 0),
        built_on=None,
        arch=export.arch,
        block=export.block,
        dtype=export.dtype,
        weights_at="inside",
        weights=export.weights,
        checked="",
        profile=sizes,
        plugins=(),
        graphs=plans,
    )
    (export.folder / "engine.json").write_text(json.dumps(engine.as_data()))
