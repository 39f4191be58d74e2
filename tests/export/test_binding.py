"""What a weight input is bound to is made of the weight files as engine.json says, or refused in one line."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmexport.export import manifest
from llmexport.export.binding import Binding, Operation, Source, weights
from llmexport.export.errors import EngineError, ExportError
from llmexport.export.exported import Export
from llmexport.plugins.dtypes import BY_SAFETENSORS
from llmexport.plugins.errors import UserError

QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def export(exported: Callable[..., Path], tmp_path: Path) -> Export:
    """An export whose files a test may change."""
    folder = Path(shutil.copytree(exported("llama"), tmp_path / "export"))
    return manifest.read(folder)


def source_of(export: Export, name: str) -> Source:
    held = export.checkpoint().tensors[name]
    return Source(name, held.file, held.offset, BY_SAFETENSORS[held.dtype].name, held.shape)


def bind(export: Export, *operations: Operation, dtype: str, shape: tuple[int, ...], count: int = 1) -> np.ndarray:
    binding = Binding(dtype, shape, (source_of(export, QUERY),) * count, operations)
    [(name, array)] = weights({"w": binding}, export.weights, export.folder)
    assert name == "w"
    return array


def test_bytes_that_are_bound_as_stored_are_the_file_and_no_copy(export: Export) -> None:
    wanted = export.checkpoint().read(QUERY)
    rows, columns = wanted.shape
    found = bind(export, Operation("reshape", (1, rows, columns)), dtype="float32", shape=(1, rows, columns))
    assert isinstance(found, np.memmap)
    assert not found.flags.writeable
    assert np.array_equal(found[0], wanted)


def test_operations_are_done_in_order(export: Export) -> None:
    wanted = export.checkpoint().read(QUERY)
    rows, columns = wanted.shape
    operations = (
        *(Operation("concat", 0), Operation("reshape", (2, rows, columns))),
        *(Operation("cast", "bfloat16"), Operation("transpose", (0, 2, 1)), Operation("slice", (1, 3, 10))),
    )
    found = bind(export, *operations, dtype="bfloat16", shape=(2, 7, rows), count=2)
    assert found.flags.c_contiguous
    assert np.array_equal(found, np.stack([wanted.T[3:10].astype(found.dtype)] * 2))


@pytest.mark.parametrize(
    ("operations", "reason"),
    [
        ((Operation("reshape", (7, 7)),), r"cannot make w as it says \(cannot reshape array of size \d+"),
        ((Operation("transpose", (0, 1, 2)),), r"cannot make w as it says \(axes don't match array\)"),
        ((Operation("cast", "half a float"),), r"cannot make w as it says \(data type 'half a float' not understood\)"),
        ((Operation("cast", "float16"),), r"says w is float32 \[64, 64\], and makes float16 \[64, 64\]"),
    ],
)
def test_operations_that_do_not_fit_are_refused(operations: tuple[Operation, ...], reason: str, export: Export) -> None:
    with pytest.raises(EngineError, match=f"^engine.json {reason}.*: build it again$"):
        bind(export, *operations, dtype="float32", shape=(64, 64))


@pytest.mark.parametrize(
    "changes",
    [{"offset": 8}, {"shape": (64, 63)}, {"tensor": "model.norm.weight"}, {"dtype": "float16"}, {"dtype": "x"}],
)
def test_a_source_that_is_not_where_it_should_be_is_refused(changes: dict[str, object], export: Export) -> None:
    source = dataclasses.replace(source_of(export, QUERY), **changes)
    with pytest.raises(EngineError, match=rf"binds w to {source.tensor} from byte \d+ of .* it is not there"):
        list(weights({"w": Binding("float32", source.shape, (source,), ())}, export.weights, export.folder))


def test_a_file_that_the_engine_does_not_describe_is_refused(export: Export) -> None:
    source = dataclasses.replace(source_of(export, QUERY), file="../another.safetensors")
    with pytest.raises(EngineError, match=r"binds weights of \.\./another\.safetensors, which it does not describe"):
        list(weights({"w": Binding("float32", source.shape, (source,), ())}, export.weights, export.folder))


def overwrite(path: Path) -> None:
    """Other numbers in a file of the same header and size."""
    data = path.read_bytes()
    path.write_bytes(data[:-4] + bytes(4))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (os.unlink, "is missing from the export: export again"),
        (overwrite, "is not the file that was exported, it has changed since: export again"),
        (lambda path: os.truncate(path, path.stat().st_size - 4), "is truncated"),
    ],
)
def test_a_weight_file_that_moved_or_changed_is_refused_before_anything_is_bound(
    change: Callable[[Path], object], reason: str, export: Export
) -> None:
    source = source_of(export, QUERY)
    change(export.folder / source.file)
    with pytest.raises(ExportError, match=reason) as caught:
        next(weights({"w": Binding("float32", source.shape, (source,), ())}, export.weights, export.folder))
    assert "\n" not in str(caught.value)


def test_a_weight_file_that_changes_while_others_are_bound_is_refused(export: Export) -> None:
    source = source_of(export, QUERY)
    binding = Binding("float32", source.shape, (source,), ())
    made = weights({"first": binding, "second": binding}, export.weights, export.folder)
    next(made)
    os.utime(export.folder / source.file, ns=(0, 0))
    with pytest.raises(UserError, match="changed while it was used"):
        next(made)
