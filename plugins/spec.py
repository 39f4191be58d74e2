"""An op: one torch reference, from which everything else about the op is derived.

The torch op, its fake, the ONNX schema, the exporter's translation and the ONNX function body all come from the
decorated function. This module itself imports neither torch nor onnx, so that a graph can be named and read
without them.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from llmexport.plugins.dtypes import BY_NAME, FLOATS

if TYPE_CHECKING:
    import onnx

DOMAIN = "llmexport"
VERSION = 2  # of the domain, as graphs import it: that of its latest op
# The types that a tensor of an op may have, by the name that @op gives them. W: a weight as it is stored; S: its
# scales.
TYPES = {"T": FLOATS, "W": (*FLOATS, "uint8"), "S": ("float32", "uint8")}
TYPES |= {name: (name,) for name in ("float32", "int32", "uint8")}
SIGNS = {"-": "m", ".": "p"}  # letters for signs in the name of a body: 1e-06 is 1em06
SEPARATOR = "__"  # between the parts of a body's name; no op's name holds it
Attribute = bool | int | float | str
# (attributes, type of each input that is there, sizes of the static dimensions) -> the statements of the body in
# ONNX's textual form, which name the op's inputs and outputs; None where the traced reference is the body.
Body = Callable[[dict[str, Attribute], dict[str, str], dict[str, int]], str | None]


@dataclass(frozen=True)
class Op:
    """An op in domain and plugin namespace `llmexport`; `name` is its ONNX op type and plugin name, and `version` that
    of the domain from which on it means what it does.

    `inputs` and `outputs` map each tensor to its dimensions by name; a function body is made for given sizes of the
    `static` ones and works on any size of the others. The last inputs may be `optional`: a node leaves out any number
    of them from the end. `types` names the type of each input and output in TYPES. `attributes` maps each scalar to its
    Python type, `choices` each string among them to the values it may have, `sizes` each one that is the size of a
    dimension to that dimension. `aliases` maps each output that may have an input's memory to that input: the op is
    functional, and a plugin that is given one memory for both writes what changes alone. `joins` are the inputs that
    plugins read as columns of one tensor too. `body` writes the function body where the reference is not what is
    exported, `bodies` that for one target alone, by its name. An op is called like the function it came from.
    """

    name: str
    version: int
    reference: Callable[..., Any]
    inputs: dict[str, tuple[str, ...]]
    outputs: dict[str, tuple[str, ...]]
    static: tuple[str, ...]
    types: dict[str, str]
    optional: tuple[str, ...]
    attributes: dict[str, type]
    choices: dict[str, tuple[str, ...]]
    sizes: dict[str, str]
    aliases: dict[str, str]
    joins: tuple[str, ...]
    body: Body | None
    bodies: Mapping[str, Body]
    call: Callable[..., Any] = field(repr=False)

    @property
    def torch_name(self) -> str:
        return self.reference.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    @functools.cached_property
    def schema(self) -> onnx.defs.OpSchema:
        """The operator schema for onnx's checker and shape inference."""
        from onnx import TensorProto
        from onnx.defs import OpSchema

        def tensors(names: Iterable[str]) -> list[str]:
            return [f"tensor({TensorProto.DataType.Name(BY_NAME[n].onnx).lower()})" for n in names]

        kinds = {bool: OpSchema.AttrType.INT, int: OpSchema.AttrType.INT}
        kinds |= {float: OpSchema.AttrType.FLOAT, str: OpSchema.AttrType.STRING}
        option = OpSchema.FormalParameterOption
        notes = {"T": "any float; computed in fp32", "W": "a weight as it is stored", "S": "scales of a weight"}
        return OpSchema(
            self.name,
            DOMAIN,
            self.version,
            inspect.getdoc(self.reference) or "",
            inputs=[
                OpSchema.FormalParameter(
                    n, self.types[n], param_option=option.Optional if n in self.optional else option.Single
                )
                for n in self.inputs
            ],
            outputs=[OpSchema.FormalParameter(n, self.types[n]) for n in self.outputs],
            type_constraints=[(t, tensors(TYPES[t]), notes.get(t, t)) for t in dict.fromkeys(self.types.values())],
            attributes=[OpSchema.Attribute(n, kinds[t], required=True) for n, t in self.attributes.items()],
        )

    def body_name(self, attributes: dict[str, Attribute], types: Sequence[str], sizes: dict[str, int]) -> str:
        """The name of the function body for these attribute values, input types and static sizes.

        It begins with the op's own name, see `op_name`.
        """
        by_kind = [(self.types[n], t) for n, t in zip(self.inputs, types, strict=False)]
        dtype = next(t for kind, t in by_kind if kind == "T")
        stored = [t for kind, t in by_kind if kind == "W"]
        names = [self.name, dtype, *(stored if set(stored) - {dtype} else ())]
        if without := len(self.inputs) - len(types):
            names.append(f"without_{without}")
        values = {**attributes, **sizes}
        names += (f"{n}_{int(v) if isinstance(v, bool) else v}" for n, v in sorted(values.items()))
        return re.sub(r"[^0-9A-Za-z_]", lambda sign: SIGNS.get(sign[0], f"x{ord(sign[0]):x}"), SEPARATOR.join(names))


def op_name(function: str) -> str:
    """The name of the op that a function body of this name belongs to; an op's own name stays as it is."""
    return function.partition(SEPARATOR)[0]


OPS: dict[str, Op] = {}


def op(
    name: str,
    version: int,
    dims: dict[str, str],
    outputs: dict[str, str],
    static: tuple[str, ...] = (),
    types: dict[str, str] | None = None,
    choices: dict[str, tuple[str, ...]] | None = None,
    aliases: dict[str, str] | None = None,
    joins: tuple[str, ...] = (),
    body: Body | None = None,
    bodies: Mapping[str, Body] | None = None,
    fake: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Op]:
    """Makes an op of its torch reference.

    `dims` names the dimensions of every tensor parameter, as in {"x": "B H T D"}, and of every int parameter that is
    the size of one; `outputs` those of every output, of which each is an input's or such a parameter's; `types` the
    types in TYPES of those inputs and outputs that are not T. Parameters of type bool, int, float and str become
    attributes, and `choices` lists the values of those of type str; those of type Tensor | None must be the last
    tensors. `aliases` are the outputs that may have an input's memory, each with that input; `joins` the inputs of
    rows [B, T, ...] that plugins read as columns of one tensor too. `fake` gives outputs of the right shapes and types
    where the reference cannot on tensors without values. `body` writes the ONNX function body in place of the traced
    reference, and `bodies` by target those that stand there in its place. Raises TypeError on a signature that cannot
    become an ONNX operator.
    """

    def decorate(reference: Callable[..., Any]) -> Op:
        import torch

        if SEPARATOR in name:
            raise TypeError(f"{name}: an op's name ends where its bodies' names go on, at {SEPARATOR}")
        if name in OPS or reference.__name__ in (o.torch_name for o in OPS.values()):
            raise TypeError(f"{name} is defined twice, or {reference.__name__} is: was its module imported twice?")
        hints = _check_signature(name, reference, dims, outputs)
        optional = tuple(n for n, t in hints.items() if t == torch.Tensor | None)
        attributes = {n: t for n, t in hints.items() if t is not torch.Tensor and n not in optional}
        inputs = {n: tuple(dims[n].split()) for n in hints if n not in attributes}
        results = {n: tuple(d.split()) for n, d in outputs.items()}
        sizes = {n: dims[n] for n, t in attributes.items() if t is int and n in dims}
        kinds = dict.fromkeys((*inputs, *results), "T") | (types or {})
        made = Op(
            *(name, version, reference, inputs, results, static, kinds, optional, attributes, choices or {}, sizes),
            *(aliases or {}, joins, body, bodies or {}, reference),
        )
        _check_names(made, dims)
        call = torch.library.custom_op(f"{DOMAIN}::{reference.__name__}", reference, mutates_args=())
        call.register_fake(fake or reference)
        OPS[name] = replace(made, call=call)
        return OPS[name]

    return decorate


def _check_signature(
    name: str, reference: Callable[..., Any], dims: dict[str, str], outputs: dict[str, str]
) -> dict[str, Any]:
    """The type of every parameter. Raises TypeError if no operator can have one of them, or these outputs."""
    from torch import Tensor

    hints = get_type_hints(reference)
    returns = hints.pop("return", None)
    left_out = False
    for parameter in inspect.signature(reference).parameters.values():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        hint = hints.get(parameter.name)
        if variadic or hint not in (Tensor, Tensor | None, bool, int, float, str):
            raise TypeError(f"{name}: parameter {parameter} is neither a Tensor nor a bool, int, float or str")
        if hint in (Tensor, Tensor | None) and parameter.name not in dims:
            raise TypeError(f"{name}: dims does not name the dimensions of {parameter.name}")
        if hint is Tensor and left_out:
            raise TypeError(f"{name}: {parameter.name} follows an optional tensor, which must be among the last")
        left_out = left_out or hint == Tensor | None
    returned = (Tensor,) if returns is Tensor else get_args(returns)
    if returned != (Tensor,) * len(outputs):
        raise TypeError(f"{name}: the return type {returns} does not fit the outputs {', '.join(outputs)}")
    return hints


def _check_names(made: Op, dims: dict[str, str]) -> None:
    """Raises TypeError if @op names a tensor, type, dimension or string that the op does not have."""

    def check(stray: Collection[str], fault: str) -> None:
        if stray:
            raise TypeError(f"{made.name}: {fault}: {', '.join(sorted(stray))}")

    tensors = made.inputs.keys() | made.outputs.keys()
    known = {d for shape in made.inputs.values() for d in shape}
    given = {d for shape in made.outputs.values() for d in shape}
    check(made.types.keys() - tensors, "types names no tensor")
    check(set(made.types.values()) - TYPES.keys(), "types names no type")
    check(dims.keys() - made.inputs.keys() - made.sizes.keys(), "dims names neither a tensor nor an int")
    check(given - known - set(made.sizes.values()), "no input and no int has this dimension of an output")
    check(set(made.static) - known, "no input has this static dimension")
    texts = {n for n, t in made.attributes.items() if t is str}
    check(made.choices.keys() ^ texts, "choices are those of each str, and of nothing else")
    alike = {
        output
        for output, past in made.aliases.items()
        if made.outputs.get(output) == made.inputs.get(past, ()) and made.types[output] == made.types[past]
    }
    check(made.aliases.keys() - alike, "aliases names no output, or no input of its type and dimensions")
    rows = {n for n, shape in made.inputs.items() if shape[:2] == ("B", "T") and made.types[n] == "T"}
    check({*made.joins} - rows, "joins names no input of type T with B and T before all else")
    check({*made.aliases.values()} & {*made.optional}, "an input that may be left out is no output's memory")


def all_ops() -> dict[str, Op]:
    """Every op there is, by ONNX name. Imports their references, and torch with them."""
    for folder in sorted(Path(__file__).parent.glob("*/__init__.py")):
        importlib.import_module(f"{__package__}.{folder.parent.name}")
    return OPS
