"""Where tensors lie in a file that we write: what is mapped is read fastest from the start of a cache's line on."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from llmexport.export.checkpoint import read_header
from llmexport.export.weight_layout import laid_out, unplaced
from llmexport.plugins.dtypes import BY_NAME

HELD = {
    "odd": np.arange(5, dtype=np.uint8),
    "matrix": np.arange(48, dtype=np.float32).reshape(3, 16),
    "scale": np.arange(3, dtype=np.float16),
    "bytes": np.arange(128, dtype=np.uint8),
    "shape": np.arange(3, dtype=np.int64),
    "none": np.zeros((0, 4), np.float32),
    "half": np.arange(32, dtype=np.float16),
}
WHOLE = {"matrix", "bytes", "none", "half"}


# Headers of other lengths.
@pytest.mark.parametrize("end", ["", "1", "of_a_longer_name_than_any"])
def test_tensors_of_whole_lines_begin_at_lines_and_others_at_their_width(end, tmp_path):
    held = {name + end: array for name, array in HELD.items()}
    tensors = [unplaced(n, BY_NAME[a.dtype.name], a.shape) for n, a in held.items()]
    header, placed = laid_out("x.safetensors", tensors)
    with (tmp_path / "x.safetensors").open("wb") as file:
        file.write(header)
        for tensor in placed.values():
            file.seek(tensor.offset)
            file.write(held[tensor.name].tobytes())
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == held.keys()
    assert all(np.array_equal(read[n], a) and read[n].dtype == a.dtype for n, a in held.items())
    found, _ = read_header(tmp_path / "x.safetensors")
    assert {n: t.offset for n, t in found.items()} == {n: t.offset for n, t in placed.items()}
    assert {n for n, t in found.items() if t.offset % 64 == 0} >= {n + end for n in WHOLE}
    assert not [n for n, t in found.items() if t.offset % held[n].itemsize]
