"""Weights of few bits are joined byte by byte, their scales row by row; what TensorRT reads of them is the model."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import rounded
from native import emulated_library

from llmexport.export import engine_job, manifest
from llmexport.export.exported import Export
from llmexport.export.join_products import join_products
from llmexport.export.joined_weights import Weights
from llmexport.export.packed.given import Given, Run
from llmexport.plugins import library
from llmexport.validate import ladder

pytestmark = pytest.mark.engine

LAYERS = 3
JOINED = {"self_attn": ("q", "k", "v"), "mlp": ("gate", "up")}
BITS = {"int4": 4, "int8": 8, "fp8": 8}
BYTES = {"int4": "weight_packed", "int8": "weight", "fp8": "weight"}


@pytest.fixture(params=rounded.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def export(kind: str, tiny_checkpoint, tmp_path: Path) -> Export:
    return rounded.export(tiny_checkpoint("llama", "text"), tmp_path / "export", kind)


def test_the_bytes_of_joined_weights_lie_one_behind_another(kind: str, export: Export) -> None:
    served = library.served(emulated_library())
    job = engine_job.prepare(export, export.graphs[0], "tensorrt_rtx", emulated_library(), served, "inside")
    stored, held = rounded.tensors(export.folder), {t.name: t for t in job.model.graph.initializer}
    wanted = {
        tuple(stored[f"model.layers.{layer}.{block}.{n}_proj.{BYTES[kind]}"].tobytes() for n in names)
        for layer in range(LAYERS)
        for block, names in JOINED.items()
    }
    found = set()
    for said in (g for g in job.said["given"] if "joined" in g["name"]):
        given = Given(said["name"], tuple(Run(**run) for run in said["runs"]), said["mask"])
        # The sign of an int4 is stored the other way round.
        read = (given.read(export.folder) ^ np.uint8(given.mask)).tobytes()
        ends = [0, *itertools.accumulate(run.nbytes for run in given.runs)]
        found.add(tuple(read[a:b] for a, b in itertools.pairwise(ends)))
        assert math.prod(held[given.name].dims) * BITS[kind] == 8 * len(read)
    assert found == wanted
    kinds = Counter(n.op_type for n in job.model.graph.node if n.domain)
    assert (kinds["JoinedGatedAct"], kinds["JoinedQkNormRope"]) == (LAYERS, LAYERS)
    assert not {"GatedAct", "QkNormRope"} & kinds.keys()


def test_what_tensorrt_reads_of_them_is_the_model(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is not where the rows of one weight are taken for another's."""
    monkeypatch.setattr(library, "find", emulated_library)
    [rung] = ladder.climb(manifest.read(export.folder), rungs=["network"]).rungs
    assert rung.status == "pass"

    def swapped(*asked) -> list[Given]:
        return [replace(g, runs=g.runs[::-1]) for g in join_products(*asked)]

    monkeypatch.setattr(engine_job, "join_products", swapped)
    [rung] = ladder.climb(manifest.read(export.folder), rungs=["network"]).rungs
    assert rung.status == "fail"
    assert re.search(r"first in \w+: layer layers\.0/\S+ \(PLUGIN_V3\), whose layers\.0/\S+ is", rung.note), rung.note


def test_stored_vectors_are_one_constant_as_they_are_cast(tmp_path: Path) -> None:
    """Of a file, of the graph, and cast from another type; what is computed otherwise is none."""
    one, two = np.linspace(-3, 3, 7, dtype=np.float32), np.arange(5).astype(np.float32)
    (tmp_path / "w").write_bytes(b"ahead" + one.tobytes())
    held = onnx.TensorProto(name="one", dims=[7], data_type=onnx.TensorProto.FLOAT)
    held.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": "w", "offset": "5", "length": "28"}.items():
        held.external_data.add(key=key, value=value)
    inside = onnx.numpy_helper.from_array(two.astype(ml_dtypes.bfloat16), "two")
    graph = onnx.GraphProto(initializer=[held, inside])
    bfloat16 = onnx.TensorProto.BFLOAT16
    makers = {"cast": onnx.helper.make_node("Cast", ["one"], ["cast"], to=bfloat16)}
    makers["minus"] = onnx.helper.make_node("Neg", ["two"], ["minus"])
    weights = Weights(graph, makers, [], tmp_path)
    assert not weights.stored_together(["cast", "minus"], "no", bfloat16)
    assert weights.stored_together(["cast", "two"], "both", bfloat16)
    want = np.concatenate([one, two]).astype(ml_dtypes.bfloat16)
    assert onnx.numpy_helper.to_array(weights["both"]).tobytes() == want.tobytes()
    assert "no" not in weights
