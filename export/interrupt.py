"""Ctrl-C, and the signals that ask a process to end, as one: KeyboardInterrupt, which is also remembered."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_came: list[signal.Signals] = []


@contextmanager
def handled() -> Iterator[None]:
    """Within the block each of SIGNALS raises KeyboardInterrupt; one that was ignored, as under nohup, still is."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {s: h for s in SIGNALS if (h := signal.getsignal(s)) not in (signal.SIG_IGN, None)}
    hook = sys.unraisablehook

    def report(lost: sys.UnraisableHookArgs) -> None:
        # It is not lost: `check` raises it again.
        if not (_came and issubclass(lost.exc_type, KeyboardInterrupt)):
            hook(lost)

    try:
        sys.unraisablehook = report
        for number in before:
            signal.signal(number, _interrupt)
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
        if _came:
            # CPython remembers a KeyboardInterrupt that passed through the exec of a text, and though it was caught
            # would end `python -m` by SIGINT, until a text is executed again.
            exec("")
        _came.clear()


def came() -> str:
    """The name of the first signal that came within the block, or nothing."""
    return _came[0].name if _came else ""


def check() -> None:
    """Raise KeyboardInterrupt again if one has come: libraries that catch everything, or are in a callback, lose it."""
    if _came:
        raise KeyboardInterrupt


def _interrupt(number: int, frame: FrameType | None) -> None:
    _came.append(signal.Signals(number))
    raise KeyboardInterrupt
