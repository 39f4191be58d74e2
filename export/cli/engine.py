"""llmexport engine"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from llmexport.export.cli.choice import ChoiceOf
from llmexport.export.cli.console import Console, size, talkative
from llmexport.export.cli.folder import FOLDER, verifying

if TYPE_CHECKING:
    from llmexport.export.engine_record import Engine

BACKENDS = ChoiceOf("llmexport.export.engine_backend", "BACKENDS")
WEIGHTS = ChoiceOf("llmexport.export.engine_record", "WEIGHTS")
F = TypeVar("F", bound=Callable[..., Any])


class Seconds(click.FloatRange):
    """A number of seconds, which nan is not: it is outside of no range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seconds = super().convert(value, param, ctx)
        return seconds if seconds == seconds else self.fail("nan is no number of seconds", param, ctx)


def options(command: F) -> F:
    """The options that say how an engine is built."""
    for option in (
        click.option(
            "--plugins/--no-plugins",
            default=True,
            show_default=True,
            help="Our CUDA kernels, if `llmexport plugins build` has made them; else the function bodies of our ops.",
        ),
        click.option(
            "--profile",
            help="Sizes as min:opt:max, as in batch=1:1:4,sequence=1:64:512,past=0:512:2048 (the default).",
        ),
        click.option("--backend", type=BACKENDS, default="tensorrt-rtx", show_default=True),
    ):
        command = option(command)
    return command


@click.command("engine")
@click.argument("folder", type=FOLDER)
@options
@click.option(
    "--weights",
    type=WEIGHTS,
    default="inside",
    show_default=True,
    help="Inside the plan, or beside it: inputs that are bound from the safetensors files when the engine is loaded.",
)
@click.option("--timeout", type=Seconds(min=1), help="Seconds until the builder is given up.")
@verifying
@talkative
def command(
    folder: Path,
    backend: str,
    profile: str | None,
    plugins: bool,
    weights: str,
    timeout: float | None,
    verify: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Build TensorRT engines of an export: a .plan for each graph, and engine.json, in FOLDER."""
    from llmexport.export.engine import build
    from llmexport.export.profile import parse_profile
    from llmexport.plugins import library

    console = Console(quiet, as_json)
    built = build(
        folder,
        backend=backend,
        profile=None if profile is None else parse_profile(profile),
        plugins=library.find() if plugins else None,
        weights=weights,
        timeout=timeout,
        verify=verify,
        progress=console.progress,
    )
    console.table(f"engine in {folder}", (), summary(built))
    console.result(built.as_data())


def summary(engine: Engine) -> list[tuple[str, str]]:
    """Rows of what was built."""
    plans = engine.graphs.values()
    profile = ", ".join(f"{n} {low} to {high}" for n, (low, _, high) in engine.profile.items())
    layers: Counter[str] = sum((Counter(p.plugins) for p in plans), Counter())
    plugins = ", ".join(f"{n} {op}" for op, n in layers.items())
    sizes = [f"{p.file} " * (len(plans) > 1) + size(p.bytes) for p in plans]
    return [
        ("engine", f"{engine.backend} {engine.version}, {', '.join(sizes)}"),
        ("takes", profile),
        ("plugin layers", plugins or "none: our ops are built from their bodies, see `llmexport plugins build`"),
        *_kernels(engine),
        *_weights(engine),
        ("runs on", "; ".join(filter(None, (engine.target, _remark(engine))))),
        ("weights read", engine.checked),
        ("built in", f"{sum(p.seconds for p in plans):.1f} s"),
    ]


def _remark(engine: Engine) -> str:
    """Whether it is not for the GPU that is here."""
    from llmexport.export import device
    from llmexport.export.engine_backend import BACKENDS

    here = device.first()
    return BACKENDS[engine.backend].remark(here) if isinstance(here, device.Device) else ""


def _kernels(engine: Engine) -> list[tuple[str, str]]:
    """What each graph launches, where TensorRT listed it."""
    from llmexport.export.engine_kernels import by_kind

    said = []
    for name, plan in engine.graphs.items():
        if plan.kernels is not None:
            kinds = by_kind(plan.kernels)
            each = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
            said.append(f"{name}: " * (len(engine.graphs) > 1) + f"{kinds.total()} a step: {each}")
    return [("kernels", "; ".join(said))] if said else []


def _weights(engine: Engine) -> list[tuple[str, str]]:
    bindings = [b for p in engine.graphs.values() for b in p.bindings.values()]
    stored = sum(b.as_stored for b in bindings)
    said = f"beside the plan: {len(bindings)} inputs, {stored} of them bound as they are stored"
    said = said if bindings else "in the plan, as none is large enough to lie beside it"
    return [("weights", said)] if engine.weights_at == "beside" else []
