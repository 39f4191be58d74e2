"""llmexport archs"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from llmexport.export.cli.console import Console, talkative

if TYPE_CHECKING:
    from llmexport.export.spec import Arch

GROUPS = ("of the documents", "most used")


@click.command("archs")
@talkative
def command(quiet: bool, as_json: bool) -> None:
    """List the architectures that can be exported, those of the documents first."""
    from llmexport.export import archs

    console = Console(quiet, as_json)
    # The systems of the documents that the project began with, then what else people use.
    found = sorted(map(archs.load, archs.names()), key=lambda a: not a.system)
    columns = ("--arch", "system", "model_type", "what it adds")
    for title in GROUPS:
        rows = [(a.name, a.system, types(a), a.adds) for a in found if group(a) == title]
        console.table(title, columns, rows)
    console.result([_data(a) for a in found])


def _data(arch: Arch) -> dict[str, Any]:
    return {
        "arch": arch.name,
        "group": group(arch),
        "system": arch.system,
        "model_types": arch.model_types,
        "multimodal": {m.model_type: "all" if m.tower else "text" for m in arch.multimodal},
        "adds": arch.adds,
        "reference": arch.reference.model_class,
    }


def group(arch: Arch) -> str:
    """Which of GROUPS an architecture is listed in."""
    return GROUPS[not arch.system]


def types(arch: Arch) -> str:
    """The model_types of its checkpoints; of some that hold other parts too, the text model alone is exported."""
    beside = (m.model_type if m.tower else f"{m.model_type} (text)" for m in arch.multimodal)
    return ", ".join((*arch.model_types, *beside))
