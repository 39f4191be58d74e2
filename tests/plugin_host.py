"""Plays TensorRT towards a plugin library: ctypes over plugins/host.cpp."""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from native import compiled
from plugin_memory import Memory, Output

DTYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
# Bytes go to plugins as int8.
TRT_TYPES = {DTYPES["fp32"]: 0, DTYPES["fp16"]: 1, np.dtype(np.int32): 3, np.dtype(np.uint8): 2, DTYPES["bf16"]: 7}
FIELD_FLOAT32, FIELD_INT32, FIELD_CHAR, FIELD_INT64 = 1, 5, 6, 10
BUILD, RUNTIME = 0, 1


class Dims(c.Structure):
    _fields_ = [("rank", c.c_int32), ("sizes", c.c_int64 * 8)]


class Desc(c.Structure):
    _fields_ = [("dims", Dims), ("type", c.c_int32), ("format", c.c_int32), ("scale", c.c_float)]


class Field(c.Structure):
    _fields_ = [("name", c.c_char_p), ("data", c.c_void_p), ("type", c.c_int32), ("length", c.c_int32)]


class Fields(c.Structure):
    _fields_ = [("count", c.c_int32), ("fields", c.POINTER(Field))]


class Refused(Exception):
    """The plugin returned an error; its reason is on stderr."""


def desc(shape: Sequence[int], dtype: np.dtype[Any], layout: int = 0) -> Desc:
    dims = Dims(len(shape), (c.c_int64 * 8)(*shape))
    return Desc(dims, TRT_TYPES[dtype], layout, 1.0)


def field(name: str, value: bool | int | float | str) -> Field:
    """A plugin field as TensorRT's ONNX parser makes it of an attribute."""
    if isinstance(value, str):
        text = value.encode()
        return Field(name.encode(), c.cast(c.c_char_p(text), c.c_void_p), FIELD_CHAR, len(text) + 1)
    number = c.c_float(value) if isinstance(value, float) else c.c_int32(value)
    made = Field(name.encode(), c.addressof(number), FIELD_FLOAT32 if isinstance(value, float) else FIELD_INT32, 1)
    made.keep = number
    return made


class Library:
    """A plugin library as TensorRT sees it: creators by name."""

    def __init__(self, path: Path) -> None:
        host = c.CDLL(str(compiled("host", sanitize=False)))
        for name in ("open", "creator", "create", "clone", "attach", "recreate"):
            getattr(host, f"host_{name}").restype = c.c_void_p
        for name in ("name", "version", "namespace", "plugin_name"):
            getattr(host, f"host_{name}").restype = c.c_char_p
        host.host_fields.restype = host.host_field_names.restype = c.POINTER(Fields)
        host.host_supports.restype = c.c_bool
        host.host_workspace.restype = c.c_size_t
        self.host = host
        count, error = c.c_int32(), c.create_string_buffer(512)
        creators = host.host_open(str(path).encode(), c.byref(count), error, len(error))
        if not creators:
            raise OSError(error.value.decode())
        found = c.cast(creators, c.POINTER(c.c_void_p))
        of_v3 = [c.c_void_p(host.host_creator(c.c_void_p(found[i]))) for i in range(count.value)]
        self.creators = {host.host_name(creator).decode(): creator for creator in of_v3}

    def field_names(self, op: str) -> dict[str, int]:
        """The attributes that an op declares, and their field types."""
        fields = self.host.host_field_names(self.creators[op]).contents
        return {fields.fields[i].name.decode(): fields.fields[i].type for i in range(fields.count)}

    def create(self, op: str, attributes: Mapping[str, bool | int | float | str], phase: int = BUILD) -> Plugin:
        return self.create_from(op, [field(name, value) for name, value in attributes.items()], phase)

    def create_from(self, op: str, fields: Sequence[Field], phase: int = BUILD) -> Plugin:
        made = self.host.host_create(self.creators[op], (Field * len(fields))(*fields), len(fields), phase)
        return Plugin(self, op, made)


class Plugin:
    """One plugin object; destroyed with its wrapper."""

    def __init__(self, library: Library, op: str, handle: int | None) -> None:
        self.handle = None
        if not handle:
            raise Refused(op)
        self.library, self.op, self.handle = library, op, c.c_void_p(handle)

    def __del__(self) -> None:
        if self.handle:
            self.library.host.host_destroy(self.handle)

    def call(self, function: str, *arguments: Any) -> Any:
        return getattr(self.library.host, f"host_{function}")(self.handle, *arguments)

    def clone(self) -> Plugin:
        return Plugin(self.library, self.op, self.call("clone"))

    def attach(self) -> Plugin:
        return Plugin(self.library, self.op, self.call("attach"))

    def recreate(self) -> Plugin:
        host = self.library.host
        return Plugin(self.library, self.op, host.host_recreate(self.library.creators[self.op], self.handle))

    def attributes(self) -> dict[str, bytes]:
        """What it serialises: the bytes of each attribute."""
        fields = self.call("fields").contents
        sizes = {FIELD_CHAR: 1, FIELD_FLOAT32: 4, FIELD_INT32: 4}
        listed = (fields.fields[i] for i in range(fields.count))
        return {f.name.decode(): c.string_at(f.data, f.length * sizes[f.type]) for f in listed}

    def output_types(self, types: Sequence[int]) -> list[int]:
        out = (c.c_int32 * self.call("outputs"))()
        if self.call("types", (c.c_int32 * len(types))(*types), len(types), out, len(out)):
            raise Refused(self.op)
        return list(out)

    def output_shapes(self, inputs: Sequence[Desc], known: bool) -> list[tuple[int, ...]]:
        out = (Dims * self.call("outputs"))()
        descs = (Desc * len(inputs))(*inputs)
        if self.call("shapes", descs, len(inputs), c.c_bool(known), out, len(out)):
            raise Refused(self.op)
        return [tuple(dims.sizes[: dims.rank]) for dims in out]

    def supports(self, position: int, io: Sequence[Desc]) -> bool:
        outputs = self.call("outputs")
        return self.call("supports", position, (Desc * len(io))(*io), len(io) - outputs, outputs)

    def configure(self, io: Sequence[Desc], most: Sequence[Desc] | None = None) -> None:
        """For a profile whose largest dimensions are those of `most`."""
        outputs = self.call("outputs")
        descs = ((Desc * len(io))(*these) for these in (io, most or io))
        if self.call("configure", *descs, len(io) - outputs, outputs):
            raise Refused(self.op)

    def shape_change(self, io: Sequence[Desc]) -> None:
        outputs = self.call("outputs")
        if self.call("shape_change", (Desc * len(io))(*io), len(io) - outputs, outputs):
            raise Refused(self.op)

    def workspace(self, io: Sequence[Desc], most: Sequence[Desc]) -> int:
        """Its bytes in a profile whose largest dimensions are those of `most`."""
        outputs = self.call("outputs")
        descs = ((Desc * len(io))(*these) for these in (io, most))
        return self.call("workspace", *descs, len(io) - outputs, outputs)

    def prepare(
        self, memory: Memory, inputs: Sequence[np.ndarray], shift: int = 0, most: Sequence[Desc] | None = None
    ) -> Run:
        """Sets these shapes and lays out every tensor `shift` elements past an aligned address; the workspace, full of
        NaN, is that of a profile whose largest dimensions are those of `most`.
        """
        descs = [desc(x.shape, x.dtype) for x in inputs]
        shapes = self.output_shapes(descs, known=True)
        types = self.output_types([d.type for d in descs])
        dtypes = [next(t for t, number in TRT_TYPES.items() if number == kind) for kind in types]
        io = [*descs, *(desc(s, t) for s, t in zip(shapes, dtypes, strict=True))]
        self.shape_change(io)
        addresses = []
        for x in inputs:
            padding = np.zeros(shift * x.itemsize, np.uint8)
            content = np.concatenate([padding, np.ascontiguousarray(x).reshape(-1).view(np.uint8)])
            addresses.append(memory.place(content) + shift * x.itemsize)
        outputs = [Output.make(memory, s, t, shift) for s, t in zip(shapes, dtypes, strict=True)]
        workspace = Output.make(memory, (self.workspace(io, most or io),), np.dtype(np.uint8), 0)
        return Run(self, io, addresses, outputs, workspace)

    def run(self, memory: Memory, inputs: Sequence[np.ndarray], shift: int = 0) -> list[np.ndarray]:
        run = self.prepare(memory, inputs, shift)
        run.enqueue(memory.stream)
        return run.results()


@dataclass(frozen=True)
class Run:
    """One prepared enqueue."""

    plugin: Plugin
    io: list[Desc]
    inputs: list[int]
    outputs: list[Output]
    workspace: Output

    def enqueue(self, stream: int | None) -> None:
        code = self.plugin.call(
            "enqueue",
            (Desc * len(self.io))(*self.io),
            len(self.inputs),
            (c.c_void_p * len(self.inputs))(*self.inputs),
            (c.c_void_p * len(self.outputs))(*(o.address for o in self.outputs)),
            c.c_void_p(self.workspace.address),
            c.c_void_p(stream),
        )
        if code:
            raise Refused(f"{self.plugin.op}: CUDA error {code}")

    def results(self) -> list[np.ndarray]:
        """Raises AssertionError if anything was written beside the outputs and the workspace."""
        self.workspace.read()
        return [o.read() for o in self.outputs]


@dataclass(frozen=True)
class Machine:
    """A library, and the memory of what runs it."""

    library: Library
    memory: Callable[[], Memory]
