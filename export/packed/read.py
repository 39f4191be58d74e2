"""The matrices of a quantised checkpoint, told by the endings of its tensors' names and held against what it says."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmexport.export.errors import ExportError
from llmexport.export.packed.matrix import Layout, Matrix, Scales, Zeros
from llmexport.export.packed.scheme import Scheme, read_scheme
from llmexport.export.values import show_name
from llmexport.plugins.dtypes import BY_SAFETENSORS

if TYPE_CHECKING:
    from llmexport.export.checkpoint import StoredTensor

FLOATS = ("float32", "float16", "bfloat16")
Held = Mapping[str, "StoredTensor"]  # by the ending of its name, what lies beside one another
# The longest first: what a matrix NAME.weight is made of.
ENDINGS = (
    *(".weight_scale_inv", ".weight_global_scale", ".weight_zero_point", ".weight_scale_2", ".weight_packed"),
    *(".weight_shape", ".weight_g_idx", ".weight_scale", ".input_global_scale", ".input_scale_ub", ".input_scale"),
    *(".activation_scale", ".pre_quant_scale", ".qweight", ".qzeros", ".scales", ".g_idx", ".weight"),
)
# Of these alone a module's tensors are quantised.
MARKS = (".weight_scale_inv", ".weight_scale", ".weight_packed", ".qweight", ".scales", ".qzeros", ".weight_scale_2")
# Scales of activations, which are not quantised here, and sizes that shapes say too.
ASIDE = (".input_scale", ".input_global_scale", ".input_scale_ub", ".activation_scale", ".weight_shape")
# Scales of a cache in 8 bits, which is not made here.
CACHE_SCALES = (".k_scale", ".v_scale", ".q_scale", ".prob_scale", ".k_proj.output_scale", ".v_proj.output_scale")


def matrices_of(config: Mapping[str, Any], folder: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, Matrix]:
    """The matrices in few bits of a checkpoint; none if nothing says that it has any. Raises as read_matrices does."""
    scheme = read_scheme(config, folder)
    return read_matrices(scheme, tensors) if scheme else {}


def read_matrices(scheme: Scheme, tensors: Mapping[str, StoredTensor]) -> dict[str, Matrix]:
    """The matrices by the names that they would have unquantised.

    Raises ExportError on one that is not as the scheme says, or if there is none.
    """
    modules: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if ending := next((e for e in ENDINGS if name.endswith(e)), None):
            modules[name.removesuffix(ending)][ending] = tensor
    found = {}
    for module, held in modules.items():
        if any(mark in held for mark in MARKS):
            if scheme.keeps(module):
                raise _wrong(scheme, module, f"{scheme.where} says that it is not quantised")
            found[f"{module}.weight"] = _Module(scheme, module, held).matrix()
    if not found:
        raise ExportError(
            f"{scheme.where} says that the weights are quantised ({scheme.method}), and no tensor is: "
            "download the weights and config.json again"
        )
    return found


def cache_scales(tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    """The tensors that are scales of a quantised cache."""
    return (n for n in tensors if n.endswith(CACHE_SCALES))


def _wrong(scheme: Scheme, module: str, what: str) -> ExportError:
    return ExportError(
        f"{show_name(module)} is quantised ({scheme.method}) in a way that is not read here: {what}: "
        "are config.json and the weights from the same download?"
    )


class _Module:
    """The tensors of one module that is quantised."""

    def __init__(self, scheme: Scheme, module: str, held: Held) -> None:
        self.scheme, self.module, self.held = scheme, module, held
        self.used: set[str] = set()

    def matrix(self) -> Matrix:
        if ".qweight" in self.held:
            made = self._transposed()
        elif ".weight_packed" in self.held:
            made = self._packed()
        else:
            made = self._typed()
        aside = [e for e in ASIDE if e in self.held]
        if left := self.held.keys() - self.used - {*aside}:
            raise self.wrong(f"{', '.join(sorted(left))} should not be there")
        names = tuple(self.held[e].name for e in aside)
        return Matrix(f"{self.module}.weight", beside=names, **made)

    def wrong(self, what: str) -> ExportError:
        return _wrong(self.scheme, self.module, what)

    def take(self, ending: str, *dtypes: str, rank: int | None = None) -> StoredTensor:
        """The tensor of this ending, of one of these types."""
        if ending not in self.held:
            raise self.wrong(f"it lacks {ending}")
        self.used.add(ending)
        found = self.held[ending]
        if dtype_of(found) not in dtypes:
            raise self.wrong(f"{ending} is {found.dtype}")
        if rank is not None and len(found.shape) != rank:
            raise self.wrong(f"{ending} is {list(found.shape)}")
        return found

    def number(self, ending: str) -> str | None:
        """The name of a tensor that is one number."""
        if ending not in self.held:
            return None
        found = self.take(ending, "float32")
        if math.prod(found.shape) != 1:
            raise self.wrong(f"{ending} is {list(found.shape)}, expected one number")
        return found.name

    def scales(self, shape: tuple[int, int], turned: bool = False, ending: str = ".scales", dtype: str = "") -> Scales:
        """Scales by groups of columns, as their number says: of GPTQ and AWQ, of a packed matrix."""
        found = self.take(ending, *((dtype,) if dtype else FLOATS))
        rows, columns = shape
        groups = math.prod(found.shape) // rows
        size = self.group_size(columns)
        expected = [[math.ceil(columns / size), rows][:: 1 if turned else -1]]
        expected += [[rows]] if size == columns else []
        if list(found.shape) not in expected or not groups:
            raise self.wrong(f"{ending} is {list(found.shape)}, groups of {size} make it {expected[0]}")
        if columns % size:
            raise self.wrong(f"groups of {size} do not fill rows of {columns}")
        return Scales(found.name, dtype_of(found), (1, size), turned)

    def group_size(self, columns: int) -> int:
        group = self.scheme.group(self.module)
        return (group.size if group else self.scheme.size) or columns

    def _transposed(self) -> dict[str, object]:
        """GPTQ and AWQ."""
        scheme, stored = self.scheme, self.take(".qweight", "int32", rank=2)
        if scheme.method not in ("gptq", "awq"):
            raise self.wrong("it has .qweight, which is GPTQ or AWQ")
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
        if by_columns and ".g_idx" in self.held:
            order = self.take(".g_idx", "int32", rank=1)
            if order.shape != (shape[1],):
                raise self.wrong(f".g_idx is {list(order.shape)}, expected {[shape[1]]}")
            made["order"] = order.name
        return made

    def _packed(self) -> dict[str, object]:
        """compressed-tensors in 4 bits, and in 8 where they are packed in words."""
        stored = self.take(".weight_packed", "int32", "uint8", rank=2)
        group = self.scheme.group(self.module)
        if group is None:
            raise self.wrong("no group of config_groups is of it")
        rows, columns = stored.shape
        if dtype_of(stored) == "uint8":
            return {"values": stored.name, **self._fp4(rows, 2 * columns, ".weight_global_scale")}
        if group.format != "pack-quantized":
            raise self.wrong(f"it has packed integers, where its group says {group.format}")
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
        if ".weight_g_idx" in self.held:
            made["order"] = self.take(".weight_g_idx", "int32", rank=1).name
        return made

    def _typed(self) -> dict[str, object]:
        """A type of 8 bits, or bytes of ModelOpt's, with scales beside."""
        stored = self.take(".weight", "float8_e4m3fn", "int8", "uint8", rank=2)
        rows, columns = stored.shape
        number = dtype_of(stored)
        made: dict[str, object] = {"values": stored.name, "layout": "rows"}
        ending = ".weight_scale_inv" if ".weight_scale_inv" in self.held else ".weight_scale"
        if number == "uint8":
            beside = self.held.get(ending)
            if beside is None or dtype_of(beside) in ("float8_e4m3fn", "uint8"):
                return made | self._fp4(rows, 2 * columns, ".weight_scale_2")
            shape = (2 * rows, columns)
            size = columns // (math.prod(beside.shape) // shape[0] or 1)
            scales = self.take(ending, *FLOATS)
            if scales.shape != (shape[0], columns // size) or columns % size:
                raise self.wrong(f"{ending} is {list(scales.shape)}")
            second = self.number(".weight_scale_2")
            made |= {"number": "int4", "layout": "pairs"}
            made["scales"] = Scales(scales.name, dtype_of(scales), (1, size), second=second)
        else:
            shape = (rows, columns)
            made |= {"number": number, "scales": self._block_scales(shape, ending)}
        if ".pre_quant_scale" in self.held:
            factor = self.take(".pre_quant_scale", *FLOATS)
            if math.prod(factor.shape) != columns:
                raise self.wrong(f".pre_quant_scale is {list(factor.shape)}, expected {[columns]}")
            made["factor"] = factor.name
        return made | {"shape": shape}

    def _fp4(self, rows: int, columns: int, second: str) -> dict[str, object]:
        """E2M1 with scales of E4M3 and one more, or of exponents (MXFP4)."""
        scales = self.take(".weight_scale", "float8_e4m3fn", "uint8", "float8_e8m0fnu", rank=2)
        size = 16 if dtype_of(scales) == "float8_e4m3fn" else 32
        if scales.shape != (rows, math.ceil(columns / size)) or columns % size:
            raise self.wrong(f".weight_scale is {list(scales.shape)}, expected {[rows, columns // size]}")
        factor = self.number(second)
        if (factor is not None) != (size == 16):
            raise self.wrong(f"{second} is {'there' if factor else 'missing'}")
        divides = second == ".weight_global_scale"
        made: dict[str, object] = {"shape": (rows, columns), "number": "float4_e2m1fn", "layout": "rows"}
        if ".pre_quant_scale" in self.held:
            made["factor"] = self.take(".pre_quant_scale", *FLOATS).name
        return made | {"scales": Scales(scales.name, dtype_of(scales), (1, size), second=factor, divides=divides)}

    def _block_scales(self, shape: tuple[int, int], ending: str) -> Scales:
        """Scales of a whole matrix, of its rows, or of blocks of the size that is said, by default 128 x 128."""
        found = self.take(ending, *FLOATS, "float8_e8m0fnu", "uint8")
        group = self.scheme.group(self.module)
        said = group.block if group else self.scheme.block
        block = said or (128, 128)
        grid = (math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1]))
        known = {} if said else {(): shape, (shape[0],): (1, shape[1])}
        for sizes, of in (*known.items(), (_above_one(grid), block)):
            if _above_one(found.shape) == sizes:
                return Scales(found.name, dtype_of(found), of)
        raise self.wrong(f"{ending} is {list(found.shape)}, blocks of {block[0]} x {block[1]} make it {list(grid)}")


def _above_one(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def dtype_of(tensor: StoredTensor) -> str:
    return BY_SAFETENSORS[tensor.dtype].name
