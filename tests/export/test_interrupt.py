"""Signals that ask a process to end: each unwinds it, none is lost, one that is ignored stays so."""

import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from misuse import heed_signals

from llmexport.export import archs, interrupt, random_checkpoint
from llmexport.export.cli import main as module
from llmexport.export.interrupt import SIGNALS

pytestmark = pytest.mark.model


@pytest.fixture
def heeded() -> Iterator[None]:
    """The handlers that a process begins with, also where this one was started with SIGINT ignored."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    heed_signals()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_is_a_keyboard_interrupt_and_is_remembered(number: signal.Signals) -> None:
    with interrupt.handled():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        assert interrupt.came() == number.name
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
    interrupt.check()


@pytest.mark.usefixtures("heeded")
def test_handlers_are_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with interrupt.handled():
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_was_ignored_still_is(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)
    with interrupt.handled():
        signal.raise_signal(number)
        assert interrupt.came() == ""
        interrupt.check()


class Thing:
    pass


def lose_in_a_callback() -> None:
    """An import does the same: the lock of a module has a weak reference with a callback in Python."""
    thing = Thing()
    held = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGTERM))
    del thing
    assert held() is None


def lose_in_a_handler() -> None:
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException as error:
        assert isinstance(error, KeyboardInterrupt)  # noqa: PT017


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize(("lose", "name"), [(lose_in_a_callback, "SIGTERM"), (lose_in_a_handler, "SIGINT")])
def test_a_command_whose_libraries_lose_an_interrupt_does_not_end_well(
    lose: object, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "cli", click.Command("llmexport", callback=lose))
    monkeypatch.setattr(sys, "argv", ["llmexport"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: interrupted by {name}: nothing half done was left behind")


def test_a_signal_while_a_module_is_imported_is_not_lost() -> None:
    """In the very callback of importlib, where Python itself drops the exception."""
    code = """
import signal, sys
from llmexport.export.cli import main

def look(frame, event, argument):
    if event == "call" and frame.f_code.co_name == "cb" and "importlib" in frame.f_code.co_filename:
        sys.setprofile(None)
        signal.raise_signal(signal.SIGINT)

sys.argv = ["llmexport", "archs", "-q"]
sys.setprofile(look)
main.main()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=heed_signals)
    assert run.stderr.startswith("error: interrupted by SIGINT: nothing half done")
    assert run.returncode == 2


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_code_that_was_made_from_text_ends_the_process_as_any(
    number: signal.Signals, tmp_path: Path
) -> None:
    """As dataclasses and torch make it: `python -m` would end by SIGINT then, after all was said and done."""
    code = f"""
import signal, sys
import click
from llmexport.export.cli import main

main.cli = click.Command("llmexport", callback=lambda: exec("signal.raise_signal({int(number)})"))
sys.argv = ["llmexport"]
main.main()
"""
    (tmp_path / "interrupted.py").write_text(code)
    command = [sys.executable, "-m", "interrupted"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=heed_signals)
    assert run.stderr.startswith(f"error: interrupted by {number.name}: nothing half done")
    assert run.returncode == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_process_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """The signal itself, while a trace is under way: an empty trace cache makes that long."""
    checkpoint = tmp_path / "ck"
    random_checkpoint.write(archs.load("gemma"), checkpoint, shard_bytes=60_000)
    command = [sys.executable, "-m", "llmexport.export.cli.main", "onnx", "--checkpoint", str(checkpoint), "-o"]
    environment = os.environ | {"LLMEXPORT_CACHE": str(checkpoint.parent / "cache")}
    process = subprocess.Popen(
        [*command, str(checkpoint.parent / "out")],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_signals,
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    assert line.startswith("trace")
    time.sleep(1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.splitlines()[-1].startswith(f"error: interrupted by {number.name}")
    assert not [p for p in checkpoint.parent.iterdir() if p.name not in ("ck", "cache")]
