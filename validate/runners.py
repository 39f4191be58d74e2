"""Things that run an exported model on a feed: our PyTorch, ONNX Runtime, transformers.

All take and give dicts of numpy arrays by value name and are Polygraphy runners, so that an engine's TrtRunner
can stand in for any of them.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
import re
import tempfile
import time
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.datatype import DataType
from torch import Tensor

from llmexport.export import blocks
from llmexport.export.archs import load, text_config, whole_names
from llmexport.export.checkpoint import INDEX
from llmexport.export.manifest import Manifest
from llmexport.export.spec import Step
from llmexport.export.trace import torch_dtype
from llmexport.validate.compare import Mismatch

if TYPE_CHECKING:
    from transformers import Cache

Feed = dict[str, np.ndarray]
TOKENS = ("input_ids", "position_ids", "attention_mask")
CACHED_KEY = re.compile(r"past_key_values\.(\d+)\.key")
OLDEST_TRANSFORMERS = (5, 20)  # whose numbers the tests hold the architectures against
OLDEST_RUNTIME = (1, 23, 2)  # of ONNX Runtime; pyproject.toml names it too
REFUSALS: tuple[type[Exception], ...] = (
    RuntimeError,
    *(e for e in vars(onnxruntime_pybind11_state).values() if isinstance(e, type) and issubclass(e, Exception)),
)
HELD = 4 * 2**30  # bytes of weights to keep between runs; larger models are read step by step


class TorchRunner(BaseRunner):  # type: ignore[misc]
    """Our PyTorch: the blocks of the assembly, in order, in the export's dtype, on the CPU.

    `values` holds everything that the last run computed, by value name.
    """

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(name="PyTorch")
        self._manifest = manifest
        self._checkpoint = manifest.checkpoint()
        self._modules: dict[str, torch.nn.Module] = {}
        size = sum(t.nbytes for t in self._checkpoint.tensors.values())
        self._hold = size <= HELD
        self.values: Feed = {}

    def get_input_metadata_impl(self) -> TensorMetadata:
        return _metadata(self._manifest, [p.name for p in self._manifest.assembly.inputs])

    def infer_impl(self, feed_dict: Feed) -> OrderedDict[str, np.ndarray]:
        values = {n: to_torch(a) for n, a in feed_dict.items()}
        self.inference_time = 0.0
        with torch.inference_mode():
            for step in self._manifest.assembly.steps:
                module = self._module(step)
                start = time.perf_counter()
                made = module(*(values[n] for n in step.inputs))
                self.inference_time += time.perf_counter() - start
                values |= zip(step.outputs, made if isinstance(made, tuple) else (made,), strict=True)
        self.values = {n: to_numpy(t) for n, t in values.items()}
        return OrderedDict((p.name, self.values[p.name]) for p in self._manifest.assembly.outputs)

    def run_step(self, step: Step, feed: Feed) -> Feed:
        """One step alone; `feed` and what is returned are by value name."""
        with torch.inference_mode():
            made = self._module(step)(*(to_torch(feed[n]) for n in step.inputs))
        tensors = made if isinstance(made, tuple) else (made,)
        return {n: to_numpy(t) for n, t in zip(step.outputs, tensors, strict=True)}

    def _module(self, step: Step) -> torch.nn.Module:
        if step.name in self._modules:
            return self._modules[step.name]
        dtype = torch_dtype(self._manifest.dtype)
        module = blocks.module(step.block, dtype)
        weights = self._manifest.step_weights[step.name]
        shapes = {n: p.shape for n, p in module.named_parameters()}
        state = dict(module.named_buffers())
        for path, names in weights.items():
            tensor = self._read(names).reshape(shapes[path])
            state[path] = tensor if path in step.block.as_stored else tensor.to(dtype)
        module.load_state_dict(state, assign=True, strict=True)
        if self._hold:
            self._modules[step.name] = module
        return module

    def _read(self, names: str | list[str]) -> Tensor:
        """A tensor of the checkpoint, or several, one after the other."""
        if isinstance(names, str):
            return to_torch(self._checkpoint.read(names))
        return torch.cat([to_torch(self._checkpoint.read(n)) for n in names])


def onnx_runner(model: onnx.ModelProto, weights: Path) -> BaseRunner:
    """ONNX Runtime on the CPU; `weights` is the folder that external data lies in.

    Raises Mismatch, in one line, if the ONNX Runtime here is too old or does not take the model.
    """
    installed = onnxruntime.__version__
    if tuple(int(n) for n in re.findall(r"\d+", installed)[:3]) < OLDEST_RUNTIME:
        oldest = ".".join(map(str, OLDEST_RUNTIME))
        raise Mismatch(
            f"ONNX Runtime {installed} is installed, whose Attention is wrong where heads share a key: upgrade "
            f"onnxruntime-gpu, or onnxruntime if that is what is installed, to {oldest} or later"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights.resolve()))
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except REFUSALS as error:
        said = " ".join(str(error).split())
        raise Mismatch(f"ONNX Runtime {installed} does not take the model: {said}") from error
    return OnnxrtRunner(session, name="ONNX Runtime")


def _metadata(manifest: Manifest, names: Sequence[str]) -> TensorMetadata:
    metadata = TensorMetadata()
    for port in manifest.assembly.inputs:
        if port.name in names:
            dtype = DataType.__dict__[(manifest.dtype if port.dtype == "T" else port.dtype).upper()]
            metadata.add(port.name, dtype, tuple(d if isinstance(d, int) else -1 for d in port.shape))
    return metadata


def to_torch(array: np.ndarray) -> Tensor:
    """Without a copy where the array is in memory as torch wants it; bf16 from ml_dtypes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)


def to_numpy(tensor: Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.contiguous().numpy()


def unable() -> str:
    """Why the transformers that is installed, if one is, cannot be the reference; or nothing."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed: pip install transformers"
    installed = importlib.metadata.version("transformers")
    if tuple(int(n) for n in re.findall(r"\d+", installed)[:2]) < OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
        return (
            f"transformers {installed} is installed, before 5 it does not read rope_parameters and is wrong without a "
            f"word: pip install 'transformers>={oldest}'"
        )
    return ""


class Refused(Exception):
    """transformers does not take a config that we take."""


def _config(kind: Any, data: dict[str, Any]) -> Any:
    try:
        return kind.from_dict(data)
    except Exception as error:
        raise Refused(f"transformers does not take this config: {' '.join(str(error).split())}") from error


class TransformersRunner(BaseRunner):  # type: ignore[misc]
    """The model as transformers runs it, from the weights in the export: the reference that nobody here wrote.

    It carries its own cache from step to step, begins a new one when the feed's past is empty, or from the keys and
    values that the feed holds; and gives logits only.
    """

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(name="transformers")
        self._manifest = manifest

    def get_input_metadata_impl(self) -> TensorMetadata:
        return _metadata(self._manifest, TOKENS)

    def activate_impl(self) -> None:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        # It lists the vision tensors that the text model leaves.
        transformers.utils.logging.set_verbosity_error()
        data = self._manifest.data
        weights = self._manifest.checkpoint()
        with tempfile.TemporaryDirectory(prefix="llmexport-") as name:
            folder = Path(name)
            (folder / "config.json").write_text(json.dumps(data["config"]))
            index = {t.name: t.file for t in weights.tensors.values()}
            (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
            for shard in weights.shards:
                (folder / shard.file).symlink_to((self._manifest.folder / shard.file).resolve())
            arch = load(data["arch"]).arch
            model = getattr(transformers, arch.causal_lm, None)
            if model is None:
                have = f"transformers {transformers.__version__}"
                raise Refused(f"{have} has no {arch.causal_lm}: pip install -U transformers")
            # transformers writes into the dictionaries that it is given.
            config = copy.deepcopy(dict(text_config(arch, data["config"])))
            names = {f"^{re.escape(there)}": here for here, there in whole_names(arch, data["config"]).items()}
            # Weights in 4 bits are computed with in the runner's dtype, as in our export.
            packed = (
                transformers.utils.quantization_config.Mxfp4Config(dequantize=True)
                if "quantization_config" in config
                else None
            )
            self._model = model.from_pretrained(
                folder,
                config=_config(model.config_class, config),
                key_mapping=names or None,
                **({"quantization_config": packed} if packed else {}),
                dtype=torch_dtype(self._manifest.dtype),
                attn_implementation="eager",
            ).eval()

    def deactivate_impl(self) -> None:
        del self._model

    def infer_impl(self, feed_dict: Feed) -> OrderedDict[str, np.ndarray]:
        # A model without RoPE has no position_ids.
        given = {n: to_torch(feed_dict[n]) for n in TOKENS if n in feed_dict}
        if given["input_ids"].shape[1] == given["attention_mask"].shape[1]:
            self._cache = None
        elif any(n not in TOKENS for n in feed_dict):
            self._cache = self._filled(feed_dict)
        start = time.perf_counter()
        with torch.inference_mode():
            made = self._model(**given, past_key_values=self._cache, use_cache=True)
        self._cache = made.past_key_values
        self.inference_time = time.perf_counter() - start
        return OrderedDict(logits=to_numpy(made.logits))

    def _filled(self, feed: Feed) -> Cache:
        """A cache as after the tokens whose keys and values the feed holds."""
        import transformers

        cache = transformers.DynamicCache(config=self._model.config)
        for i in sorted(int(m[1]) for n in feed if (m := CACHED_KEY.fullmatch(n))):
            key, value = (to_torch(feed[f"past_key_values.{i}.{part}"]) for part in ("key", "value"))
            cache.update(key, value, i)
        return cache
