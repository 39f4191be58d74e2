import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from shards import entry, packed

from llmexport.export.checkpoint import (
    INDEX,
    ITEMSIZE,
    MAX_HEADER,
    MAX_TENSORS,
    SINGLE,
    open_checkpoint,
    read_config,
    read_header,
)
from llmexport.export.errors import ExportError
from llmexport.plugins.dtypes import BY_SAFETENSORS

SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of one file; tests break one thing in it."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / SINGLE).write_bytes(packed({"a": entry(0, 2, [2])}, b"\1\2"))
    return tmp_path


@pytest.fixture
def sharded(folder: Path) -> Path:
    """A checkpoint of two shards that hold a and b."""
    (folder / SINGLE).unlink()
    (folder / SHARD_1).write_bytes(packed({"a": entry(0, 2, [2])}, b"\1\2"))
    (folder / SHARD_2).write_bytes(packed({"b": entry(0, 1, [1])}, b"\3"))
    place(folder, {"a": SHARD_1, "b": SHARD_2})
    return folder


def place(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 3}, "weight_map": weight_map}))


def assert_refuses(folder: Path, *words: str) -> None:
    with pytest.raises(ExportError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_opens_a_single_file(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == {"model_type": "llama"}
    assert [shard.file for shard in checkpoint.shards] == [SINGLE]
    assert checkpoint.shards[0].nbytes == (folder / SINGLE).stat().st_size
    assert checkpoint.read("a").tolist() == [1, 2]


def test_opens_shards(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    assert [shard.file for shard in checkpoint.shards] == [SHARD_1, SHARD_2]
    assert {name: tensor.file for name, tensor in checkpoint.tensors.items()} == {"a": SHARD_1, "b": SHARD_2}
    assert checkpoint.read("b").tolist() == [3]


def test_opens_an_index_of_one_file(folder: Path) -> None:
    place(folder, {"a": SINGLE})
    assert open_checkpoint(folder).tensors.keys() == {"a"}


def test_follows_the_symbolic_links_of_a_hub_cache(folder: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for name in ("config.json", SINGLE):
        (folder / name).rename(blobs / name)
        (folder / name).symlink_to(blobs / name)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors["a"].file == SINGLE
    assert checkpoint.read("a").tolist() == [1, 2]


def test_orders_tensors_by_their_data(folder: Path) -> None:
    header = {"late": entry(2, 3, [1]), "early": entry(0, 2, [2])}
    (folder / SINGLE).write_bytes(packed(header, b"abc"))
    assert list(open_checkpoint(folder).tensors) == ["early", "late"]


def test_takes_scalars_empty_tensors_padding_and_metadata(folder: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "scalar": entry(0, 4, [], "F32"),
        "empty": entry(0, 0, [3, 0], "BF16"),
        "last": entry(4, 4, [0]),
    }
    (folder / SINGLE).write_bytes(packed(json.dumps(header).encode() + b"   ", np.float32(7).tobytes()))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.read("scalar").shape == ()
    assert checkpoint.read("scalar") == 7
    assert checkpoint.read("empty").shape == (3, 0)
    assert checkpoint.read("empty").dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_reads_the_same_bytes_as_safetensors(folder: Path, dtype: str) -> None:
    values = np.arange(30).reshape(2, 3, 5).astype(BY_SAFETENSORS[dtype].name)
    # Three bytes before it: data need not be aligned.
    header = {"odd": entry(0, 3, [3]), "w": entry(3, 3 + values.nbytes, [2, 3, 5], dtype)}
    content = packed(header, b"abc" + values.tobytes())
    (folder / SINGLE).write_bytes(content)
    ours = open_checkpoint(folder).read("w")
    assert ours.dtype == values.dtype
    assert ours.itemsize == ITEMSIZE[dtype]
    assert ours.shape == (2, 3, 5)
    assert ours.tobytes() == values.tobytes() == bytes(dict(safetensors.deserialize(content))["w"]["data"])


def test_reads_what_torch_saved(folder: Path) -> None:
    names = ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float32", "float16", "int64", "uint8", "bool")
    tensors = {name: torch.arange(21).reshape(3, 7).to(getattr(torch, name)) for name in names}
    safetensors.torch.save_file(tensors, folder / SINGLE)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert checkpoint.read(name).dtype == np.dtype(name)
        assert checkpoint.read(name).tobytes() == tensor.view(torch.uint8).numpy().tobytes()


def test_agrees_with_safe_open(folder: Path) -> None:
    kinds = ("float32", "float16", "float64", "int64", "int32", "uint8", "bool", "complex64")
    arrays = {kind: np.arange(63).reshape(7, 9).astype(kind) for kind in kinds}
    arrays["scalar"] = np.array(3.5, np.float32)
    safetensors.numpy.save_file(arrays, folder / SINGLE, metadata={"format": "np"})
    checkpoint = open_checkpoint(folder)
    with safetensors.safe_open(folder / SINGLE, framework="np") as theirs:
        assert set(theirs.keys()) == checkpoint.tensors.keys()
        for name in arrays:
            ours = checkpoint.read(name)
            assert ours.dtype == theirs.get_tensor(name).dtype
            np.testing.assert_array_equal(ours, theirs.get_tensor(name))


def test_maps_the_file_instead_of_reading_it(folder: Path) -> None:
    array = open_checkpoint(folder).read("a")
    assert isinstance(array, np.memmap)
    assert not array.flags.writeable


def test_opens_a_sparse_shard_of_100_gb_without_reading_it(folder: Path) -> None:
    nbytes = 100 * 10**9
    with open(folder / SINGLE, "wb") as file:
        file.write(packed({"a": entry(0, nbytes, [nbytes // 2], "BF16")}))
        file.truncate(file.tell() + nbytes)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors["a"].nbytes == nbytes
    assert checkpoint.read("a")[-1] == 0


def test_header_digest_tells_headers_apart_and_not_data(folder: Path) -> None:
    digests = set()
    for name, data in (("a", b"\1\2"), ("a", b"\3\4"), ("b", b"\1\2")):
        (folder / SINGLE).write_bytes(packed({name: entry(0, 2, [2])}, data))
        digests.add(read_header(folder / SINGLE)[1].header_sha256)
    assert len(digests) == 2


def test_needs_neither_torch_nor_onnx_nor_numpy() -> None:
    code = "import sys, llmexport.export.checkpoint, llmexport.export.output; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not {"torch", "onnx", "numpy", "ml_dtypes"} & set(loaded.split())


def test_refuses_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert_refuses(tmp_path / "nowhere", "no folder", str(tmp_path / "nowhere"), "hf download")


def test_refuses_a_file_in_place_of_the_folder(folder: Path) -> None:
    assert_refuses(folder / SINGLE, str(folder / SINGLE), "not a folder")


def test_refuses_a_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert_refuses(folder, str(folder), "no config.json")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"{", "JSON"),
        (b"", "JSON"),
        (b"\xff\xfe{}", "JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b"[1]", "object"),
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b'{"deep": {"a": 1, "a": 2}}', "'a' appears twice"),
    ],
)
def test_refuses_a_config_that_is_no_json_object(folder: Path, text: bytes, word: str) -> None:
    (folder / "config.json").write_bytes(text)
    assert_refuses(folder, str(folder / "config.json"), word, "download")


def test_takes_the_infinity_that_transformers_writes(folder: Path) -> None:
    (folder / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert read_config(folder)["time_step_limit"][1] == float("inf")


def test_refuses_a_folder_without_weights(folder: Path) -> None:
    (folder / SINGLE).unlink()
    assert_refuses(folder, str(folder), "no weights", SINGLE, INDEX)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_refuses_to_unpickle_and_says_how_to_convert(folder: Path, pickle: str) -> None:
    (folder / SINGLE).rename(folder / pickle)
    assert_refuses(folder, pickle, "safetensors only", "nothing is unpickled", "save_pretrained")


def test_refuses_shards_without_their_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert_refuses(sharded, SHARD_1, "no index", INDEX)


def test_refuses_two_sets_of_weights(sharded: Path) -> None:
    shutil.copy(sharded / SHARD_1, sharded / SINGLE)
    assert_refuses(sharded, "both", SINGLE, INDEX)


@pytest.mark.parametrize("name", ["config.json", INDEX, SHARD_2])
def test_names_the_file_that_may_not_be_read(sharded: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = os.open

    def guarded(path: Path, *args: int, **options: int) -> int:
        if Path(path).name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", guarded)
    assert_refuses(sharded, "cannot read", str(sharded / name), "Permission denied")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        ("{}", "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "'a' appears twice"),
    ],
)
def test_refuses_a_broken_index(sharded: Path, text: str, word: str) -> None:
    (sharded / INDEX).write_text(text)
    assert_refuses(sharded, str(sharded / INDEX), word, "download")


OUTSIDE = ["../x", "/etc/x", "sub/x", "..\\x", "C:x", "nul\0", "line\n", "\ud800"]


@pytest.mark.parametrize("file", [f"{x}.safetensors" for x in OUTSIDE] + ["..", "", "config.json", 7, None, ["x"]])
def test_refuses_an_index_that_leaves_the_folder(sharded: Path, file: object) -> None:
    place(sharded, {"a": SHARD_1, "b": file})
    assert_refuses(sharded, str(sharded / INDEX), "'b'", repr(file), "no shard of this folder")


def test_names_the_first_missing_shards(sharded: Path) -> None:
    place(sharded, {str(i): f"shard-{i}.safetensors" for i in range(5)} | {"a": SHARD_1})
    named = ("shard-0.safetensors", "shard-2.safetensors", "...")
    assert_refuses(sharded, "lacks 5 of the 6 shards", *named, "finish the download")


def test_a_dangling_link_is_a_missing_shard(sharded: Path) -> None:
    (sharded / SHARD_2).unlink()
    (sharded / SHARD_2).symlink_to(sharded / "blob-not-downloaded")
    assert_refuses(sharded, "lacks 1 of the 2 shards", SHARD_2)


def test_refuses_a_shard_name_too_long_for_the_file_system(sharded: Path) -> None:
    place(sharded, {"a": "x" * 300 + ".safetensors"})
    assert_refuses(sharded, "cannot read", "too long")


def test_refuses_a_tensor_that_is_not_where_the_index_says(sharded: Path) -> None:
    place(sharded, {"a": SHARD_1, "b": SHARD_2, "c": SHARD_2})
    assert_refuses(sharded, f"{SHARD_2} lacks tensor 'c'", f"puts in {SHARD_2}")


def test_refuses_a_tensor_that_the_index_does_not_name(sharded: Path) -> None:
    (sharded / SHARD_2).write_bytes(packed({"b": entry(0, 1, [1]), "c": entry(1, 2, [1])}, b"\3\4"))
    assert_refuses(sharded, f"{SHARD_2} holds tensor 'c'", "puts in no shard")


BUFFER = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.mark.parametrize("shard", [SHARD_1, "model-00003-of-00003.safetensors"])
def test_an_index_may_name_a_buffer_that_no_shard_holds(sharded: Path, shard: str) -> None:
    place(sharded, {"a": SHARD_1, "b": SHARD_2, BUFFER: shard, "model.rotary_emb.inv_freq": shard})
    assert open_checkpoint(sharded).tensors.keys() == {"a", "b"}


def test_a_shard_may_hold_a_buffer_that_the_index_does_not_name(sharded: Path) -> None:
    (sharded / SHARD_2).write_bytes(packed({"b": entry(0, 1, [1]), BUFFER: entry(1, 2, [1])}, b"\3\4"))
    assert open_checkpoint(sharded).tensors.keys() == {"a", "b", BUFFER}


def test_refuses_a_tensor_in_two_shards(sharded: Path) -> None:
    (sharded / SHARD_2).write_bytes(packed({"b": entry(0, 1, [1]), "a": entry(1, 2, [1])}, b"\3\4"))
    assert_refuses(sharded, f"{SHARD_2} holds tensor 'a'", f"puts in {SHARD_1}")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["no safetensors file", "0 bytes"]),
        (b"\2\0\0\0", ["no safetensors file", "4 bytes"]),
        (b"\3" + b"\0" * 7 + b"{}", ["no safetensors file", "10 bytes", "claims 3"]),
        (b"\xff" * 8 + b"{}", ["no safetensors file"]),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            ["no safetensors file", "git lfs pull"],
        ),
        (packed(b"{"), ["JSON"]),
        (packed(b"\xff{}"), ["JSON"]),
        (packed(b"[]"), ["object"]),
        (packed(b""), ["JSON"]),
        (
            packed(b'{"a": %b, "a": %b}' % ((json.dumps(entry(0, 1, [1])).encode(),) * 2), b"x"),
            ["'a'", "twice"],
        ),
        (packed({"__metadata__": {"a": 1}}), ["__metadata__"]),
        (packed({"__metadata__": []}), ["__metadata__"]),
        (packed({"a": entry(0, 4, [4])}, b"abc"), ["truncated", "describes", "has"]),
        (packed({"a": entry(0, 4, [4])}, b"abcde"), ["too long"]),
        (packed({"a": entry(1, 2, [1])}, b"ab"), ["'a'", "hole"]),
        (packed({"a": entry(0, 1, [1]), "b": entry(2, 3, [1])}, b"abc"), ["'b'", "hole"]),
        (packed({"a": entry(0, 2, [2]), "b": entry(1, 3, [2])}, b"abc"), ["'b'", "overlaps"]),
        (packed({"a": entry(0, 2, [2]), "b": entry(1, 1, [0])}, b"ab"), ["'b'", "overlaps"]),
        (packed({"a": entry(0, 9, [9])}, b"ab"), ["truncated"]),
    ],
)
def test_refuses_a_broken_shard(folder: Path, content: bytes, words: list[str]) -> None:
    (folder / SINGLE).write_bytes(content)
    assert_refuses(folder, str(folder / SINGLE), *words, "download it again")


def test_refuses_a_header_over_the_limit_of_the_format(folder: Path) -> None:
    with open(folder / SINGLE, "wb") as file:
        file.write((MAX_HEADER + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER + 100)
    assert_refuses(folder, str(folder / SINGLE), "no safetensors file", str(MAX_HEADER + 1))


@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
@pytest.mark.parametrize("value", [None, True, 1.5, {}, "x", [True], [-1], [1.0], ["1"], [2**70], "missing"])
def test_refuses_an_entry_with_an_ill_typed_field(folder: Path, field: str, value: object) -> None:
    bad = entry(0, 1, [1]) | {field: value}
    if value == "missing":
        del bad[field]
    (folder / SINGLE).write_bytes(packed({"a": bad}, b"x"))
    assert_refuses(folder, str(folder / SINGLE), "'a'", field)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (7, ["dtype, shape and data_offsets"]),
        (entry(0, 1, [1], "F4"), ["'F4'", "BF16"]),
        (entry(0, 1, [1] * 33), ["impossible shape"]),
        (entry(0, 0, [0, 2**62, 2**62]), ["impossible shape"]),
        (entry(1, 0, [1]), ["data_offsets", "[1, 0]"]),
        (entry(0, 1, [1]) | {"data_offsets": [0, 1, 2]}, ["data_offsets"]),
        (entry(0, 1, [1], "F32"), ["data_offsets", "F32", "4 bytes"]),
        (entry(0, 1, [0]), ["data_offsets", "0 bytes"]),
        (entry(0, 1, [2]), ["data_offsets", "2 bytes"]),
    ],
)
def test_refuses_an_impossible_entry(folder: Path, bad: object, words: list[str]) -> None:
    (folder / SINGLE).write_bytes(packed({"a": bad}, b"x"))
    assert_refuses(folder, str(folder / SINGLE), "'a'", *words)


def test_shows_a_hostile_value_on_one_short_line(folder: Path) -> None:
    deep: object = 1
    for _ in range(300):
        deep = [deep]
    (folder / SINGLE).write_bytes(packed({"x\n" * 10_000: entry(0, 1, [1]) | {"shape": deep, "z": "y" * 10_000}}))
    with pytest.raises(ExportError) as caught:
        open_checkpoint(folder)
    assert len(str(caught.value)) < 500 + len(str(folder))
    assert "\n" not in str(caught.value)


def test_a_header_of_more_tensors_than_any_model_has_is_refused_before_it_is_parsed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(*_: object, **__: object) -> object:
        raise AssertionError("parsed")

    text = b'{"a":{}' + b',"b":{}' * MAX_TENSORS + b"}"
    (folder / SINGLE).write_bytes(packed(text))
    monkeypatch.setattr(json, "loads", parse)
    with pytest.raises(ExportError, match=r"describes over 500000 tensors: is it the weights of a language model\?"):
        read_header(folder / SINGLE)


def test_a_hundred_thousand_tensors_are_read_in_seconds(folder: Path) -> None:
    (folder / SINGLE).write_bytes(packed({f"t{i}": entry(0, 0, [0]) for i in range(100_000)}))
    start = time.process_time()
    held, _ = read_header(folder / SINGLE)
    assert len(held) == 100_000
    assert time.process_time() - start < 10
