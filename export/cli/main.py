"""The command line. Each command is imported when it is called: `llmexport onnx` must not wait for torch."""

from __future__ import annotations

import importlib
import json
import sys

import click

from llmexport.export import values
from llmexport.plugins.errors import UserError

COMMANDS = ("archs", "onnx", "engine", "validate", "deploy", "checkpoint", "ops", "plugins", "doctor")


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
    """Exit codes: 0 done, 1 a validation failed, 2 something that the user can mend, or Ctrl-C."""
    try:
        code = cli.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        if "--json" in sys.argv:
            _fail(error.format_message())
        error.show()
        sys.exit(2)
    except UserError as error:
        _fail(str(error))
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted: nothing was left behind, and what was there before is as it was")


def _fail(text: str) -> None:
    message = values.message(text)
    if "--json" in sys.argv:
        click.echo(json.dumps({"error": message}))
    click.echo(f"error: {message}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
