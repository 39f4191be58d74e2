"""The options that say what to export, and from where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from llmexport.export.cli.choice import ChoiceOf
from llmexport.export.cli.folder import FOLDER

WEIGHTS = ChoiceOf("llmexport.export.onnx_file", "WEIGHTS")
CACHES = ChoiceOf("llmexport.export.onnx_file", "CACHES")
WINDOW_SLOTS = ChoiceOf("llmexport.export.onnx_file", "WINDOW_SLOTS")
LOGITS = ChoiceOf("llmexport.export.onnx_file", "LOGITS")
PARTS = ChoiceOf("llmexport.export.multimodal", "PARTS")
GROUPS = ChoiceOf("llmexport.export.rounding", "GROUPS")
ROUNDINGS = ChoiceOf("llmexport.export.rounding", "ROUNDINGS")
DTYPES = ChoiceOf("llmexport.export.spec", "DTYPES")
F = TypeVar("F", bound=Callable[..., Any])


def options(command: F) -> F:
    """The options that say what to export, and into what."""
    for option in (
        click.option("--force", is_flag=True, help="Replace an earlier output, if nothing else lies in it."),
        click.option(
            "--weights",
            type=WEIGHTS,
            default="auto",
            help="Hard links to the shards (no new bytes) or copies; auto takes the first of reflinks (no new bytes "
            "either, and files that every tool opens), links and copies that the file system has.",
        ),
        click.option("--dtype", type=DTYPES, default="float32", show_default=True),
        click.option(
            "--checkpoint", type=FOLDER, help="Folder with config.json and safetensors; default: tiny, random."
        ),
        click.option(
            "--part",
            type=PARTS,
            help="Of a multimodal checkpoint: all of it, its text model, or what sees pictures; default: all, and of "
            "the built-in tiny one the text model.",
        ),
        click.option("--arch", help="Architecture, see `llmexport archs`; default: what config.json says."),
    ):
        command = option(command)
    return command


def caching(command: F) -> F:
    """The options that say how keys and values of earlier tokens are kept, and how many rows of logits there are."""
    for option in (
        click.option(
            "--logits",
            type=LOGITS,
            default="all",
            show_default=True,
            help="Of all tokens, or of the last of each row: then a prompt costs one product with the vocabulary, not "
            "one a token. `generate` cuts so by itself.",
        ),
        click.option(
            "--window-slots",
            type=WINDOW_SLOTS,
            default="auto",
            show_default=True,
            help="What a layer with a window keeps of a static cache: its last tokens, which are copied at every "
            "step, or all slots, which are written in place and take the memory; auto: all with --target onnxruntime, "
            "if they are no more than four windows.",
        ),
        click.option(
            "--max-tokens", type=int, help="The slots of a static cache: as many tokens as a row ever has, padding too."
        ),
        click.option(
            "--cache",
            type=CACHES,
            default="dynamic",
            show_default=True,
            help="A dynamic cache grows and is copied at every step; a static one has its size from the start and is "
            "written in place, which serving wants. Of static-fused an op of ours writes keys and values, with what "
            "makes them, for TensorRT with our plugins: two launches a layer less, in no engine on a GPU yet.",
        ),
    ):
        command = option(command)
    return command


def quantizing(command: F) -> F:
    """The options that say which weights are rounded, and how."""
    for option in (
        click.option(
            "--quantize-head",
            is_flag=True,
            help="Round the matrix of the head too: where words are many, it is most of what a token reads.",
        ),
        click.option(
            "--group-size",
            type=GROUPS,
            help="Columns that share a scale of int4; default: the first of these, fewer where they fill no row.",
        ),
        click.option(
            "--quantize",
            type=ROUNDINGS,
            help="Round the matrices of linear layers and experts to nearest, into new files in OUTPUT: int4 in "
            "groups, int8 and fp8 by rows. Embeddings, head, norms, routers and convolutions are not rounded.",
        ),
    ):
        command = option(command)
    return command
