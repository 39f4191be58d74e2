"""The nodes of a graph that make a matrix of what a checkpoint holds of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto
from onnx.helper import make_node

from llmexport.export.packed import fp4
from llmexport.export.packed.made import FLOAT, Made
from llmexport.export.packed.matrix import EXPONENTS, Matrix, Scales
from llmexport.export.packed.repack import NUMBERS, PLACES, RANKS, ZEROS
from llmexport.export.stored_tensor import StoredTensor
from llmexport.plugins.dtypes import BY_NAME, BY_SAFETENSORS


@dataclass
class Maker(Made):
    """Makes the matrix [rows, columns], in the type `dtype` of ONNX, or its transpose.

    `initializers` point to tensors of the checkpoint, among which are those that were packed anew. `before` are
    nodes to stand before a product, by the name of that one's output.
    """

    matrix: Matrix
    tensors: Mapping[str, StoredTensor]
    dtype: int
    before: dict[str, list[onnx.NodeProto]] = field(default_factory=dict)

    @property
    def reads(self) -> set[str]:
        """The tensors of the checkpoint that the nodes read."""
        return {t.name for t in self.initializers if t.data_location == TensorProto.EXTERNAL}

    def whole(self, value: str) -> None:
        """Adds what makes the value: the matrix."""
        steps = [n for n in (self.matrix.factor, self._places) if n]
        made = f"{value}/columns" if steps else value
        self._columns(made, turned=False)
        if self._places:
            ranks = self._stored(self.matrix.name + RANKS, (self.matrix.shape[1],), "int64")
            made = self.node("Gather", [made, ranks], value if len(steps) == 1 else f"{value}/in_order", axis=1)
        if self.matrix.factor:
            self.node("Mul", [made, self._factor()], value)

    def product(self, value: str, readers: Iterable[onnx.NodeProto]) -> None:
        """Adds what makes the value: the transpose, which these products read as their second factor.

        What concerns columns is done to the first factor, so that runtimes keep the matrix packed.
        """
        self._columns(value, turned=True)
        factor = self._factor() if self.matrix.factor else None
        places = self._stored(self._places, (self.matrix.shape[1],), "int64") if self._places else None
        for reader in readers:
            own = self.before[reader.output[0]] = []
            if factor:
                scaled = f"{reader.output[0]}/scaled"
                own.append(make_node("Mul", [reader.input[0], factor], [scaled], scaled))
                reader.input[0] = scaled
            if places:
                gathered = f"{reader.output[0]}/gathered"
                own.append(make_node("Gather", [reader.input[0], places], [gathered], gathered, axis=-1))
                reader.input[0] = gathered

    @property
    def _places(self) -> str | None:
        """The tensor that says in which order columns lie, if in another."""
        name = self.matrix.name + PLACES
        return name if name in self.tensors else None

    def _factor(self) -> str:
        assert self.matrix.factor
        held = BY_SAFETENSORS[self.tensors[self.matrix.factor].dtype]
        factor = self._stored(self.matrix.factor, (self.matrix.shape[1],), held.name)
        return factor if held.onnx == self.dtype else self.node("Cast", [factor], f"{factor}/cast", to=self.dtype)

    def _columns(self, value: str, *, turned: bool) -> None:
        """The matrix as it lies, its columns in the order of `_places` and without their factor, or its transpose."""
        if self.matrix.number.startswith(("int", "uint")):
            self._integers(value, turned)
            return
        made = f"{value}/rows" if turned else value
        if self.matrix.number == "float4_e2m1fn":
            self._fp4(made)
        else:
            self._fp8(made)
        if turned:
            self.node("Transpose", [made], value, perm=[1, 0])

    def _integers(self, value: str, turned: bool) -> None:
        """In the order in which runtimes keep them packed: columns by groups first, as a product takes them."""
        matrix = self.matrix
        rows, columns = matrix.shape
        by_columns = matrix.name + NUMBERS in self.tensors
        zeros = self.tensors.get(matrix.name + ZEROS)
        number = matrix.number
        if by_columns:
            number = number if zeros else number.removeprefix("u")
            numbers = self._stored(matrix.name + NUMBERS, (columns, rows), number)
        else:
            numbers = self._turned(self._stored(matrix.values, (rows, columns), number))
        inputs = [numbers, self._scales_of_columns()]
        points = (matrix.grid[1], rows) if self._grouped else (rows,)
        if zeros:
            inputs.append(self._stored(zeros.name, points, number))
        elif number.startswith("u"):
            inputs.append(self._middle(number, points))
        said = {"axis": 0, "block_size": matrix.scales.block[1]} if self._grouped else {"axis": 1}
        self.node("DequantizeLinear", inputs, value if turned else f"{value}/columns", **said)
        if not turned:
            self.node("Transpose", [f"{value}/columns"], value, perm=[1, 0])

    @property
    def _grouped(self) -> bool:
        return self.matrix.grid[1] > 1

    def _scales_of_columns(self) -> str:
        """Scales [groups, rows] in the model's type, or [rows] where a row is one group."""
        said, (rows, groups) = self.matrix.scales, self.matrix.grid
        if not self._grouped:
            return self._scales(said, (rows,) if said.block[0] == 1 else (), self.dtype)
        if said.turned:
            return self._scales(said, (groups, rows), self.dtype)
        return self._turned(self._scales(said, (rows, groups), self.dtype))

    def _middle(self, number: str, shape: tuple[int, ...]) -> str:
        """Zero points that are all the middle: made when the graph is loaded, as no file has them."""
        name = f"{self.matrix.name}/middle"
        self.constant(f"{name}/shape", np.array(shape, np.int64))
        middle = onnx.helper.make_tensor("value", TensorProto.UINT8, [1], [self.matrix.offset])
        wide = f"{name}/bytes"
        self.nodes.append(make_node("ConstantOfShape", [f"{name}/shape"], [wide], wide, value=middle))
        to = BY_NAME[number].onnx
        return wide if to == TensorProto.UINT8 else self.node("Cast", [wide], name, to=to)

    def _fp8(self, value: str) -> None:
        """In float32 first: scales of float16 would lose what lies below its range."""
        rows, columns = self.matrix.shape
        said = self.matrix.scales
        numbers = self._stored(self.matrix.values, (rows, columns), self.matrix.number)
        grid = self.matrix.grid
        if said.block == (rows, columns):
            scales, how = self._scales(said, (), FLOAT), {}
        elif grid[1] == 1 and said.block[0] == 1:
            scales, how = self._scales(said, (rows,), FLOAT), {"axis": 0}
        else:
            # Whole blocks alone: TensorRT takes no others.
            size = math.gcd(said.block[1], columns)
            scales, how = self._repeated(self._scales(said, grid, FLOAT), size), {"axis": 1, "block_size": size}
        wide = value if self.dtype == FLOAT else f"{value}/wide"
        self.node("DequantizeLinear", [numbers, scales], wide, **how)
        if wide != value:
            self.node("Cast", [wide], value, to=self.dtype)

    def _repeated(self, grid: str, size: int) -> str:
        """Scales of blocks of rows and columns as those of `size` columns of each row, as ONNX has blocks along one
        axis."""
        (rows, columns), (tall, across), block = self.matrix.shape, self.matrix.grid, self.matrix.scales.block
        name, times = f"{self.matrix.name}/scales", block[1] // size
        every = [tall * block[0], across * times]
        steps = (
            ("Reshape", "split", [tall, 1, across, 1]),
            ("Expand", "repeated", [tall, block[0], across, times]),
            ("Reshape", "joined", every),
        )
        for kind, step, shape in steps:
            self.constant(f"{name}/{step}/shape", np.array(shape, np.int64))
            grid = self.node(kind, [grid, f"{name}/{step}/shape"], f"{name}/{step}")
        if every == [rows, columns // size]:
            return grid
        for step, ends in (("from", [0, 0]), ("to", [rows, columns // size])):
            self.constant(f"{name}/{step}", np.array(ends, np.int64))
        return self.node("Slice", [grid, f"{name}/from", f"{name}/to"], f"{name}/cut")

    def _fp4(self, value: str) -> None:
        """By a function; TensorRT's own type is put in its place (engine_form.py)."""
        rows, columns = self.matrix.shape
        numbers = self._stored(self.matrix.values, (rows, columns // 2), "uint8")
        scales = self._scales(self.matrix.scales, self.matrix.grid, self.dtype)
        self.nodes.append(fp4.node(numbers, scales, value, self.matrix.scales.block[1]))

    def _scales(self, said: Scales, shape: tuple[int, ...], dtype: int) -> str:
        """Scales of this shape and type."""
        scales = self._stored(said.name, shape, said.dtype)
        name = f"{self.matrix.name}/scales"
        if said.dtype in EXPONENTS:
            scales, held = self.powers(scales, name), "float32"
        elif said.second and said.dtype == "float8_e4m3fn":
            scales, held = self.node("DequantizeLinear", [scales, self._second(said, name)], f"{name}/both"), "float32"
        elif said.second:
            scales, held = self.node("Mul", [scales, self._second(said, name)], f"{name}/both"), said.dtype
        else:
            held = said.dtype
        if BY_NAME[held].onnx == dtype:
            return scales
        return self.node("Cast", [scales], f"{name}/cast", to=dtype)

    def _second(self, said: Scales, name: str) -> str:
        """The factor of all scales, a scalar."""
        assert said.second
        second = self._stored(said.second, (), BY_SAFETENSORS[self.tensors[said.second].dtype].name)
        return self.node("Reciprocal", [second], f"{name}/second") if said.divides else second

    def _turned(self, name: str) -> str:
        return self.node("Transpose", [name], f"{name}/turned", perm=[1, 0])

    def _stored(self, name: str, shape: tuple[int, ...], dtype: str) -> str:
        """The tensor of this name, whose bytes are numbers of this shape and type."""
        if dtype == "float8_e8m0fnu":
            dtype = "uint8"
        if name not in [i.name for i in self.initializers]:
            self.initializers.append(external(self.tensors[name], shape, BY_NAME[dtype].onnx))
        return name


def external(stored: StoredTensor, shape: tuple[int, ...], dtype: int) -> TensorProto:
    """The bytes of a stored tensor, where they lie, as numbers of this shape and type of ONNX."""
    tensor = TensorProto(name=stored.name, data_type=dtype, dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", stored.file), ("offset", stored.offset), ("length", stored.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
