"""Our PyTorch and ONNX Runtime, which run one graph of an export on a feed.

Both take and give dicts of numpy arrays by value name and are Polygraphy runners, as an engine's TrtRunner is.
"""

from __future__ import annotations

import time
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.datatype import DataType
from torch import Tensor

from llmexport.export import blocks
from llmexport.export.exported import Export, ExportedGraph
from llmexport.export.packed import stacks
from llmexport.export.spec import Port, Step
from llmexport.export.trace import torch_dtype
from llmexport.export.weights import Parameter
from llmexport.validate.feeds import Feed
from llmexport.validate.runtime import open_session

HELD = 4 * 2**30  # bytes of weights to keep between runs; larger models are read step by step


class TorchRunner(BaseRunner):  # type: ignore[misc]
    """Our PyTorch: the blocks of a graph, in order, in the export's dtype, on one device.

    `values` holds everything that the last run computed, by value name.
    """

    def __init__(self, export: Export, graph: ExportedGraph, device: str = "cpu") -> None:
        super().__init__(name="PyTorch")
        self._device = device
        self._dtype = export.dtype
        self._graph = graph
        self._checkpoint = export.checkpoint()
        self._modules: dict[str, torch.nn.Module] = {}
        size = sum(t.nbytes for t in self._checkpoint.tensors.values())
        self._hold = size <= HELD
        self.values: Feed = {}

    def get_input_metadata_impl(self) -> TensorMetadata:
        return metadata(self._graph.assembly.inputs, self._dtype)

    def infer_impl(self, feed_dict: Feed) -> OrderedDict[str, np.ndarray]:
        values = {n: to_torch(a).to(self._device) for n, a in feed_dict.items()}
        self.inference_time = 0.0
        with torch.inference_mode():
            for step in self._graph.assembly.steps:
                module = self._module(step)
                start = time.perf_counter()
                made = module(*(values[n] for n in step.inputs))
                self.inference_time += time.perf_counter() - start
                values |= zip(step.outputs, made if isinstance(made, tuple) else (made,), strict=True)
        self.values = {n: to_numpy(t) for n, t in values.items()}
        return OrderedDict((p.name, self.values[p.name]) for p in self._graph.assembly.outputs)

    def run_step(self, step: Step, feed: Feed) -> Feed:
        """One step alone; `feed` and what is returned are by value name."""
        with torch.inference_mode():
            made = self._module(step)(*(to_torch(feed[n]).to(self._device) for n in step.inputs))
        tensors = made if isinstance(made, tuple) else (made,)
        return {n: to_numpy(t) for n, t in zip(step.outputs, tensors, strict=True)}

    def _module(self, step: Step) -> torch.nn.Module:
        if step.name in self._modules:
            return self._modules[step.name]
        dtype = torch_dtype(self._dtype)
        module = blocks.module(step.block, dtype)
        weights = self._graph.step_weights[step.name]
        shapes = {n: p.shape for n, p in module.named_parameters()}
        state = dict(module.named_buffers())
        stored = step.block.stored
        for path, names in weights.items():
            held = stored.get(path)
            if held and held.role and not isinstance(names, str):
                parameter = Parameter(path, held.shape, names, held.dtype, role=held.role)
                tensor = to_torch(stacks.values(parameter, self._checkpoint))
            else:
                tensor = self._read(names).reshape(shapes[path])
            cast = {"T": dtype, "F": torch.float32}.get(step.block.dtype_of(path))
            state[path] = tensor if cast is None else tensor.to(cast)
        module.load_state_dict(state, assign=True, strict=True)
        module.to(self._device)
        if self._hold:
            self._modules[step.name] = module
        return module

    def _read(self, names: str | tuple[str, ...]) -> Tensor:
        """A tensor of the checkpoint, or several, one after the other."""
        if isinstance(names, str):
            return to_torch(self._checkpoint.values(names))
        return torch.cat([to_torch(self._checkpoint.values(n)) for n in names])


def onnx_runner(model: onnx.ModelProto, weights: Path) -> BaseRunner:
    """ONNX Runtime on the CPU, as `open_session` opens it."""
    return OnnxrtRunner(open_session(model, weights), name="ONNX Runtime")


def not_runnable(dtype: str) -> str:
    """Why ONNX Runtime's CPU provider cannot run a model of this dtype, or nothing."""
    return "ONNX Runtime has no bfloat16 MatMul on a CPU: validate a float32 export too" if dtype == "bfloat16" else ""


def metadata(ports: Iterable[Port], dtype: str) -> TensorMetadata:
    metadata = TensorMetadata()
    for port in ports:
        kind = DataType.__dict__[port.typed(dtype).dtype.upper()]
        metadata.add(port.name, kind, tuple(d if isinstance(d, int) else -1 for d in port.shape))
    return metadata


def to_torch(array: np.ndarray) -> Tensor:
    """The array as a tensor, without a copy where torch takes its memory as it is; bf16 comes from ml_dtypes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)


def to_numpy(tensor: Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).cpu().numpy().view(ml_dtypes.bfloat16)
    return tensor.contiguous().cpu().numpy()
