"""Safetensors files that something happened to: refused, or read as the library reads them."""

import json
import math
from pathlib import Path

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shards import entry, packed

from llmexport.export.checkpoint import ITEMSIZE, SINGLE, open_checkpoint
from llmexport.export.errors import ExportError

EDITS = ["field", "item", "drop", "alias", "text", "length", "byte", "cut"]
SWAPS = [("t1", "t0"), ("[", "{"), (",", ""), ("0", "00"), ("0", "-1"), ("1", "1e0"), ('"', "")]
ODD = st.sampled_from([None, True, -1, 0, 1, 2, 1.5, 2**31, 2**63, 2**70, "", "F32", "F4", [], [0], [1, 2], {}])


@st.composite
def mutants(draw: st.DrawFn) -> bytes:
    """A good file with up to three things done to it."""
    header: dict[str, object] = {}
    end = 0
    for i in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(sorted(ITEMSIZE)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        nbytes = math.prod(shape) * ITEMSIZE[dtype]
        header[f"t{i}"] = entry(end, end + nbytes, shape, dtype)
        end += nbytes
    edits = draw(st.lists(st.sampled_from(EDITS), max_size=3, unique=True))
    for edit in edits:
        name, field = (
            draw(st.sampled_from(list(header))),
            draw(st.sampled_from(["dtype", "shape", "data_offsets"])),
        )
        victim = dict(header[name])  # type: ignore[call-overload]
        if edit == "field":
            header[name] = victim | {field: draw(ODD)}
        elif edit == "item":
            header[name] = victim | {field: draw(st.lists(st.integers(0, end + 1), max_size=3))}
        elif edit == "drop":
            header[name] = {key: value for key, value in victim.items() if key != field}
        elif edit == "alias":
            header[draw(st.sampled_from(["t0", "new", "__metadata__"]))] = victim
    text = json.dumps(header)
    if "text" in edits:
        text = text.replace(*draw(st.sampled_from(SWAPS)), draw(st.integers(1, 2)))
    content = bytearray(packed(text.encode(), bytes(range(256)) * (end // 256) + bytes(range(end % 256))))
    if "length" in edits:
        content[:8] = draw(st.integers(0, 2 * len(content)) | st.integers(0, 2**64 - 1)).to_bytes(8, "little")
    if "byte" in edits:
        content[draw(st.integers(0, len(content) - 1))] ^= draw(st.integers(1, 255))
    if "cut" in edits:
        content = content[: draw(st.integers(0, len(content)))] + draw(st.binary(max_size=3))
    return bytes(content)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mutants")
    (folder / "config.json").write_text("{}")
    return folder


@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(content=mutants())
def test_a_mutated_file_is_refused_or_safe_to_read(scratch: Path, content: bytes) -> None:
    (scratch / SINGLE).write_bytes(content)
    try:
        checkpoint = open_checkpoint(scratch)
    except ExportError:
        return
    for name, tensor in checkpoint.tensors.items():
        assert 8 <= tensor.offset <= tensor.offset + tensor.nbytes <= len(content)
        assert checkpoint.read(name).shape == tensor.shape
        assert checkpoint.read(name).nbytes == tensor.nbytes
    # The library is stricter than we are in "-0" only.
    if b"-0" in content:
        return
    theirs = dict(safetensors.deserialize(content))
    assert theirs.keys() == checkpoint.tensors.keys()
    for name, tensor in theirs.items():
        assert checkpoint.read(name).tobytes() == bytes(tensor["data"])
