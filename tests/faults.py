"""Disks that are full and users who press Ctrl-C, at every step of an action."""

import builtins
import contextlib
import errno
import gc
import inspect
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

from llmexport.export import output, workspace
from llmexport.export.errors import ExportError

Tree = dict[str, bytes | None]


def tree(folder: Path) -> Tree:
    """Every file with its bytes, and every folder: hidden and stray ones too."""
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}


def fill(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        if not (folder / name).parent.is_dir():
            (folder / name).parent.mkdir()
        (folder / name).write_bytes(data)


class Fault:
    """Counts the calls that can find the disk full, and fails the one that is `due`."""

    def __init__(self, due: int, error: OSError) -> None:
        self.due, self.error, self.calls = due, error, 0

    def step(self) -> None:
        self.calls += 1
        if self.calls == self.due:
            raise self.error

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("mkdir", "fsync", "rename", "replace", "link"):
                patch.setattr(os, name, self.before(getattr(os, name)))
            patch.setattr(output, "exchange", self.before(output.exchange))
            patch.setattr(output, "open", self.open, raising=False)
            patch.setattr(Path, "write_bytes", self.before(Path.write_bytes))
            yield

    def before(self, call: Callable[..., object]) -> Callable[..., object]:
        def checked(*args: object, **options: object) -> object:
            self.step()
            return call(*args, **options)

        return checked

    def open(self, path: Path, mode: str) -> object:
        if mode == "xb":
            self.step()
            try:
                self.step()
            except OSError:
                # This time the file is there and its data is not.
                path.touch()
                raise
        return builtins.open(path, mode)


def every_full_disk(action: Callable[[], object], folder: Path) -> None:
    """Run `action` with a full disk at its first step, its second ... to its end: `folder` stays the same."""
    before = tree(folder)
    for due in range(1, 100):
        fault = Fault(due, OSError(errno.ENOSPC, "No space left on device"))
        with fault.armed():
            try:
                action()
            except ExportError as error:
                message = str(error)
            else:
                break
        assert "No space left on device: free space" in message
        assert tree(folder) == before
    assert fault.calls == due - 1 > 5


def every_interrupt(reset: Callable[[], None], action: Callable[[], None], check: Callable[[], None]) -> None:
    """Run `action` with Ctrl-C at the first moment that Python looks for one, the second ... to its end."""
    ours = {module.__file__ for module in (output, workspace, contextlib, shutil)}
    for due in range(1, 10_000):
        reset()
        seen = 0

        def look(frame: FrameType, event: str, argument: object, due: int = due) -> None:
            nonlocal seen
            # Python runs a signal's handler when a Python function begins and when a C function has ended.
            # A generator that goes on is no beginning: Python 3.10 would end it without its `finally`.
            resumed = event == "call" and frame.f_code.co_flags & inspect.CO_GENERATOR
            if event in ("call", "c_return") and frame.f_code.co_filename in ours and not resumed:
                seen += 1
                if seen == due:
                    raise KeyboardInterrupt  # which also ends the profiling

        sys.setprofile(look)
        try:
            action()
        except (KeyboardInterrupt, OSError) as error:
            # At some moments shutil.rmtree closes a file twice and so makes an OSError of it.
            interrupt = error if isinstance(error, KeyboardInterrupt) else error.__context__
            assert isinstance(interrupt, KeyboardInterrupt)
            del interrupt
        else:
            assert seen > 50
            return
        finally:
            sys.setprofile(None)
        # A generator that is not told of the interrupt ends with the traceback that holds it.
        gc.collect(0)
        check()
    raise AssertionError("the action never succeeds")
