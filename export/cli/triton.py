"""llmexport triton"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from llmexport.export.cli.choice import ChoiceOf
from llmexport.export.cli.console import Console, talkative
from llmexport.export.cli.folder import FOLDER
from llmexport.export.cli.source import WEIGHTS


@click.command("triton")
@click.argument("folder", type=FOLDER)
@click.option("-o", "--output", type=FOLDER, required=True, help="The model repository to make.")
@click.option(
    "--backend",
    type=ChoiceOf("llmexport.run.triton", "BACKENDS"),
    help="Triton's: the engine or the ONNX file; default: the engine, if one of TensorRT is there.",
)
@click.option("--name", help="What the model is called; default: its architecture, and its block's name if it is one.")
@click.option("--weights", type=WEIGHTS, default="auto", help="How its files are put there, as those of an export.")
@talkative
def command(
    folder: Path, output: Path, backend: str | None, name: str | None, weights: str, quiet: bool, as_json: bool
) -> None:
    """Write a model repository of Triton Inference Server, of the engine or the ONNX file in FOLDER."""
    from llmexport.run.triton import write

    console = Console(quiet, as_json)
    made = write(folder, output, backend=backend, name=name, weights=weights)
    serve = f"tritonserver --model-repository={output.absolute()}"
    if made.register:
        serve += f" --backend-config=tensorrt,plugins={made.register.absolute()}"
    rows = [("models", ", ".join(made.models)), ("backend", made.backend), ("serve", serve)]
    console.table(f"model repository in {output}", (), rows)
    console.notes(made.notes)
    data = dataclasses.asdict(made)
    console.result(data | {"register": None if made.register is None else str(made.register), "serve": serve})
