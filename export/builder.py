"""Runs TensorRT's builder in a process of its own (`engine_build.py`), so that its crash is an error and not ours."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmexport.export.errors import EngineError
from llmexport.plugins import library

COMMAND = (sys.executable, "-X", "faulthandler", "-m", "llmexport.export.engine_build")
# Warnings after which TensorRT goes on with a part of the model left out or changed.
ANOTHER_GRAPH = re.compile(
    "Unused Input: |currently ignores|Ignoring shape|[Cc]lamp(ing to|ed)|not found in plugin node|wrong shape"
)


@dataclass(frozen=True)
class Network:
    """What TensorRT read: [name, type, shape with -1] of each input and output, the names of its plugin layers, its
    version, how many layers there are of each kind, and those that would compute weights alone at every step."""

    inputs: list[list[Any]]
    outputs: list[list[Any]]
    plugins: list[str]
    version: str
    layers: Mapping[str, int]
    computed: list[str]


@dataclass(frozen=True)
class Run:
    """What a builder read, its warnings, and how long it took."""

    network: Network
    messages: tuple[str, ...]
    seconds: float


def run(work: Path, module: str, timeout: float | None, check: Callable[[Network], None]) -> Run:
    """Does the job in the folder `work`, where the builder leaves the plan.

    check: called with what was read, before it is built; what it raises ends the builder. timeout: seconds until the
    builder is given up. Raises EngineError on whatever the builder says or dies of, OSError if it cannot write.
    """
    start = time.monotonic()
    messages: collections.deque[str] = collections.deque(maxlen=20)
    network, built = None, False
    with _builder(work, module, timeout) as child:
        for line in child.stdout or ():
            if not line.endswith("\n"):
                # It died in the middle of an event.
                break
            match json.loads(line):
                case ["log", text]:
                    messages.append(text)
                    if ANOTHER_GRAPH.search(text):
                        raise EngineError(f"TensorRT would build another graph than the model's: {text}")
                case ["parsed", inputs, outputs, plugins, facts]:
                    network = Network(inputs, outputs, plugins, **facts)
                    check(network)
                case ["unreadable", reasons]:
                    raise EngineError(f"TensorRT cannot read the model: {'; '.join(reasons)}")
                case ["unbuildable"]:
                    raise EngineError("\n  ".join(["TensorRT cannot build the model:", *messages]))
                case ["unwritable", code]:
                    raise OSError(code, os.strerror(code))
                case ["built"]:
                    built = True
        code = child.wait()
    seconds = time.monotonic() - start
    if code or network is None or not built:
        late = timeout is not None and seconds >= timeout
        reason = f"was stopped after {timeout:g} s, see --timeout" if late else _reason(code)
        raise EngineError("\n  ".join([f"TensorRT's builder {reason}", *messages, *_tail(work / "stderr")]))
    return Run(network, tuple(dict.fromkeys(messages)), round(seconds, 2))


@contextlib.contextmanager
def _builder(work: Path, module: str, timeout: float | None) -> Iterator[subprocess.Popen[str]]:
    """The builder's process. It has ended afterwards, whatever happens."""
    pipe = subprocess.PIPE
    (work / "links").mkdir()
    with (
        open(work / "stderr", "xb") as stderr,
        # From `work`, as `-m` looks for modules where it is first.
        subprocess.Popen(
            [*COMMAND, str(work)],
            cwd=work,
            env=library.builder_environment(module, work / "links"),
            stdin=pipe,
            stdout=pipe,
            stderr=stderr,
            text=True,
        ) as child,
    ):
        timer = threading.Timer(timeout or 0, child.kill)
        try:
            if timeout is not None:
                timer.start()
            yield child
        finally:
            timer.cancel()
            child.kill()
            child.wait()


def _reason(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (", as happens when memory runs out" if name == "SIGKILL" else "")


def _tail(path: Path) -> list[str]:
    """The last lines of a log of any size."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4000))
        return file.read().decode(errors="replace").splitlines()[-20:]
