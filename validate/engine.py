"""The engines of an export, run on the GPU here: rung `engine`, and whoever replays a golden pack on them."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmexport.export import builder, device, engine_backend, engine_record
from llmexport.export.engine_backend import BACKENDS
from llmexport.export.engine_record import Engine
from llmexport.export.errors import EngineError
from llmexport.plugins import library
from llmexport.validate.engine_api import environment
from llmexport.validate.wire import Arrays, Message, receive, send

COMMAND = (sys.executable, "-X", "faulthandler", "-m", "llmexport.validate.engine_run")
SECONDS = 600.0  # for an answer, also the first, before which a large plan is read and moved to the GPU
LAST = 10.0  # seconds in which a process that says no more must end


def check(folder: Path) -> tuple[Engine, str]:
    """The engine in a folder, if it can run here, and what is to be known of it. Raises EngineError if it cannot.

    TensorRT is asked for nothing: what is left to check is its version.
    """
    engine = engine_record.read(folder)
    engine_backend.check_backend(engine.backend)
    if importlib.util.find_spec("polygraphy") is None:
        raise EngineError("polygraphy is not installed, which runs the engine: pip install polygraphy")
    engine_record.check_files(folder, engine)
    found = device.first()
    if isinstance(found, str):
        raise EngineError(f"{found}: run this where the engine is to run")
    return engine, engine_record.check_device(folder, engine, found)


class Session:
    """Engines that are loaded in a process of their own.

    seconds: of the last call, with the copies to and from the GPU.
    """

    def __init__(self, child: subprocess.Popen[bytes], log: Path, timeout: float) -> None:
        self.seconds = 0.0
        self._child, self._log, self._timeout = child, log, timeout

    def run(self, graph: str, feed: Arrays) -> Arrays:
        """The outputs of a graph; of bfloat16 the bits, as in the feed. Raises EngineError if the process ends."""
        message, outputs = self.ask({"graph": graph}, feed)
        self.seconds = message["seconds"]
        return outputs

    def ask(self, message: Message | None, feed: Arrays | None = None) -> tuple[Message, Arrays]:
        """The answer to a message; to none, what the process says first."""
        with builder.limited(self._child, self._timeout) as late:
            with contextlib.suppress(BrokenPipeError):
                if message is not None and self._child.stdin:
                    send(self._child.stdin, message, feed)
            received = receive(self._child.stdout) if self._child.stdout else None
            gave_up = late()
        if received is None:
            raise EngineError(self._death(gave_up))
        if "refused" in received[0]:
            raise EngineError(received[0]["refused"])
        return received

    def _death(self, late: bool) -> str:
        try:
            # What it dies of is known a moment after it says no more.
            code = self._child.wait(LAST)
        except subprocess.TimeoutExpired:
            self._child.kill()
            code = self._child.wait()
        why = f"gave no answer in {self._timeout:g} s" if late else builder.reason(code)
        return "\n  ".join([f"the process that runs the engine {why}", *builder.tail(self._log)])


@contextlib.contextmanager
def started(folder: Path, engine: Engine, timeout: float = SECONDS) -> Iterator[Session]:
    """The engine's plans, loaded. Raises EngineError if the TensorRT here is another one, or does not take them."""
    module = BACKENDS[engine.backend].module
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmexport-")))
        (work / "links").mkdir()
        job: dict[str, Any] = {"module": module, "folder": os.path.abspath(folder)}
        job |= {"libraries": [lib.file for lib in engine.plugins]}
        job |= {"weights": [dataclasses.asdict(file) for file in engine.weights]}
        job |= {"plans": {name: dataclasses.asdict(plan) for name, plan in engine.graphs.items()}}
        (work / "job.json").write_text(json.dumps(job))
        log = stack.enter_context(open(work / "stderr", "xb"))
        child = stack.enter_context(
            subprocess.Popen(
                [*COMMAND, str(work)],
                cwd=work,
                env=environment(module, library.builder_environment(module, work / "links")),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        )
        stack.callback(_end, child)
        session = Session(child, work / "stderr", timeout)
        first, _ = session.ask(None)
        engine_record.check_version(folder, engine, first["version"])
        session.ask({"load": True})
        yield session


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    # What it has not read any more is no error, and must not hide the one that was.
    with contextlib.suppress(BrokenPipeError):
        if child.stdin:
            child.stdin.close()
