"""Plays TensorRT's part towards the plugin library: each op's kernels, through the plugin, where no TensorRT is.

ctypes over trt/host.cpp, which is part of the library; neither torch nor TensorRT is imported.
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmexport.plugins.dtypes import BY_NAME, TENSORRT_NUMBERS
from llmexport.plugins.errors import PluginError
from llmexport.plugins.spec import Attribute

FIELD_FLOAT32, FIELD_INT32, FIELD_CHAR, FIELD_INT64 = 1, 5, 6, 10
BUILD, RUNTIME = 0, 1


class Dims(c.Structure):
    _fields_ = [("rank", c.c_int32), ("sizes", c.c_int64 * 8)]


class Desc(c.Structure):
    """What TensorRT says of a tensor; `type` is the number of its type."""

    _fields_ = [("dims", Dims), ("type", c.c_int32), ("format", c.c_int32), ("scale", c.c_float)]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.dims.sizes[: self.dims.rank])


class Field(c.Structure):
    _fields_ = [("name", c.c_char_p), ("data", c.c_void_p), ("type", c.c_int32), ("length", c.c_int32)]


class Fields(c.Structure):
    _fields_ = [("count", c.c_int32), ("fields", c.POINTER(Field))]


class Refused(PluginError):
    """The plugin does not take a node, or its launch failed."""


def number(dtype: object) -> int:
    """TensorRT's number of a type, which numpy, torch or a name gives. Bytes go to plugins as int8."""
    name = str(dtype).removeprefix("torch.")
    return TENSORRT_NUMBERS[BY_NAME["int8" if name == "uint8" else name].tensorrt]


def dtype_name(type_number: int) -> str:
    """The type that TensorRT has this number for."""
    return next(d.name for d in BY_NAME.values() if TENSORRT_NUMBERS.get(d.tensorrt) == type_number)


def desc(shape: Sequence[int], dtype: object, layout: int = 0) -> Desc:
    return _desc(shape, number(dtype), layout)


def _desc(shape: Sequence[int], type_number: int, layout: int = 0) -> Desc:
    return Desc(Dims(len(shape), (c.c_int64 * 8)(*shape)), type_number, layout, 1.0)


def field(name: str, value: Attribute | list[int]) -> Field:
    """A plugin field as TensorRT's ONNX parser makes it of an attribute."""
    if isinstance(value, str):
        text = value.encode()
        return Field(name.encode(), c.cast(c.c_char_p(text), c.c_void_p), FIELD_CHAR, len(text) + 1)
    if isinstance(value, list):
        numbers = (c.c_int32 * len(value))(*value)
        made = Field(name.encode(), c.addressof(numbers), FIELD_INT32, len(value))
        made.keep = numbers
        return made
    real = isinstance(value, float)
    held = c.c_float(value) if real else c.c_int32(int(value))
    made = Field(name.encode(), c.addressof(held), FIELD_FLOAT32 if real else FIELD_INT32, 1)
    made.keep = held
    return made


class Library:
    """A plugin library as TensorRT sees it: creators by the name of their op.

    The file is loaded as it is: who did not just build it asks library.served() first.
    """

    def __init__(self, path: Path) -> None:
        self._functions = c.CDLL(str(path))
        self._functions.getCreators.restype = c.POINTER(c.c_void_p)
        self._functions.setLoggerFinder(None)
        count = c.c_int32()
        found = self._functions.getCreators(c.byref(count))
        of_v3 = [c.c_void_p(self.call("Creator", c.c_void_p(found[i]), returns=c.c_void_p)) for i in range(count.value)]
        self.creators = {self.call("Name", creator, returns=c.c_char_p).decode(): creator for creator in of_v3}

    def call(self, function: str, *arguments: Any, returns: Any = c.c_int32) -> Any:
        """A function of trt/host.cpp."""
        called = self._functions[f"llmexportHost{function}"]
        called.restype = returns
        return called(*arguments)

    def refusal(self, op: str) -> Refused:
        """The error that says why a plugin just refused."""
        reason = self.call("Refusal", returns=c.c_char_p).decode()
        return Refused(reason if reason.startswith(op) else f"{op}: {reason}")

    def field_names(self, op: str) -> dict[str, int]:
        """The attributes that an op declares, and their field types."""
        fields = self.call("FieldNames", self.creators[op], returns=c.POINTER(Fields)).contents
        return {fields.fields[i].name.decode(): fields.fields[i].type for i in range(fields.count)}

    def create(self, op: str, attributes: Mapping[str, Attribute | list[int]], phase: int = BUILD) -> Plugin:
        return self.create_from(op, [field(name, value) for name, value in attributes.items()], phase)

    def create_from(self, op: str, fields: Sequence[Field], phase: int = BUILD) -> Plugin:
        listed = (Field * len(fields))(*fields)
        if op not in self.creators:
            raise Refused(f"{op} has no plugin in this library, which serves {', '.join(sorted(self.creators))}")
        made = self.call("Create", self.creators[op], listed, len(fields), phase, returns=c.c_void_p)
        return Plugin(self, op, made)


class Plugin:
    """One plugin object; destroyed with its wrapper. Raises Refused if there is none."""

    def __init__(self, library: Library, op: str, handle: int | None) -> None:
        self.handle = None
        if not handle:
            raise library.refusal(op)
        self.library, self.op, self.handle = library, op, c.c_void_p(handle)

    def __del__(self) -> None:
        if self.handle:
            self.call("Destroy", returns=None)

    def call(self, function: str, *arguments: Any, returns: Any = c.c_int32) -> Any:
        return self.library.call(function, self.handle, *arguments, returns=returns)

    def _ask(self, function: str, *arguments: Any) -> None:
        """Raises Refused if the plugin returns an error."""
        if self.call(function, *arguments):
            raise self.library.refusal(self.op)

    @property
    def outputs(self) -> int:
        return int(self.call("Outputs"))

    def aliased(self, output: int) -> int:
        """The place of the input whose memory an output may have; -1 for none."""
        return int(self.call("Aliased", output))

    def clone(self) -> Plugin:
        return Plugin(self.library, self.op, self.call("Clone", returns=c.c_void_p))

    def attach(self) -> Plugin:
        return Plugin(self.library, self.op, self.call("Attach", returns=c.c_void_p))

    def recreate(self) -> Plugin:
        """The plugin that an engine has which was written and read."""
        creator = self.library.creators[self.op]
        return Plugin(self.library, self.op, self.library.call("Recreate", creator, self.handle, returns=c.c_void_p))

    def attributes(self) -> dict[str, bytes]:
        """What it serialises: the bytes of each attribute."""
        fields = self.call("Fields", returns=c.POINTER(Fields)).contents
        sizes = {FIELD_CHAR: 1, FIELD_FLOAT32: 4, FIELD_INT32: 4}
        listed = (fields.fields[i] for i in range(fields.count))
        return {f.name.decode(): c.string_at(f.data, f.length * sizes[f.type]) for f in listed}

    def output_types(self, types: Sequence[int]) -> list[int]:
        out = (c.c_int32 * self.outputs)()
        self._ask("Types", (c.c_int32 * len(types))(*types), len(types), out, len(out))
        return list(out)

    def output_shapes(self, inputs: Sequence[Desc], known: bool) -> list[tuple[int, ...]]:
        out = (Dims * self.outputs)()
        self._ask("Shapes", _array(inputs), len(inputs), c.c_bool(known), out, len(out))
        return [tuple(dims.sizes[: dims.rank]) for dims in out]

    def output_descs(self, inputs: Sequence[Desc]) -> list[Desc]:
        shapes, types = self.output_shapes(inputs, known=True), self.output_types([d.type for d in inputs])
        return [_desc(shape, kind) for shape, kind in zip(shapes, types, strict=True)]

    def supports(self, position: int, io: Sequence[Desc]) -> bool:
        return bool(self.call("Supports", position, _array(io), *self._counts(io), returns=c.c_bool))

    def configure(self, io: Sequence[Desc], most: Sequence[Desc] | None = None) -> None:
        """For a profile whose largest dimensions are those of `most`."""
        self._ask("Configure", _array(io), _array(most or io), *self._counts(io))

    def shape_change(self, io: Sequence[Desc]) -> None:
        self._ask("ShapeChange", _array(io), *self._counts(io))

    def workspace(self, io: Sequence[Desc], most: Sequence[Desc]) -> int:
        """Its bytes in a profile whose largest dimensions are those of `most`."""
        return int(self.call("Workspace", _array(io), _array(most), *self._counts(io), returns=c.c_size_t))

    def prepare(self, inputs: Sequence[Desc]) -> tuple[list[Desc], int]:
        """Asks and tells it all that TensorRT does before a launch on these inputs.

        Returns what its outputs are and the bytes of its workspace. Raises Refused with the plugin's reason.
        """
        outputs = self.output_descs(inputs)
        io = [*inputs, *outputs]
        if not all(self.supports(i, io) for i in range(len(io))):
            raise Refused(f"{self.op} does not take tensors of these types: {[d.type for d in io]} to TensorRT")
        self.configure(io)
        self.shape_change(io)
        return outputs, self.workspace(io, io)

    def enqueue(
        self, io: Sequence[Desc], inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int | None
    ) -> None:
        """Launches it on these addresses. Raises Refused with the CUDA error of the launch."""
        addresses = ((c.c_void_p * len(places))(*places) for places in (inputs, outputs))
        scratch, queue = c.c_void_p(workspace), c.c_void_p(stream)
        self._ask("Enqueue", _array(io), len(inputs), *addresses, scratch, queue)

    def _counts(self, io: Sequence[Desc]) -> tuple[int, int]:
        return len(io) - self.outputs, self.outputs


def _array(descs: Sequence[Desc]) -> Any:
    return (Desc * len(descs))(*descs)
