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

from llmexport.export.engine_kernels import Kernel
from llmexport.export.errors import EngineError
from llmexport.plugins import library

COMMAND = (sys.executable, "-X", "faulthandler", "-m", "llmexport.export.engine_build")
# Warnings after which TensorRT goes on with a part of the model left out or changed.
ANOTHER_GRAPH = re.compile(
    "Unused Input: |currently ignores|Ignoring shape|[Cc]lamp(ing to|ed)|not found in plugin node|wrong shape"
)


Messages = collections.deque[str]


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
    """What a builder read, the kernels that it listed (None where it did not), its warnings, and how long it took."""

    network: Network
    kernels: tuple[Kernel, ...] | None
    messages: tuple[str, ...]
    seconds: float


def run(work: Path, module: str, timeout: float | None, check: Callable[[Network], None]) -> Run:
    """Does the job in the folder `work`, where the builder leaves the plan.

    check: called with what was read, before it is built; what it raises ends the builder. timeout: seconds until the
    builder is given up. Raises EngineError on whatever the builder says or dies of, OSError if it cannot write.
    """
    start = time.monotonic()
    messages: Messages = collections.deque(maxlen=20)
    network, kernels, built = None, None, False
    with builder(work, module) as child, limited(child, timeout) as late:
        for event in events(child, messages):
            match event:
                case Network():
                    network = event
                    check(network)
                case ["kernels", listed]:
                    kernels = tuple(Kernel(name, kind, tuple(nodes)) for name, kind, nodes in listed)
                case ["built"]:
                    built = True
        code = child.wait()
        if code or network is None or not built:
            raise died(work, f"was stopped after {timeout:g} s, see --timeout" if late() else reason(code), messages)
    return Run(network, kernels, tuple(dict.fromkeys(messages)), round(time.monotonic() - start, 2))


def events(child: subprocess.Popen[str], messages: Messages) -> Iterator[Network | list[Any]]:
    """What a builder tells, but for messages, which are gathered, and errors, which are raised."""
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
                yield Network(inputs, outputs, plugins, **facts)
            case ["unreadable", reasons]:
                raise EngineError(f"TensorRT cannot read the model: {'; '.join(reasons)}")
            case ["unbuildable"]:
                raise EngineError("\n  ".join(["TensorRT cannot build the model:", *messages]))
            case ["unwritable", code]:
                raise OSError(code, os.strerror(code))
            case event:
                yield event


def died(work: Path, how: str, messages: Messages) -> EngineError:
    """Of a builder whose process ended before it was done, and what it said last."""
    return EngineError("\n  ".join([f"TensorRT's builder {how}", *messages, *tail(work / "stderr")]))


@contextlib.contextmanager
def builder(work: Path, module: str, channel: int | None = None) -> Iterator[subprocess.Popen[str]]:
    """The builder's process, which has ended afterwards, whatever happens; `channel`: a file that it is left open."""
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
            pass_fds=() if channel is None else (channel,),
        ) as child,
    ):
        try:
            yield child
        finally:
            child.kill()
            child.wait()


@contextlib.contextmanager
def limited(child: subprocess.Popen[Any], timeout: float | None) -> Iterator[Callable[[], bool]]:
    """Kills a process that is still there after so many seconds; gives what says whether it was that."""
    start = time.monotonic()
    timer = threading.Timer(timeout or 0, child.kill)
    try:
        if timeout is not None:
            timer.start()
        yield lambda: timeout is not None and time.monotonic() - start >= timeout
    finally:
        timer.cancel()


def reason(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (", as happens when memory runs out" if name == "SIGKILL" else "")


def tail(path: Path) -> list[str]:
    """The last lines of a log of any size."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4000))
        return file.read().decode(errors="replace").splitlines()[-20:]
