"""Checkpoints and exports that tests share, each made once a session."""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from arch_cases import CASES, Case
from layouts import randomise

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Beside others that test, each with one core.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
Exporter = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def trace_cache(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """An own trace cache, empty at first: no test may pass on what an earlier session traced."""
    base = tmp_path_factory.getbasetemp()
    # Processes that test side by side have their folders in one of this session.
    folder = (base if worker_id == "master" else base.parent) / "traces"
    folder.mkdir(exist_ok=True)
    os.environ["LLMEXPORT_CACHE"] = str(folder)
    return folder


def as_case(which: Case | str) -> Case:
    return which if isinstance(which, Case) else next(c for c in CASES if c.arch == which)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case | str], Path]:
    """Makes the checkpoint of a case with transformers: several shards, norms and biases randomised."""

    @functools.cache
    def make(case: Case) -> Path:
        import torch
        import transformers

        from llmexport.export import archs

        arch = archs.load(case.arch).arch
        folder = tmp_path_factory.mktemp(case.name) / "checkpoint"
        model_class = getattr(transformers, arch.causal_lm)
        torch.manual_seed(0)
        # A copy, as transformers writes into the dictionaries that it is given.
        model = model_class(model_class.config_class(**copy.deepcopy({**arch.tiny, **case.changes})))
        randomise(model)
        model.save_pretrained(folder, max_shard_size="100KB")
        assert len(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]) > 1
        return folder

    return lambda which: make(as_case(which))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[Case | str], Path]) -> Exporter:
    """Exports a case; `exported(case, dtype="float16", block="attention")`."""

    @functools.cache
    def make(case: Case, dtype: str, block: str | None, weights: str) -> Path:
        from llmexport.export import archs, onnx_file
        from llmexport.export.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(tiny_checkpoint(case))
        folder = tmp_path_factory.mktemp(f"{case.name}-{dtype}") / "export"
        request = onnx_file.Request(archs.choose(None, checkpoint.config), checkpoint, dtype, block, weights)
        onnx_file.write(request, folder, force=False, progress=lambda what, done, of: None)
        return folder

    def export(which: Case | str, dtype: str = "float32", block: str | None = None, weights: str = "auto") -> Path:
        return make(as_case(which), dtype, block, weights)

    return export
