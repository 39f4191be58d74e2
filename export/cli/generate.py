"""llmexport generate"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import click

from llmexport.export.cli.choice import ChoiceOf
from llmexport.export.cli.console import Console, talkative
from llmexport.export.cli.folder import FOLDER
from llmexport.run import MOST_TOKENS
from llmexport.run.errors import RunError


@click.command("generate")
@click.argument("folder", type=FOLDER)
@click.option("--prompt", help="The text to continue; - reads it from stdin.")
@click.option("--ids", help="Its tokens instead, as 1,15,7: for a checkpoint without tokenizer.json.")
@click.option(
    "--image", "images", type=FOLDER, multiple=True, help="An image that the prompt is about; may be repeated."
)
@click.option("--video", "videos", type=FOLDER, multiple=True, help="A folder of frames, the same; may be repeated.")
@click.option(
    "--chat/--raw",
    "use_chat",
    default=None,
    help="Whether the prompt is what a user says in the checkpoint's chat template; default: if there is one.",
)
@click.option("--max-new-tokens", type=click.IntRange(1), default=MOST_TOKENS, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), help="0 takes the likeliest token.")
@click.option("--top-k", type=click.IntRange(0), help="Only the so many likeliest tokens; 0: all.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Only the likeliest, to this sum.")
@click.option("--seed", type=click.IntRange(0), help="The same seed gives the same text.")
@click.option("--stop", multiple=True, help="A text that ends the answer and is left out of it; may be repeated.")
@click.option("--backend", type=ChoiceOf("llmexport.run.session", "BACKENDS"), default="onnxruntime", show_default=True)
@click.option("--stream/--no-stream", default=None, help="Print tokens as they come; default: on a terminal.")
@talkative
def command(
    folder: Path,
    prompt: str | None,
    ids: str | None,
    images: tuple[Path, ...],
    videos: tuple[Path, ...],
    use_chat: bool | None,
    max_new_tokens: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    stop: tuple[str, ...],
    backend: str,
    stream: bool | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Continue a prompt by an export.

    What no option says, generation_config.json of the checkpoint does: whether tokens are drawn, and how.
    """
    from llmexport.run.generate import generate

    console = Console(quiet, as_json)
    if (prompt is None) == (ids is None):
        raise RunError("say what to continue: --prompt TEXT, or --ids for its tokens, one of them")
    live = sys.stdout.isatty() if stream is None else stream
    try:
        answer = generate(
            folder,
            _ids(ids) if prompt is None else sys.stdin.read() if prompt == "-" else prompt,
            use_chat=use_chat,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            images=images,
            videos=videos,
            backend=backend,
            show=console.write if live else str,
            progress=console.progress,
        )
    finally:
        if live:
            # Also where it is interrupted: what was printed stays, and the next line is a line of its own.
            console.write("\n")
    if not live:
        console.write((" ".join(map(str, answer.ids)) if answer.text is None else answer.text) + "\n")
    console.notes(answer.notes)
    console.result(dataclasses.asdict(answer))


def _ids(text: str | None) -> list[int]:
    try:
        return [int(part) for part in (text or "").replace(",", " ").split()]
    except ValueError as error:
        raise RunError(f"--ids {text!r}: give numbers with commas between them, as 1,15,7") from error
