"""One runner, timed in a process of its own, so that its memory is its own.

`python -m llmexport.run.bench_run` reads a Job as JSON from stdin, and writes what it found to stdout as JSON: a
Timing, or {"refused": reason}.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmexport.export import manifest
from llmexport.export.engine_build import die_with_parent
from llmexport.export.exported import Export
from llmexport.plugins.errors import UserError
from llmexport.run.checks import picture_tokens, run_again_at
from llmexport.run.prompts import begun
from llmexport.run.session import BACKENDS, decode, greedy, opened

EAGER = "eager"
RUNNERS = (*BACKENDS, EAGER)


@dataclass(frozen=True)
class Job:
    """The export, one of RUNNERS, the prompt's ids [B, T], how many tokens follow, how often, on how many threads; and
    whether ONNX Runtime may round what it multiplies packed numbers with."""

    folder: str
    runner: str
    ids: list[list[int]]
    new_tokens: int
    runs: int
    threads: int
    fused: bool = True


@dataclass(frozen=True)
class Timing:
    """What a runner took. what: its name and version. tokens: those that it chose, [B, new tokens].

    load: seconds until it was ready. first: of each run the seconds to the first token. steps: those of each later step
    of each run. peak: the most bytes that its process held.
    """

    what: str
    tokens: list[list[int]]
    load: float
    first: list[float]
    steps: list[float]
    peak: int


def main() -> None:
    # What libraries print to stdout is no answer: it goes to stderr.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    die_with_parent()
    job = Job(**json.load(sys.stdin))
    try:
        found = dataclasses.asdict(timed(job))
    except UserError as error:
        found = {"refused": str(error)}
    with answer:
        json.dump(found, answer)


def timed(job: Job) -> Timing:
    """One run to warm up, then those that count."""
    export, ids, start = manifest.read(Path(job.folder)), np.array(job.ids, np.int64), time.perf_counter()
    first, steps, tokens = list[float](), list[float](), list[np.ndarray]()
    ids, begin = begun(export, ids)
    with _session(export, job) as (session, what):
        load = time.perf_counter() - start
        for run in range(job.runs + 1):
            tokens, start = [], time.perf_counter()
            made = decode(session, ids, greedy, run_again_at(export), begin=begin, never=picture_tokens(export))
            for chosen in itertools.islice(made, job.new_tokens):
                now = time.perf_counter()
                if run:
                    (steps if tokens else first).append(now - start)
                tokens.append(chosen)
                start = now
    return Timing(what, np.stack(tokens, 1).tolist(), load, first, steps, peak())


@contextlib.contextmanager
def _session(export: Export, job: Job) -> Iterator[tuple[Any, str]]:
    """A session, and what it is."""
    if job.runner == EAGER:
        import torch

        from llmexport.run.eager import eager

        torch.set_num_threads(job.threads)
        model = eager(export)
        yield model, f"PyTorch {torch.__version__}, {model.name}"
        return
    with opened(export, job.runner, job.threads, fused=job.fused) as session:
        yield session, session.what


def peak() -> int:
    """The most bytes of memory that this process has held."""
    if not os.path.exists("/proc/self/status"):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # What Linux counts for getrusage begins with the process that started this one.
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
