"""llmexport archs"""

import inspect
import sys

import click

from llmexport.export import archs
from llmexport.export.cli.console import Console, talkative


@click.command("archs")
@talkative
def command(quiet: bool, as_json: bool) -> None:
    """List the architectures that can be exported."""
    console = Console(quiet, as_json)
    found = [archs.load(n) for n in archs.names()]
    about = {a.name: (inspect.getdoc(sys.modules[a.build.__module__]) or "").partition("\n")[0] for a in found}
    console.table(
        "architectures",
        ("--arch", "model_type", "what"),
        [(a.name, ", ".join(a.model_types), about[a.name]) for a in found],
    )
    console.result([{"arch": a.name, "model_types": a.model_types, "about": about[a.name]} for a in found])
