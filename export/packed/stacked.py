"""The matrices of all experts that a checkpoint holds quantised in one tensor, held against what the scheme says."""

from __future__ import annotations

from llmexport.export.errors import ExportError
from llmexport.export.packed.matrix import Layout, Matrix, Scales
from llmexport.export.packed.module import FLOATS, NV, Module, above_one, dtype_of, grid_of
from llmexport.export.quantised import CURE
from llmexport.export.values import show_name

ASIDE = ("_input_scale", "_activation_scale")
# The longest first: what lies beside a stack NAME.
ENDINGS = ("_weight_scale_2", "_weight_scale", "_scale_inv", *ASIDE, "_scale")
READ = "FP8 of transformers (fp8, fbgemm_fp8), FP8 and NVFP4 of ModelOpt"


class Stack(Module):
    """The tensors of one stack, by how their names go on behind its own."""

    def matrix(self) -> Matrix:
        """One matrix below the other, [experts * rows, columns]. Raises ExportError if they are not as the scheme
        says."""
        self.check_said()
        if self.kind == "modelopt":
            return self._modelopt()
        if self.kind == "fp8":
            return self._by_columns() if "_scale" in self.held else self._by_blocks()
        raise self._unread(f"its tensor is {self.held[''].dtype}")

    def _by_blocks(self) -> Matrix:
        """transformers' fp8: matrices [outputs, inputs], scales of blocks of each, or of each or its halves."""
        experts, rows, columns = self._values("float8_e4m3fn")
        found = self.take("_scale_inv", *FLOATS, "float8_e8m0fnu", "uint8", rank=3)
        said = self.scheme.block
        shapes = [said] if said else [(rows, columns), (max(rows // 2, 1), columns)]
        grids = {(experts, *grid_of((rows, columns), b)): b for b in shapes}
        if found.shape not in grids:
            expected = " or ".join(str([*g]) for g in grids)
            raise self.wrong(f"_scale_inv is {list(found.shape)}, expected {expected}")
        block = grids[found.shape]
        if rows % block[0]:
            raise self.wrong(f"blocks of {block[0]} rows do not fill the {rows} of an expert")
        return self._made(experts, rows, columns, "rows", Scales(found.name, dtype_of(found), block))

    def _by_columns(self) -> Matrix:
        """fbgemm_fp8: matrices [inputs, outputs], a scale for each output."""
        experts, columns, rows = self._values("float8_e4m3fn")
        found = self.take("_scale", *FLOATS)
        if above_one(found.shape) != above_one((experts, rows)):
            raise self.wrong(f"_scale is {list(found.shape)}, expected {[experts, 1, rows]}")
        return self._made(experts, rows, columns, "stacked", Scales(found.name, dtype_of(found), (1, columns)))

    def _modelopt(self) -> Matrix:
        """Matrices [inputs, outputs]: FP8 with a scale for all or for each, or NVFP4 in groups of inputs."""
        experts, first, rows = self._values("float8_e4m3fn", "uint8")
        if dtype_of(self.held[""]) == "uint8":
            return self._nvfp4(experts, 2 * first, rows)
        found = self.take("_weight_scale", *FLOATS, "uint8")
        apart = above_one(found.shape)
        if dtype_of(found) == "uint8" or apart not in ((), above_one((experts,))):
            raise self._unread(f"_weight_scale is {found.dtype} {list(found.shape)}")
        scales = Scales(found.name, dtype_of(found), (rows if apart else experts * rows, first))
        return self._made(experts, rows, first, "stacked", scales)

    def _nvfp4(self, experts: int, columns: int, rows: int) -> Matrix:
        found = self.take("_weight_scale", "float8_e4m3fn", "uint8", *FLOATS)
        if dtype_of(found) != "float8_e4m3fn":
            raise self._unread(f"_weight_scale is {found.dtype} {list(found.shape)}")
        expected = (experts, columns // NV, rows)
        if found.shape != expected or columns % NV:
            raise self.wrong(f"_weight_scale is {list(found.shape)}, expected {list(expected)}")
        second = self.number("_weight_scale_2")
        if not second:
            raise self.wrong("it lacks _weight_scale_2")
        scales = Scales(found.name, dtype_of(found), (1, NV), turned=True, second=second)
        return self._made(experts, rows, columns, "stacked", scales)

    def _unread(self, what: str) -> ExportError:
        """Of a form that tools write and that is not read: no download mends it."""
        return ExportError(
            f"{show_name(self.module)} is quantised ({self.scheme.method}) in a way that is not read here: {what}, and "
            f"experts in one tensor are read in {READ} alone: {CURE}"
        )

    def _values(self, *dtypes: str) -> tuple[int, int, int]:
        experts, first, second = self.take("", *dtypes, rank=3).shape
        return experts, first, second

    def _made(self, experts: int, rows: int, columns: int, layout: Layout, scales: Scales) -> Matrix:
        values = self.held[""]
        number = "float4_e2m1fn" if dtype_of(values) == "uint8" else "float8_e4m3fn"
        beside, shape = self.beside(ASIDE), (experts * rows, columns)
        return Matrix(self.module, shape, values.name, number, layout, scales, beside=beside, experts=experts)
