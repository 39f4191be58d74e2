"""llmexport ops"""

from __future__ import annotations

from typing import Any

import click

from llmexport.export.cli.console import Console, talkative


@click.command("ops")
@talkative
def command(quiet: bool, as_json: bool) -> None:
    """List our ops: inputs, outputs, attributes, dtypes, and whether the plugin library serves them."""
    from llmexport.plugins import library
    from llmexport.plugins.declared import declared
    from llmexport.plugins.dtypes import FLOATS

    console = Console(quiet, as_json)
    built = library.find()
    served = library.served(built) if built else frozenset()
    records: list[dict[str, Any]] = [
        {
            "op": op.name,
            "version": op.version,
            "inputs": {n: list(d) for n, d in op.inputs.items()},
            "outputs": list(op.outputs),
            "attributes": op.attributes,
            "dtypes": FLOATS,
            "served": op.name in served,
        }
        for op in declared()
    ]
    console.table(
        f"ops; plugin library: {built or 'not built, see `llmexport plugins build`'}",
        ("op", "inputs", "outputs", "attributes", "dtypes", "plugin"),
        [
            (
                f"{r['op']} {r['version']}",
                ", ".join(f"{n} [{' '.join(d)}]" for n, d in r["inputs"].items()),
                ", ".join(r["outputs"]),
                ", ".join(f"{n}: {t}" for n, t in r["attributes"].items()),
                ", ".join(FLOATS),
                "yes" if r["served"] else "no",
            )
            for r in records
        ],
    )
    console.result({"library": str(built) if built else None, "ops": records})
