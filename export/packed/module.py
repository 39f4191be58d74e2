"""One module that a checkpoint holds quantised: the matrix that its tensors make, held against what the scheme says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmexport.export.errors import ExportError
from llmexport.export.packed.matrix import Layout, Matrix, Scales, Zeros
from llmexport.export.packed.scheme import Scheme
from llmexport.export.values import show_name
from llmexport.plugins.dtypes import BY_SAFETENSORS
from llmexport.plugins.microscaling import BLOCK
from llmexport.plugins.packed_formats import PACKED

if TYPE_CHECKING:
    from llmexport.export.stored_tensor import StoredTensor

FLOATS = ("float32", "float16", "bfloat16")
NV, MX = PACKED["nvfp4"].group, BLOCK  # columns that share a scale in NVFP4, and in the formats of OCP Microscaling
# Scales of activations, which are not quantised here, and sizes that shapes say too.
ASIDE = (
    *(".input_scale", ".input_global_scale", ".input_scale_ub", ".input_zero_point", ".activation_scale"),
    ".weight_shape",
)
# By method, or by a group's format: the tensor of the numbers, and its types.
HOLDS = {
    "gptq": (".qweight", "int32"),
    "awq": (".qweight", "int32"),
    "pack-quantized": (".weight_packed", "int32"),
    "nvfp4-pack-quantized": (".weight_packed", "uint8"),
    "mxfp4-pack-quantized": (".weight_packed", "uint8"),
    "fp8": (".weight", "float8_e4m3fn"),
    "float-quantized": (".weight", "float8_e4m3fn"),
    "mxfp8-quantized": (".weight", "float8_e4m3fn"),
    "int-quantized": (".weight", "int8"),
    "naive-quantized": (".weight", "float8_e4m3fn", "int8"),
    "modelopt": (".weight", "float8_e4m3fn", "int8", "uint8"),
}
Held = Mapping[str, "StoredTensor"]  # by the ending of its name, what lies beside one another


class Module:
    """The tensors of one module that is quantised."""

    def __init__(self, scheme: Scheme, module: str, held: Held) -> None:
        self.scheme, self.module, self.held = scheme.of(module), module, held
        self.group = scheme.group(module)
        self.kind = self.group.format if self.group else scheme.method
        self.used: set[str] = set()

    def matrix(self) -> Matrix:
        """Raises ExportError if they are not as the scheme says."""
        self.check_said()
        ending, *dtypes = HOLDS[self.kind]
        stored = self.take(ending, *dtypes, rank=2)
        readers = {".qweight": self._transposed, ".weight_packed": self._packed, ".weight": self._typed}
        made: dict[str, Any] = readers[ending](stored)
        return Matrix(f"{self.module}.weight", beside=self.beside(ASIDE), **made)

    def check_said(self) -> None:
        """Raises ExportError if the scheme leaves it in 16 bits."""
        if self.module in self.scheme.kept:
            raise self.wrong(f"{self.scheme.where} says that it is not quantised")
        if self.scheme.groups and not self.group:
            raise self.wrong("no group of config_groups is of it")

    def check_groups(self, ending: str, scales: StoredTensor, size: int) -> None:
        """Raises ExportError if the scheme says that groups are of another size than these."""
        if self.scheme.size not in (None, size):
            raise self.wrong(f"{ending} is {list(scales.shape)}, of groups of {size} for {self.scheme.size}")

    def beside(self, endings: tuple[str, ...]) -> tuple[str, ...]:
        """The names of what has one of these endings. Raises ExportError on more that no matrix is made of."""
        aside = [e for e in endings if e in self.held]
        if left := self.held.keys() - self.used - {*aside}:
            raise self.wrong(f"{', '.join(sorted(left))} should not be there")
        return tuple(self.held[e].name for e in aside)

    def wrong(self, what: str) -> ExportError:
        return ExportError(
            f"{show_name(self.module)} is quantised ({self.scheme.method}) in a way that is not read here: {what}: "
            "are config.json and the weights from the same download?"
        )

    def take(self, ending: str, *dtypes: str, rank: int | None = None) -> StoredTensor:
        """The tensor of this ending, of one of these types."""
        if ending not in self.held:
            raise self.wrong(f"it lacks {ending}")
        self.used.add(ending)
        found = self.held[ending]
        if dtype_of(found) not in dtypes:
            raise self.wrong(f"{ending or 'it'} is {found.dtype}, which {self.kind} has not")
        if 0 in found.shape or (rank is not None and len(found.shape) != rank):
            raise self.wrong(f"{ending or 'it'} is {list(found.shape)}")
        return found

    def number(self, ending: str) -> str | None:
        """The name of a tensor that is one number."""
        if ending not in self.held:
            return None
        found = self.take(ending, "float32")
        if math.prod(found.shape) != 1:
            raise self.wrong(f"{ending} is {list(found.shape)}, expected one number")
        return found.name

    def of_columns(self, ending: str, columns: int, *dtypes: str) -> str | None:
        """The name of a tensor of a number for each column."""
        if ending not in self.held:
            return None
        found = self.take(ending, *dtypes)
        if math.prod(found.shape) != columns:
            raise self.wrong(f"{ending} is {list(found.shape)}, expected {[columns]}")
        return found.name

    def order(self, ending: str, columns: int) -> str | None:
        return self.of_columns(ending, columns, "int32")

    def factor(self, columns: int) -> str | None:
        return self.of_columns(".pre_quant_scale", columns, *FLOATS)

    def scales(self, shape: tuple[int, int], turned: bool = False, ending: str = ".scales") -> Scales:
        """Scales by groups of columns, as their number says: of GPTQ and AWQ, of a packed matrix."""
        found = self.take(ending, *FLOATS)
        rows, columns = shape
        groups = math.prod(found.shape) // rows
        size = (self.group.size if self.group else self.scheme.size) or columns
        expected = [[math.ceil(columns / size), rows][:: 1 if turned else -1]]
        expected += [[rows]] if size == columns else []
        if list(found.shape) not in expected or not groups:
            raise self.wrong(f"{ending} is {list(found.shape)}, groups of {size} make it {expected[0]}")
        if columns % size:
            raise self.wrong(f"groups of {size} do not fill rows of {columns}")
        return Scales(found.name, dtype_of(found), (1, size), turned)

    def _transposed(self, stored: StoredTensor) -> dict[str, object]:
        """GPTQ and AWQ."""
        scheme = self.scheme
        in_word = 32 // scheme.bits
        by_columns = scheme.method == "gptq"
        first, second = stored.shape
        shape = (second, first * in_word) if by_columns else (second * in_word, first)
        layout: Layout = "words" if by_columns else "interleaved"
        scales = self.scales(shape, turned=True)
        number = f"uint{scheme.bits}"
        made = {"shape": shape, "values": stored.name, "number": number, "layout": layout, "scales": scales}
        groups = shape[1] // scales.block[1]
        zeros = self.take(".qzeros", "int32", rank=2) if by_columns or ".qzeros" in self.held else None
        if zeros and zeros.shape != (groups, -(-shape[0] // in_word)):
            raise self.wrong(f".qzeros is {list(zeros.shape)}, expected {[groups, shape[0] // in_word]}")
        if zeros is None and not scheme.symmetric:
            raise self.wrong("it lacks .qzeros")
        made["zeros"] = Zeros(zeros.name, layout, int(by_columns and scheme.older)) if zeros else None
        made["offset"] = 1 << (scheme.bits - 1)
        made["order"] = self.order(".g_idx", shape[1]) if by_columns else None
        return made

    def _packed(self, stored: StoredTensor) -> dict[str, object]:
        """compressed-tensors in 4 bits, and in 8 where they are packed in words."""
        rows, columns = stored.shape
        if dtype_of(stored) == "uint8":
            return {"values": stored.name, **self._fp4(rows, 2 * columns, ".weight_global_scale")}
        group = self.group
        assert group  # whose format is this
        bits = group.bits
        shape = (rows, columns * 32 // bits)
        made: dict[str, object] = {"shape": shape, "values": stored.name, "number": f"uint{bits}", "layout": "rows"}
        scales = self.scales(shape, ending=".weight_scale")
        made |= {"scales": scales, "offset": 1 << (bits - 1)}
        if (".weight_zero_point" in self.held) == group.symmetric:
            raise self.wrong(f"its group says symmetric {group.symmetric}, and of zero points the opposite is there")
        if not group.symmetric:
            zeros = self.take(".weight_zero_point", "int32", rank=2)
            expected = (-(-rows * bits // 32), shape[1] // scales.block[1])
            if zeros.shape != expected:
                raise self.wrong(f".weight_zero_point is {list(zeros.shape)}, expected {list(expected)}")
            made["zeros"] = Zeros(zeros.name, "rows")
        return made | {"order": self.order(".weight_g_idx", shape[1])}

    def _typed(self, stored: StoredTensor) -> dict[str, object]:
        """A type of 8 bits, or bytes of ModelOpt's, with scales beside."""
        rows, columns = stored.shape
        number = dtype_of(stored)
        made: dict[str, object] = {"values": stored.name, "layout": "rows"}
        ending = ".weight_scale_inv" if ".weight_scale_inv" in self.held else ".weight_scale"
        if number == "uint8":
            beside = self.held.get(ending)
            if beside is None or dtype_of(beside) in ("float8_e4m3fn", "uint8"):
                return made | self._fp4(rows, 2 * columns, ".weight_scale_2")
            shape = (2 * rows, columns)
            scales = self.take(ending, *FLOATS, rank=2)
            if scales.shape[0] != shape[0] or columns % scales.shape[1]:
                raise self.wrong(f"{ending} is {list(scales.shape)} of a matrix {list(shape)}")
            size = columns // scales.shape[1]
            self.check_groups(ending, scales, size)
            second = self.number(".weight_scale_2")
            made |= {"number": "int4", "layout": "pairs"}
            made["scales"] = Scales(scales.name, dtype_of(scales), (1, size), second=second)
        else:
            shape = (rows, columns)
            made |= {"number": number, "scales": self._block_scales(shape, ending)}
        return made | {"shape": shape, "factor": self.factor(columns)}

    def _fp4(self, rows: int, columns: int, second: str) -> dict[str, object]:
        """E2M1 with scales of E4M3 and one more, or of exponents (MXFP4)."""
        scales = self.take(".weight_scale", "float8_e4m3fn", "uint8", "float8_e8m0fnu", rank=2)
        exponents, group = dtype_of(scales) != "float8_e4m3fn", self.group
        # ModelOpt's are of 16 columns, or of 32 where FP8 activations meet them, and config.json says neither.
        twice = not group and scales.shape == (rows, columns // MX)
        size = group.size if group and group.size else MX if exponents or twice else NV
        if scales.shape != (rows, columns // size) or columns % size:
            raise self.wrong(f".weight_scale is {list(scales.shape)}, expected {[rows, columns // size]}")
        self.check_groups(".weight_scale", scales, size)
        number = self.number(second)
        if (number is None) != exponents:
            raise self.wrong(f"{second} is {'there' if number else 'missing'}")
        divides = second == ".weight_global_scale"
        made: dict[str, object] = {"shape": (rows, columns), "number": "float4_e2m1fn", "layout": "rows"}
        made["scales"] = Scales(scales.name, dtype_of(scales), (1, size), second=number, divides=divides)
        return made | {"factor": self.factor(columns)}

    def _block_scales(self, shape: tuple[int, int], ending: str) -> Scales:
        """Scales of the blocks that are said; else of a whole matrix, of its rows, or of the blocks of a format."""
        found = self.take(ending, *FLOATS, "float8_e8m0fnu", "uint8")
        said = self.group.block if self.group else self.scheme.block
        if self.group and self.group.size:
            said = (1, self.group.size)
        usual = (1, MX) if dtype_of(found) == "uint8" else (128, 128)
        for block in (said,) if said else (shape, (1, shape[1]), usual):
            if above_one(found.shape) == above_one(grid_of(shape, block)):
                return Scales(found.name, dtype_of(found), block)
        block = said or usual
        made = f"blocks of {block[0]} x {block[1]} make it {list(grid_of(shape, block))}"
        raise self.wrong(f"{ending} is {list(found.shape)}, {made}")


def grid_of(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """How many blocks of rows and of columns there are."""
    return math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])


def above_one(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def dtype_of(tensor: StoredTensor) -> str:
    return BY_SAFETENSORS[tensor.dtype].name
