"""Checkpoints and exports that tests share, each made once a session."""

from __future__ import annotations

import copy
import dataclasses
import fcntl
import functools
import gc
import hashlib
import importlib.util
import json
import os
import re
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from arch_cases import CASES, EVERY_TIME, FIRST, Case

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Beside others that test, each with one core.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
Exporter = Callable[..., Path]
# What a machine that runs the kernels need not have: no test that is marked gpu imports one of these.
NOT_FOR_KERNELS = ("click", "onnx_graphsurgeon", "onnx_ir", "onnxruntime", "onnxscript", "polygraphy", "psutil")
NOT_FOR_KERNELS += ("safetensors", "tensorrt", "tensorrt_lean", "tensorrt_rtx", "transformers")

# The tier of a test by what its fixtures, or what its file takes from native.py, make; where neither says it, the
# test or its file is marked by hand.
TIERS = {"exported": "model", "exported_as_stored": "model", "tiny_checkpoint": "model", "cuda_library": "engine"}
TIERS |= dict.fromkeys(("machine", "compiled", "beside_emulated", "emulated_library", "Plans"), "kernel")
NOT_QUICK = {*TIERS.values(), "slow", "gpu"}


def pytest_addoption(parser: pytest.Parser) -> None:
    if not importlib.util.find_spec("xdist"):
        parser.addoption("--dist", help="of pyproject.toml, for xdist, which is not installed")


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Tests by the thousand, and what they import, are no garbage: looking for cycles among them takes a twentieth of a
    session."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(10_000, 20, 20)
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks each test with its tiers; the rest is quick. It is slow where nvcc has to compile the whole library, and
    where it asks more of a family than every session does."""
    for item in items:
        used = TIERS.keys() & {*getattr(item, "fixturenames", ()), *vars(getattr(item, "module", object))}
        for mark in {TIERS[name] for name in used} | {"slow" for name in used if name == "cuda_library"}:
            item.add_marker(mark)
        if not item.get_closest_marker("quick") and used and _asks_more(item):
            item.add_marker("slow")
        if not NOT_QUICK & {mark.name for mark in item.iter_markers()}:
            item.add_marker("quick")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Slow tests begin until `LLMEXPORT_SLOW_UNTIL`, in seconds since 1970, so that a slow machine ends in time too."""
    until = os.environ.get("LLMEXPORT_SLOW_UNTIL")
    if until and time.time() > float(until) and item.get_closest_marker("slow"):
        pytest.skip("slow, and the time for slow tests is up")


def _asks_more(item: pytest.Item) -> bool:
    """Whether a test is of a family that is not tested whole in every session, and makes no claim on every family."""
    params = vars(getattr(item, "callspec", object)).get("params", {})
    cases = [c for value in params.values() for c in (value if isinstance(value, tuple) else (value,))]
    later = [c for c in cases if isinstance(c, Case) and c.arch not in EVERY_TIME]
    return bool(later) and not (item.get_closest_marker("every_family") and {*later} <= {*FIRST})


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Under `-m gpu` a module that needs what kernels do not is skipped, and says what it is."""
    report = yield
    missing = re.search(r"No module named '(\w+)", str(report.longrepr)) if report.failed else None
    if missing and missing[1] in NOT_FOR_KERNELS and re.match(r"gpu\b", collector.config.option.markexpr):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {missing[1]} is not installed")
    return report


def of_session(factory: pytest.TempPathFactory) -> Path:
    """The folder that all processes of this session have theirs in."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """A folder that the first process to want it makes, and that nobody changes."""
    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            make(folder.with_suffix(".making"))
            folder.with_suffix(".making").rename(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def trace_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An own trace cache, empty at first: no test may pass on what an earlier session traced."""
    folder = of_session(tmp_path_factory) / "traces"
    folder.mkdir(exist_ok=True)
    os.environ["LLMEXPORT_CACHE"] = str(folder)
    return folder


@pytest.fixture
def up_to_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rungs of the ladder that need no TensorRT, alone, for claims on them."""
    from llmexport.validate import forms, ladder

    monkeypatch.setattr(ladder, "FORMS", (forms.ONNX_RUNTIME,))
    monkeypatch.setattr(ladder, "RUNGS", ("transformers", "blocks", forms.ONNX_RUNTIME.rung))


@pytest.fixture(scope="session")
def cuda_library() -> Path:
    """The plugin library as nvcc compiles it for every architecture."""
    import native

    return native.cuda_library()


def as_case(which: Case | str) -> Case:
    return which if isinstance(which, Case) else next(c for c in CASES if c.arch == which)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes the checkpoint of a case with transformers, or where it has no class of this layout by the names and
    shapes that are published: several shards, norms and biases randomised.

    `tiny_checkpoint(case, "all")` has the text model within the multimodal one.
    """

    def make(case: Case, part: str, folder: Path) -> None:
        import torch
        import transformers
        from layouts import randomise

        from llmexport.export import archs, random_checkpoint

        arch = archs.load(case.arch)
        text = {**arch.tiny, **case.changes}
        vision = text.pop("vision_config", {})
        if arch.reference.made_by:
            random_checkpoint.write(arch, folder, config=text, dtype="float32", shard_bytes=100_000)
            return
        config = copy.deepcopy(dict(archs.tiny_config(dataclasses.replace(arch, tiny=text), part)))
        config.get("vision_config", {}).update(vision)
        [name] = config.pop("architectures", [arch.reference.model_class])
        model_class = getattr(transformers, name)
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**config))
        randomise(model)
        model.save_pretrained(folder, max_shard_size="100KB")
        assert len(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]) > 1

    @functools.cache
    def once(case: Case, part: str) -> Path:
        name = hashlib.sha256(repr((case, part)).encode()).hexdigest()[:16]
        folder = of_session(tmp_path_factory) / "checkpoints" / f"{case.name}-{name}"
        return made_once(folder, functools.partial(make, case, part))

    return lambda which, part="text": once(as_case(which), part)


def need_static_caches() -> None:
    from llmexport.validate.runtime import OLDEST_STATIC, version

    if tuple(map(int, re.findall(r"\d+", version())[:2])) < OLDEST_STATIC:
        # There is no later one for Python 3.10.
        pytest.skip(f"ONNX Runtime {version()} runs no static cache")


@pytest.fixture
def static_caches() -> None:
    need_static_caches()


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> Exporter:
    """Exports a case; `exported(case, dtype="float16", block="attention")`; `slots` are those of a static cache, with
    which a test is skipped where ONNX Runtime has none, `cache` is its kind, and `window_slots` what windows keep;
    `part` is that of a multimodal checkpoint, if not "text"; `target` is who runs it, if not all do."""

    @functools.cache
    def make(case: Case, dtype: str, block: str | None, weights: str, part: str, **kind: Any) -> Path:
        from llmexport.export import archs, onnx_file
        from llmexport.export.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(tiny_checkpoint(case, "text" if part == "text" else "all"))
        folder = tmp_path_factory.mktemp(f"{case.name}-{dtype}") / "export"
        arch = archs.choose(None, checkpoint.config)
        request = onnx_file.Request(arch, checkpoint, dtype, block, weights, part=part, **kind)
        onnx_file.write(request, folder, force=False)
        return folder

    def export(
        which: Case | str,
        dtype: str = "float32",
        block: str | None = None,
        weights: str = "auto",
        slots: int | None = None,
        part: str = "text",
        cache: str = "static",
        window_slots: str = "last",
        target: str = "portable",
    ) -> Path:
        kind = {"cache": cache, "max_tokens": slots, "window_slots": window_slots} if slots else {}
        if slots:
            need_static_caches()
        return make(as_case(which), dtype, block, weights, part, target=target, **kind)

    return export


@pytest.fixture(scope="session")
def exported_as_stored(tmp_path_factory: pytest.TempPathFactory) -> Exporter:
    """Exports a family in the type that its checkpoint is stored in, as published ones are, where `exported` casts
    fp32; `exported_as_stored(arch, dtype="float16")`, with `slots`, `cache` and `window_slots` as there."""

    @functools.cache
    def export(
        arch: str,
        dtype: str = "bfloat16",
        slots: int | None = None,
        cache: str = "static",
        window_slots: str = "last",
    ) -> Path:
        from llmexport.export import archs, onnx_file, random_checkpoint
        from llmexport.export.checkpoint import open_checkpoint

        if slots:
            need_static_caches()
        folder = tmp_path_factory.mktemp(f"{arch}-{dtype}-stored")
        random_checkpoint.write(archs.load(arch), folder / "checkpoint", dtype=dtype, shard_bytes=100_000)
        static = {"cache": cache, "max_tokens": slots, "window_slots": window_slots}
        kind: dict[str, Any] = static if slots else {}
        checkpoint = open_checkpoint(folder / "checkpoint")
        onnx_file.write(onnx_file.Request(archs.load(arch), checkpoint, dtype, **kind), folder / "export", force=False)
        return folder / "export"

    return export
