"""A golden pack is read as it was written, and any other file is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_pack import make_pack, parts

from llmexport.export.errors import ExportError
from llmexport.validate import pack
from llmexport.validate.compare import Mismatch


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_pack_is_read_as_it_was_written(dtype: str, tmp_path: Path) -> None:
    header, arrays = parts(dtype)
    with pack.read(make_pack(tmp_path / "p.npz", dtype)) as found:
        assert dataclasses.replace(found.header, arrays={}) == header
        assert found.header.arrays.keys() == arrays.keys()
        assert all((found.array(k) == a).all() for k, a in arrays.items())
        assert {found.array(k).dtype for k in arrays} == {a.dtype for a in arrays.values()}


def test_bfloat16_is_stored_as_its_bits_and_said_to_be_what_it_is(tmp_path: Path) -> None:
    header, arrays = parts("bfloat16")
    narrow = arrays | {"real/0": arrays["real/0"].astype(np.dtype("bfloat16"))}
    pack.write(tmp_path / "p.npz", header, narrow, force=False)
    with pack.read(tmp_path / "p.npz") as found:
        assert found.header.arrays["real/0"].dtype == "bfloat16"
        assert (pack.widened(found.array("real/0"), "bfloat16") == arrays["real/0"]).all()
    with np.load(tmp_path / "p.npz", allow_pickle=False) as npz:
        assert npz["real/0"].dtype == np.uint16


def test_an_array_of_zeros_takes_no_room(tmp_path: Path) -> None:
    header, arrays = parts()
    large = arrays | {"fed/0/model/past": np.zeros((2, 2, 10_000, 8), np.float16)}
    pack.write(tmp_path / "p.npz", header, large, force=False)
    assert os.path.getsize(tmp_path / "p.npz") < 100_000
    with pack.read(tmp_path / "p.npz") as found:
        assert found.array("fed/0/model/past").shape == (2, 2, 10_000, 8)
        assert not found.array("fed/0/model/past").any()


def read_all(path: Path) -> None:
    with pack.read(path) as found:
        for key in found.header.arrays:
            found.array(key)


def refused(path: Path) -> str:
    with pytest.raises(Mismatch) as error:
        read_all(path)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("make it again: llmexport golden")
    return str(error.value)


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, np.ndarray]], None]) -> None:
    """The same pack with another header, or other arrays."""
    with np.load(path, allow_pickle=False) as npz:
        arrays = dict(npz)
    header = json.loads(arrays.pop("header").tobytes())
    change(header, arrays)
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez(path, header=text, **arrays)


def test_a_pack_that_ends_anywhere_is_refused(tmp_path: Path) -> None:
    data = make_pack(tmp_path / "p.npz").read_bytes()
    for end in range(0, len(data), len(data) // 40):
        (tmp_path / "cut.npz").write_bytes(data[:end])
        refused(tmp_path / "cut.npz")


def test_a_pack_with_another_byte_anywhere_in_an_array_is_refused(tmp_path: Path) -> None:
    data = make_pack(tmp_path / "p.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "p.npz") as zipped:
        places = [i.header_offset + len(i.filename) + 200 for i in zipped.infolist() if i.file_size > 300]
    assert len(places) > 5
    for place in places:
        other = bytearray(data)
        other[place] ^= 1
        (tmp_path / "other.npz").write_bytes(other)
        refused(tmp_path / "other.npz")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda h, a: h.update(format=2), "is of format 2, this version reads 1"),
        (lambda h, a: h.pop("format"), "KeyError('format')"),
        (lambda h, a: h.pop("seed"), "seed"),
        (lambda h, a: h.update(seed="0"), "seed is '0'"),
        (lambda h, a: h.update(stages=[]), "arrays"),
        (lambda h, a: h["graphs"]["model"].update(model_sha256=1), "model_sha256 is 1"),
        (lambda h, a: h["stages"][0]["allowed"].update(other=h["stages"][0]["allowed"]["logits"]), "outputs ['other']"),
        (lambda h, a: h["stages"][1]["shots"][0].update(graph="other"), "'other'"),
        (lambda h, a: a.pop("expected/1/logits"), "arrays ['expected/1/logits']"),
        (lambda h, a: a.update(more=np.ones(3)), "arrays ['more']"),
        (lambda h, a: a.update({"fed/1/model/input_ids": np.ones((2, 2), np.int64)}), "fed/1/model/input_ids is int64"),
        (lambda h, a: a.update({"fed/1/model/input_ids": np.ones((2, 1), np.int32)}), "fed/1/model/input_ids is int32"),
    ],
)
def test_a_pack_that_says_something_else_is_refused(change, says: str, tmp_path: Path) -> None:
    path = make_pack(tmp_path / "p.npz")
    rewritten(path, change)
    assert says in refused(path)


def test_what_is_no_pack_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.npz"
    assert "No such file or directory" in refused(path)
    path.write_bytes(b"text")
    assert "is no golden pack" in refused(path)
    np.savez(path, weights=np.ones(3))
    assert "it has no header" in refused(path)
    np.save(tmp_path / "p.npy", np.ones(3))
    assert "is no golden pack" in refused(tmp_path / "p.npy")
    os.mkfifo(tmp_path / "pipe")
    assert "it is a named pipe" in refused(tmp_path / "pipe")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    path = tmp_path / "p.npz"
    with zipfile.ZipFile(path, "w") as zipped, zipped.open("header.npy", "w") as member:
        np.lib.format.write_array(member, np.array([Trap()], object), allow_pickle=True)
    refused(path)
    path.write_bytes(pickle.dumps(Trap()))
    refused(path)
    assert not (tmp_path / "sprung").exists()


def test_an_existing_file_is_replaced_only_if_it_is_a_pack_and_force_is_said(tmp_path: Path) -> None:
    path = make_pack(tmp_path / "p.npz")
    before = path.read_bytes()
    with pytest.raises(ExportError, match="exists: choose another name, or pass --force"):
        make_pack(path, "float32")
    assert path.read_bytes() == before
    pack.write(path, *parts("float32"), force=True)
    assert path.read_bytes() != before
    (tmp_path / "mine.npz").write_bytes(b"mine")
    with pytest.raises(ExportError, match="is no earlier output, and --force does not replace it"):
        pack.write(tmp_path / "mine.npz", *parts(), force=True)
    assert (tmp_path / "mine.npz").read_bytes() == b"mine"


def test_a_pack_that_cannot_be_written_whole_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def fail(file: Any, **arrays: np.ndarray) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    make_pack(tmp_path / "p.npz")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(pack.np, "savez", fail)
    with pytest.raises(ExportError, match="No space left on device: free space"):
        pack.write(tmp_path / "p.npz", *parts("float32"), force=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
