"""Large weights leave a model for its inputs, and what it computes stays the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from arch_cases import CASES, FIRST, IN_FP16, Case, others_slow
from first_feed import first_feed
from onnx import helper

from llmexport.export import manifest
from llmexport.export.beside import beside
from llmexport.export.binding import weights
from llmexport.export.graph_file import load
from llmexport.export.tensorrt_form import tensorrt_form
from llmexport.plugins.dtypes import BY_ONNX
from llmexport.validate import runners, stages

Exporter = Callable[..., Path]
SMALL = 4096  # bytes of the matrices of tiny models; their norms, biases and convolutions are smaller

EACH = [(c, d) for c in CASES for d in ("float32", "float16")]
AT_ONCE = [(c, "float16" if c in IN_FP16 else "float32") for c in FIRST]


def filled(model: onnx.ModelProto, arrays: dict[str, np.ndarray]) -> onnx.ModelProto:
    """The model with arrays in place of the inputs of their names."""
    kept = [v for v in model.graph.input if v.name not in arrays]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    for name, array in arrays.items():
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        model.graph.initializer.append(helper.make_tensor(name, kind, array.shape, array.tobytes(), raw=True))
    return model


@pytest.mark.parametrize(("case", "dtype"), others_slow(EACH, AT_ONCE), ids=str)
def test_a_model_computes_the_same_bits_with_its_weights_bound(case: Case, dtype: str, exported: Exporter) -> None:
    export = manifest.read(exported(case, dtype))
    form = tensorrt_form(load(export, export.graphs[0]))[0]
    taken = onnx.ModelProto.FromString(form.SerializeToString())
    arrays = dict(weights(beside(taken, SMALL), export.weights, export.folder))
    assert len(arrays) >= 2 * len(export.blocks)
    typed = {v.name: BY_ONNX[v.type.tensor_type.elem_type].name for v in form.graph.input}
    feed = {n: a.astype(typed[n]) for n, a in first_feed(export.graphs[0], stages.prompt(export)).items()}
    outputs = []
    for model in (form, filled(taken, arrays)):
        with runners.onnx_runner(model, export.folder) as runner:
            outputs.append(dict(runner.infer(feed)))
    wanted, found = outputs
    assert {n: a.tobytes() for n, a in wanted.items()} == {n: a.tobytes() for n, a in found.items()}
