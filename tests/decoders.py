"""Decoders that are run step by step, without what `validate` does for that, and transformers beside them."""

from __future__ import annotations

import functools
import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers
from safetensors.torch import load_file

from llmexport.export import archs, manifest
from llmexport.validate import references
from llmexport.validate.compare import compare
from llmexport.validate.runners import TorchRunner
from llmexport.validate.tolerance import tolerance

MAX_ABS, RMS_RATIO = 1e-4, 1e-5  # the promise for fp32, not to be loosened
RECURRENT = (5e-4, 5e-5)  # where the delta rule feeds roundoff back into its state
PROMPT = 37  # odd, longer than every tiny window
RUNNERS = ("torch", "onnxruntime")
REFUSED = "padding must be on the left|padding_must_be_on_the_left"


def theirs(model: Any, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, cache: Any) -> Any:
    """What a model of transformers makes of a step, and the cache after it; of one without, the tokens so far."""
    if cache is None:
        # Dynamic RoPE turns by what the longest text so far made of it.
        for module in model.modules() if isinstance(model, torch.nn.Module) else ():
            vars(module).update(dict.fromkeys([n for n in vars(module) if n.endswith("max_seq_len_cached")], 0))
    parameters = inspect.signature(model.forward).parameters
    if "state" in parameters:
        return each_row_alone(model, ids, mask, cache)
    if "past_key_values" not in parameters:
        earlier = cache or (ids[:, :0], positions[:, :0])
        row = tuple(np.concatenate(pair, 1) for pair in zip(earlier, (ids, positions), strict=True))
        row_ids, row_positions, padding = map(torch.from_numpy, (*row, mask))
        with torch.no_grad():
            made = model(input_ids=row_ids, attention_mask=padding, position_ids=row_positions)
        return SimpleNamespace(logits=made.logits[:, -ids.shape[1] :], past_key_values=row)
    with torch.no_grad():
        return model(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(positions),
            past_key_values=cache,
            use_cache=True,
        )


def each_row_alone(model: Any, ids: np.ndarray, mask: np.ndarray, states: list[Any] | None) -> Any:
    """The same of a model that knows neither padding nor, in a step of one token, batches."""
    made, after = None, list(states or [None] * len(ids))
    for row, real in enumerate(mask[:, -ids.shape[1] :].astype(bool)):
        if real.any():
            with torch.no_grad():
                its = model(torch.from_numpy(ids[row, real][None]), state=after[row], use_cache=True)
            made = its.logits.new_zeros((*ids.shape, its.logits.shape[-1])) if made is None else made
            made[row, torch.from_numpy(real)], after[row] = its.logits[0], its.state
    return SimpleNamespace(logits=made, past_key_values=after)


@functools.cache
def session(folder: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


class Decoder:
    """One side of a comparison: runs a prefill and decode steps with its own cache.

    It feeds, steps and compares by itself on purpose: `validate` does the same, and a fault there must not hide
    one in an export.
    """

    def __init__(self, folder: Path, runner: str) -> None:
        self.torch = None
        read = manifest.read(folder)
        self.carried = read.graphs[0].carried
        self.ports = {p.name: p.typed(read.dtype) for p in read.graphs[0].assembly.inputs}
        self.allowed = tolerance("float32", read)
        if runner == "torch":
            self.torch = TorchRunner(read, read.graphs[0])
            self.torch.activate()
        else:
            self.session = session(folder)
        self.past: dict[str, np.ndarray] = {}

    def step(self, ids: np.ndarray, positions: np.ndarray, mask: np.ndarray) -> np.ndarray:
        if not self.past:
            sizes = {"batch": len(ids), "past": 0}
            self.past = {
                n: np.zeros([sizes.get(d, d) for d in p.shape], p.dtype)
                for n, p in self.ports.items()
                if n in self.carried
            }
        if "position_ids" in self.ports and len(self.ports["position_ids"].shape) == 3 and positions.ndim == 2:
            positions = np.broadcast_to(positions, (3, *positions.shape))
        given = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
        feed = {n: a for n, a in given.items() if n in self.ports} | self.past
        if self.torch:
            outputs = self.torch.infer(feed, check_inputs=False)
        else:
            names = [o.name for o in self.session.get_outputs()]
            outputs = dict(zip(names, self.session.run(names, feed), strict=True))
        self.past = {n: outputs[self.carried[n]] for n in self.past}
        return outputs["logits"]

    def check(self, expected: np.ndarray, found: np.ndarray, where: np.ndarray | None = None) -> None:
        assert self.allowed.max_abs <= (MAX_ABS if self.allowed.rms_ratio <= RMS_RATIO else RECURRENT[0])
        assert self.allowed.rms_ratio <= RECURRENT[1]
        difference = compare(expected, found, where)
        assert difference.max_abs <= self.allowed.max_abs
        assert difference.rms_ratio <= self.allowed.rms_ratio
        assert difference.scale > 0.5, "logits near zero would prove nothing"


@functools.cache
def reference(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model as transformers has it, or as its architecture's reference makes it of what transformers has."""
    config = json.loads((folder / "config.json").read_text())
    said = archs.choose(None, config).reference
    if said.made_by:
        tensors = {n: t for shard in folder.glob("*.safetensors") for n, t in load_file(shard).items()}
        return references.make(said.made_by, config, tensors, dtype, "eager")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=said.attention)
    return model.eval()


def prompt(length: int = PROMPT, padding: int = 5, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(seed).integers(0, 256, (2, length))
    mask = np.ones_like(ids)
    mask[1, :padding] = 0
    return ids, mask
