"""llmexport archs"""

import inspect
import sys

import click

from llmexport.export import archs
from llmexport.export.cli.console import Console, talkative
from llmexport.export.spec import Multimodal


@click.command("archs")
@talkative
def command(quiet: bool, as_json: bool) -> None:
    """List the architectures that can be exported."""
    console = Console(quiet, as_json)
    found = [archs.load(n) for n in archs.names()]
    about = {a.name: (inspect.getdoc(sys.modules[a.build.__module__]) or "").partition("\n")[0] for a in found}
    console.table(
        "architectures",
        ("--arch", "model_type", "multimodal", "what"),
        [(a.name, ", ".join(a.model_types), ", ".join(map(_part, a.multimodal)), about[a.name]) for a in found],
    )
    console.result(
        [
            {
                "arch": a.name,
                "model_types": a.model_types,
                "multimodal": {m.model_type: "all" if m.tower else "text" for m in a.multimodal},
                "about": about[a.name],
            }
            for a in found
        ]
    )


def _part(of: Multimodal) -> str:
    """A kind of checkpoint that holds the text model, and whether that is all of it that is exported."""
    return of.model_type if of.tower else f"{of.model_type} (text alone)"
