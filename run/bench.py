"""How long an export takes to the first token and to each further one, and how much memory, beside PyTorch."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmexport.export import graph_file, manifest
from llmexport.export.folder import folder_path
from llmexport.export.output import write_files
from llmexport.export.progress import Progress, silent
from llmexport.run import bench_page
from llmexport.run.bench_run import EAGER, RUNNERS, Job, Timing
from llmexport.run.checks import check_decoder, check_prompt, positions
from llmexport.run.errors import RunError
from llmexport.validate.facts import environment
from llmexport.validate.feeds import words

COMMAND = (sys.executable, "-X", "faulthandler", "-m", "llmexport.run.bench_run")
TITLES = {"onnxruntime": "ONNX Runtime", "engine": "engine", EAGER: "PyTorch, eager"}


@dataclass(frozen=True)
class Row:
    """A runner: its medians in seconds, and bytes; None where it was not run, or its tokens are not PyTorch's.

    step: of one step, in which each row of the batch gets a token. note: why there are no times, or what it was.
    """

    runner: str
    note: str
    right: bool = True
    load: float | None = None
    first: float | None = None
    step: float | None = None
    tokens_per_second: float | None = None
    peak: int | None = None


@dataclass(frozen=True)
class Bench:
    """What was measured: of a model, for a prompt of so many tokens in each row, and on what."""

    arch: str
    dtype: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    runs: int
    threads: int
    rows: tuple[Row, ...]
    environment: dict[str, str]

    @property
    def right(self) -> bool:
        """Whether all that ran chose the same tokens."""
        return all(row.right for row in self.rows)

    def as_data(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def bench(
    folder: str | os.PathLike[str],
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    batch: int = 1,
    runs: int = 5,
    threads: int | None = None,
    progress: Progress = silent,
) -> Bench:
    """Times every runner that can run here, each in a process of its own, once to warm up and `runs` times.

    Greedy tokens are compared with PyTorch's first: a runner with others gets no time, unless they are others for what
    ONNX Runtime rounds to 8 bits, and PyTorch's where it does not. threads: None: one a core that
    this process may use. Raises UserError (llmexport.plugins.errors), with one line that says what to do.
    """
    asked = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens - 1, "batch": batch, "runs": runs}
    for name, value in asked.items():
        if value < 1:
            raise RunError(f"{name} is too small: make it {2 if name == 'new_tokens' else 1} or more")
    export = manifest.read(folder_path(folder))
    check_decoder(export)
    graph_file.check_files(export)
    most = positions(export)
    if most and prompt_tokens + new_tokens > most:
        raise RunError(f"{prompt_tokens} + {new_tokens} tokens are asked for, the model takes {most}: ask for fewer")
    ids = np.random.default_rng(0).choice(words(export.blocks), (batch, prompt_tokens)).tolist()
    check_prompt(export, ids[0])
    threads = threads or _cores()
    jobs = {r: Job(str(export.folder.resolve()), r, ids, new_tokens, runs, threads) for r in RUNNERS}
    timings: dict[str, Timing | str] = {}
    for place, (runner, job) in enumerate(jobs.items()):
        progress(TITLES[runner], place, len(RUNNERS))
        timings[runner] = _child(job)
    progress("done", len(RUNNERS), len(RUNNERS))
    rows = {runner: _row(runner, timing, timings[EAGER]) for runner, timing in timings.items()}
    rows["onnxruntime"] = _unrounded(rows["onnxruntime"], timings, jobs["onnxruntime"])
    measured = (batch, prompt_tokens, new_tokens, runs, threads, tuple(rows.values()))
    return Bench(export.arch, export.dtype, *measured, environment())


def write(found: Bench, folder: Path) -> None:
    """Writes `bench.json` and `bench.html` into an existing folder, replacing earlier ones."""
    files = {"bench.json": json.dumps(found.as_data(), indent=1), "bench.html": bench_page.page(found.as_data())}
    write_files(folder, {n: t.encode() for n, t in files.items()})


def _cores() -> int:
    # macOS lets nobody ask for less than all of them.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _child(job: Job) -> Timing | str:
    """What a runner took, or why it did not run. It has ended afterwards, whatever happens."""
    pipe = subprocess.PIPE
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads)}
    with subprocess.Popen(COMMAND, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment) as child:
        try:
            out, err = child.communicate(json.dumps(dataclasses.asdict(job)))
        finally:
            child.kill()
    if child.returncode:
        last = (err.strip().splitlines() or [""])[-1]
        how = signal.Signals(-child.returncode).name if child.returncode < 0 else f"exit code {child.returncode}"
        return f"its process ended with {how}: {last}"
    found = json.loads(out)
    return str(found["refused"]) if "refused" in found else Timing(**found)


def _row(runner: str, timing: Timing | str, eager: Timing | str) -> Row:
    if isinstance(timing, str):
        return Row(TITLES[runner], f"not run: {timing}")
    if isinstance(eager, str):
        return Row(TITLES[runner], "not timed: its tokens can be compared with nobody's", right=False)
    if timing.tokens != eager.tokens:
        pairs = zip(np.array(timing.tokens).T, np.array(eager.tokens).T, strict=True)
        at = next(i for i, (ours, theirs) in enumerate(pairs) if (ours != theirs).any())
        return Row(TITLES[runner], f"not timed: token {at + 1} is not PyTorch's", right=False)
    return _timed(runner, timing)


def _unrounded(row: Row, timings: Mapping[str, Timing | str], job: Job) -> Row:
    """A row of ONNX Runtime whose tokens are others: timed all the same if they are PyTorch's where it computes with
    the same packed numbers and rounds nothing that it multiplies them with."""
    ours, eager = timings["onnxruntime"], timings[EAGER]
    if row.right or isinstance(ours, str) or isinstance(eager, str):
        return row
    exact = _child(dataclasses.replace(job, runs=0, fused=False))
    if isinstance(exact, str) or exact.tokens != eager.tokens:
        return row
    said = row.note.removeprefix("not timed: ")
    rounds = f"{said}, as what packed numbers are multiplied with is rounded to 8 bits; without that all are"
    return dataclasses.replace(_timed("onnxruntime", ours), note=f"{ours.what}: {rounds}")


def _timed(runner: str, timing: Timing) -> Row:
    first, step = statistics.median(timing.first), statistics.median(timing.steps)
    speed = len(timing.tokens) / step
    return Row(TITLES[runner], timing.what, True, timing.load, first, step, speed, timing.peak)
