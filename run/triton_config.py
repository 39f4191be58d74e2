"""`config.pbtxt`: a model as Triton Inference Server's `ModelConfig` describes it, in protobuf's text format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llmexport.export.spec import BATCH, Port
from llmexport.plugins.dtypes import BY_NAME
from llmexport.run.errors import RunError


@dataclass(frozen=True)
class Word:
    """A name of an enumeration, which has no quotes."""

    name: str


def kept_in_server(inputs: Iterable[Port], outputs: Iterable[Port], carried: Mapping[str, str]) -> bool:
    """Whether all that is carried keeps its shape, so that Triton holds it from step to step (implicit state)."""
    shapes = {p.name: p.shape for p in (*inputs, *outputs)}
    return bool(carried) and all(
        shapes[past] == shapes[present] and all(isinstance(d, int) for d in shapes[past] if d != BATCH)
        for past, present in carried.items()
    )


def model_config(
    name: str,
    backend: str,
    file: str,
    inputs: tuple[Port, ...],
    outputs: tuple[Port, ...],
    carried: Mapping[str, str],
    parameters: Mapping[str, str],
) -> str:
    """The text of the file. The ports have the dtypes of the model.

    Batch is a dimension like others. A sequence whose states Triton holds is a batch of one.
    """
    held = carried if kept_in_server(inputs, outputs, carried) else {}
    config: dict[str, Any] = {"name": name, "backend": backend, "max_batch_size": 0, "default_model_filename": file}
    config["input"] = [_tensor(p, bool(held)) for p in inputs if p.name not in held]
    config["output"] = [_tensor(p, bool(held)) for p in outputs if p.name not in held.values()]
    if held:
        states = [_state(p, held[p.name]) for p in inputs if p.name in held]
        config["sequence_batching"] = {"direct": {}, "state": states}
    if backend == "tensorrt":
        config["instance_group"] = [{"kind": Word("KIND_GPU"), "count": 1, "profile": ["0"]}]
    config["parameters"] = [{"key": key, "value": {"string_value": value}} for key, value in parameters.items()]
    return "".join(f"{line}\n" for line in _fields(config))


def _tensor(port: Port, alone: bool) -> dict[str, Any]:
    dims = [1 if alone and d == BATCH else d if isinstance(d, int) else -1 for d in port.shape]
    return {"name": port.name, "data_type": _type(port), "dims": dims}


def _state(past: Port, present: str) -> dict[str, Any]:
    """A state that is zero at first; one that is written in place is one buffer."""
    tensor = _tensor(past, alone=True)
    kind = {"data_type": tensor["data_type"], "dims": tensor["dims"]}
    same = {"use_same_buffer_for_input_output": True} if past.use == "slots" else {}
    initial = {"name": "zeros", **kind, "zero_data": True}
    return {"input_name": past.name, "output_name": present, **kind, "initial_state": initial, **same}


def _type(port: Port) -> Word:
    name = BY_NAME[port.dtype].triton
    if not name:
        raise RunError(f"{port.name} is {port.dtype}, which Triton has no type for: export in another --dtype")
    return Word(name)


def _fields(message: Mapping[str, Any], indent: str = "") -> Iterable[str]:
    for name, value in message.items():
        values = value if isinstance(value, list) else [value]
        if values and not isinstance(values[0], dict):
            text = ", ".join(map(_scalar, values))
            yield f"{indent}{name}: [ {text} ]" if isinstance(value, list) else f"{indent}{name}: {text}"
            continue
        for each in values:
            yield f"{indent}{name} {{"
            yield from _fields(each, indent + "  ")
            yield f"{indent}}}"


def _scalar(value: Any) -> str:
    # JSON's strings and numbers are protobuf's.
    return value.name if isinstance(value, Word) else json.dumps(value)
