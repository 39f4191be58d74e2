"""The command line. Each command is imported when it is called: `llmexport onnx` must not wait for torch."""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

import click

from llmexport.export import interrupt, values
from llmexport.plugins.errors import UserError

COMMANDS = (
    "archs",
    "onnx",
    "engine",
    "validate",
    "golden",
    "deploy",
    "generate",
    "bench",
    "triton",
    "checkpoint",
    "ops",
    "plugins",
    "doctor",
)
MENDABLE, BUG = 2, 3
# click has it since 8.2; before, help is an Exit, and this catches nothing.
NO_ARGUMENTS: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())


class Lazy(click.Group):
    """Commands by the name of their module."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"llmexport.export.cli.{cmd_name}").command
        return command


@click.command(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="llmexport")
def cli() -> None:
    """Export published LLM checkpoints to ONNX and TensorRT, with the error shown at every rung."""


def main() -> None:
    """Exit codes: 0 done, 1 a comparison failed, 2 something that the user can mend, or an interrupt, 3 a bug."""
    # No cycles are looked for at the end of the process, which takes a second behind a trace, nor within an export.
    atexit.register(gc.freeze)
    if sys.argv[1:2] == ["onnx"]:
        gc.disable()
    _open_closed()
    with interrupt.handled():
        code, error = _call()
        if interrupt.came() and code != MENDABLE:
            # A library lost the exception, inside a callback, or made another one of it.
            code, error = MENDABLE, _interrupted()
    if error:
        _say(error, code)
    for stream in (sys.stdout, sys.stderr):
        with _as_possible(stream):
            pass
    sys.exit(code)


def _call() -> tuple[int, str]:
    """Runs the command; returns the exit code, and the error, if it is one."""
    try:
        if "_LLMEXPORT_COMPLETE" in os.environ:
            cli.main(prog_name="llmexport", standalone_mode=False)
        return _run(), ""
    except click.exceptions.Exit as ended:
        return ended.exit_code, ""
    except click.ClickException as error:
        return MENDABLE, _usage(error)
    except UserError as error:
        return MENDABLE, str(error)
    except (KeyboardInterrupt, click.Abort):
        return MENDABLE, _interrupted()
    except Exception as error:
        from llmexport.export.cli import faults

        line = faults.in_one_line(error)
        return (MENDABLE, line) if line else (BUG, traceback.format_exc())


def _run() -> int:
    try:
        # Not cli.main(), which ends with code 1 where a pipe breaks.
        with cli.make_context("llmexport", sys.argv[1:]) as context:
            code = cli.invoke(context)
    except NO_ARGUMENTS as asked:
        click.echo(asked.format_message())
        return 0
    return code if isinstance(code, int) else 0


def _usage(error: click.ClickException) -> str:
    """What click says, in one line, and where to read on."""
    said = " ".join(error.format_message().split()).removesuffix(".")
    context = getattr(error, "ctx", None)
    return f"{said}: see `{context.command_path} --help`" if context else said


def _interrupted() -> str:
    name = interrupt.came() or "SIGINT"
    return f"interrupted by {name}: nothing half done was left behind, and what is there is whole"


def _say(error: str, code: int) -> None:
    """The error on stderr, and as JSON on stdout for who asked for JSON; where these can be written."""
    error = error if code == BUG else values.message(error)
    with _as_possible(sys.stdout):
        if "--json" in sys.argv[1:]:
            click.echo(json.dumps({"error": error}))
    with _as_possible(sys.stderr):
        click.echo(error if code == BUG else f"error: {error}", err=True)


@contextmanager
def _as_possible(stream: TextIO | None) -> Iterator[None]:
    """Ends what is said to `stream`, if that is full or has no reader, without a word at the end of the process."""
    try:
        yield
        if stream:
            stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), cast(TextIO, stream).fileno())


def _open_closed() -> None:
    """Open what was closed of stdin, stdout and stderr: else a file that is written next takes its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        # A name that is no text is shown, not an error.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    main()
