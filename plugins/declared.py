"""What the ops say of themselves, read from their source: a list of them does not wait for torch."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Declared:
    """An op's name and version, the dimensions of its inputs and outputs, the type's name of each attribute, the inputs
    whose memory outputs may have, by output, and those that may be columns of one tensor."""

    name: str
    version: int
    inputs: dict[str, tuple[str, ...]]
    outputs: dict[str, tuple[str, ...]]
    attributes: dict[str, str]
    aliases: dict[str, str]
    joins: tuple[str, ...]


@functools.cache
def declared() -> tuple[Declared, ...]:
    """Every op there is, in the order of their folders."""
    folders = sorted(Path(__file__).parent.glob("*/__init__.py"))
    return tuple(op for path in folders for op in _in(ast.parse(path.read_text("utf-8"))))


def _in(module: ast.Module) -> Iterator[Declared]:
    for made in module.body:
        if isinstance(made, ast.FunctionDef):
            for call in made.decorator_list:
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "op":
                    yield _of(call, made)


def _of(call: ast.Call, reference: ast.FunctionDef) -> Declared:
    said = {k.arg: k.value for k in call.keywords}
    name, version, dims, outputs = map(ast.literal_eval, (call.args[0], said["version"], said["dims"], said["outputs"]))
    kinds = {a.arg: ast.unparse(a.annotation) for a in reference.args.args if a.annotation}
    tensors = [n for n, kind in kinds.items() if kind in ("Tensor", "Tensor | None")]
    return Declared(
        name,
        version,
        {n: tuple(dims[n].split()) for n in tensors},
        {n: tuple(d.split()) for n, d in outputs.items()},
        {n: kind for n, kind in kinds.items() if n not in tensors},
        ast.literal_eval(said["aliases"]) if "aliases" in said else {},
        ast.literal_eval(said["joins"]) if "joins" in said else (),
    )
