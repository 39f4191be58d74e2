"""Static caches: the numbers of transformers, in slots that are written in place."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from arch_cases import DECODERS, FIRST, PRIMARY, SLOTS, Case, others_slow
from decoders import PROMPT, REFUSED, RUNNERS, Decoder, prompt, reference, session, theirs

from llmexport.export import archs, export, manifest, random_checkpoint
from llmexport.export.assembly import parts
from llmexport.export.errors import ExportError
from llmexport.export.onnx_file import read_model
from llmexport.export.spec import Attention, Keys
from llmexport.export.static import StaticCache
from llmexport.validate import validate

DECODE, PIECE = 8, 3
# All that a static cache changes: full layers, windows, chunks, spans, temperatures, states.
AT_ONCE = [c for c in FIRST if c.arch in (*PRIMARY, "gemma2", "gemma3_text", "mistral", "phi3")]
COPIES = {"slots": 1, "window": 2, "state": 2, "recurrence": 2}  # buffers of a state
BEYOND = {"torch": f"{SLOTS} slots has no slot {SLOTS}", "onnxruntime": rf"exceeds max_sequence_length \({SLOTS}\)"}


def wide(mask: np.ndarray) -> np.ndarray:
    """The mask over all slots, as where no shape may change."""
    return np.pad(mask, ((0, 0), (0, SLOTS - mask.shape[1])))


@pytest.mark.parametrize("case", others_slow(DECODERS, AT_ONCE), ids=str)
def test_every_architecture_gives_the_logits_of_transformers(case: Case, tiny_checkpoint, exported) -> None:
    """Batch 2, left padding, a prompt beyond every window, decode steps, and a later piece of several tokens."""
    model = reference(tiny_checkpoint(case))
    ours = [Decoder(exported(case, slots=SLOTS), runner) for runner in RUNNERS]
    ids, mask = prompt()
    positions, cache = np.maximum(mask.cumsum(-1) - 1, 0), None
    for step in range(DECODE + 2):
        made = theirs(model, ids, mask, positions, cache)
        cache = made.past_key_values
        for decoder, given in zip(ours, (mask, wide(mask)), strict=True):
            decoder.check(
                made.logits.numpy(), decoder.step(ids, positions, given), mask.astype(bool) if step == 0 else None
            )
        ids = made.logits.numpy()[:, -1:].argmax(-1) if step < DECODE else prompt()[0][:, :PIECE]
        positions = positions[:, -1:] + 1 + np.arange(ids.shape[1])
        mask = np.concatenate((mask, np.ones_like(ids)), 1)
    assert mask.shape[1] - ids.shape[1] == PROMPT + DECODE + PIECE


@pytest.mark.parametrize("arch", ["gpt_oss", "gemma3_text", "mistral", "llama4"])
def test_windows_that_keep_all_slots_give_the_same_logits(arch: str, exported) -> None:
    """And no state of theirs is copied: each is written in place."""
    last, whole = (exported(arch, slots=SLOTS, window_slots=w) for w in ("last", "all"))
    made = manifest.read(whole)
    assert (manifest.read(last).window_slots, made.window_slots) == ("last", "all")
    uses = {p.use for p in made.graphs[0].assembly.inputs if p.name in made.graphs[0].carried}
    assert uses == {"slots"}
    ids, mask = prompt()
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    decoders = [Decoder(folder, runner) for folder in (last, whole) for runner in RUNNERS]
    for step in range(DECODE + 1):
        first, *others = (d.step(ids, positions, mask) for d in decoders)
        for decoder, found in zip(decoders[1:], others, strict=True):
            decoder.check(first, found, mask.astype(bool) if step == 0 else None)
        ids = first[:, -1:].argmax(-1) if step < DECODE - 1 else prompt()[0][:, :PIECE]
        positions = positions[:, -1:] + 1 + np.arange(ids.shape[1])
        mask = np.concatenate((mask, np.ones_like(ids)), 1)


@pytest.mark.parametrize(
    ("arch", "cache"),
    [
        *((arch, "static") for arch in ("llama", "gpt_oss", "qwen3_5_moe")),
        pytest.param("llama", "static-fused", marks=pytest.mark.slow),
    ],
)
def test_past_and_present_of_use_slots_may_be_one_buffer(arch: str, cache: str, exported) -> None:
    """All other states have two, which change places at every step; no shape changes but that of the tokens."""
    folder = exported(arch, slots=SLOTS, cache=cache)
    plain, bound = Decoder(folder, "onnxruntime"), session(folder)
    ids, mask = prompt()
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    expected = plain.step(ids, positions, mask)
    buffers = {
        n: [onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros_like(a)) for _ in range(COPIES[plain.ports[n].use])]
        for n, a in plain.past.items()
    }
    assert sum(len(b) == 1 for b in buffers.values()) == {"llama": 6, "gpt_oss": 2, "qwen3_5_moe": 2}[arch]
    for _ in range(DECODE):
        binding = bound.io_binding()
        spread = np.broadcast_to(positions, (*plain.ports["position_ids"].shape[:-2], *positions.shape))
        given = {"input_ids": ids, "attention_mask": wide(mask), "position_ids": np.ascontiguousarray(spread)}
        for name, value in given.items():
            binding.bind_cpu_input(name, value)
        for name, pair in buffers.items():
            binding.bind_ortvalue_input(name, pair[0])
            binding.bind_ortvalue_output(plain.carried[name], pair[-1])
            pair.reverse()
        binding.bind_output("logits")
        bound.run_with_iobinding(binding)
        found = binding.copy_outputs_to_cpu()[-1]
        plain.check(expected, found, mask[:, -ids.shape[1] :].astype(bool))
        ids, positions = expected[:, -1:].argmax(-1), positions[:, -1:] + 1
        mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        expected = plain.step(ids, positions, mask)


@pytest.mark.parametrize("arch", ["llama4", "gpt_oss", "qwen3_5_moe", "gemma3_text"])
def test_a_row_in_a_batch_with_a_longer_one_is_as_alone(arch: str, exported) -> None:
    """Each row is written from where its own tokens end, as requests that came at other times are."""
    folder = exported(arch, slots=SLOTS)
    alone = [Decoder(folder, "onnxruntime") for _ in range(2)]
    ids, mask = prompt(padding=0)
    masks = [mask[:1], mask[1:, :21]]
    for decoder, row, m in zip(alone, ids, masks, strict=True):
        decoder.step(row[None, : m.shape[1]], m.cumsum(-1) - 1, m)
    together = Decoder(folder, "onnxruntime")
    together.past = {n: np.concatenate([d.past[n] for d in alone]) for n in alone[0].past}
    for _ in range(3):
        masks = [np.pad(m, ((0, 0), (0, 1)), constant_values=1) for m in masks]
        positions = np.array([[m.shape[1] - 1] for m in masks])
        found = together.step(ids[:, :1], positions, np.concatenate([wide(m) for m in masks]))
        for i, decoder in enumerate(alone):
            expected = decoder.step(ids[i : i + 1, :1], positions[i : i + 1], masks[i])
            decoder.check(expected, found[i : i + 1])


@pytest.mark.parametrize("runner", RUNNERS)
def test_padding_that_is_not_on_the_left_is_refused(runner: str, exported) -> None:
    ids, mask = prompt(padding=0)
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    for hidden in (slice(-4, None), slice(9, 16)):
        padded = mask.copy()
        padded[1, hidden] = 0
        with pytest.raises(Exception, match=REFUSED):
            Decoder(exported("llama", slots=SLOTS), runner).step(ids, positions, padded)
    # A row that has not begun is padding alone.
    mask[1] = 0
    assert np.isfinite(Decoder(exported("llama", slots=SLOTS), runner).step(ids, positions, mask)).all()


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_step_beyond_the_last_slot_fails(runner: str, exported) -> None:
    ids, mask = prompt(SLOTS)
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    decoder = Decoder(exported("llama", slots=SLOTS), runner)
    decoder.step(ids, positions, mask)
    with pytest.raises(Exception, match=BEYOND[runner]):
        decoder.step(ids[:, :1], positions[:, -1:] + 1, np.pad(mask, ((0, 0), (0, 1)), constant_values=1))


def attentions(arch: str, slots: int, windows: float = 1, **changes: Any) -> list[Attention]:
    named = archs.load(arch)
    steps = read_model(named, {**named.tiny, **changes}, StaticCache(slots, windows)).steps
    return [p.block for s in steps for p in parts(s) if isinstance(p.block, Attention)]


def test_a_layer_with_a_window_keeps_the_window_and_any_other_all_slots() -> None:
    assert [a.keys for a in attentions("gpt_oss", 64)] == [Keys(8, slides=True), Keys(64), Keys(8, slides=True)]
    assert {a.keys for a in attentions("mistral", 64, sliding_window=64)} == {Keys(64)}
    assert {a.keys for a in attentions("mistral", 65, sliding_window=64)} == {Keys(64, slides=True)}
    chunks = archs.load("llama4").tiny["attention_chunk_size"]
    assert {a.keys for a in attentions("llama4", 64)} == {Keys(chunks, slides=True), Keys(64)}
    for arch in ("gpt_oss", "mistral", "llama4"):
        assert {a.keys for a in attentions(arch, 64, math.inf)} == {Keys(64)}


def test_a_layer_with_a_window_keeps_slots_that_are_few_windows() -> None:
    assert {a.keys for a in attentions("mistral", 64, 4, sliding_window=16)} == {Keys(64)}
    assert {a.keys for a in attentions("mistral", 65, 4, sliding_window=16)} == {Keys(16, slides=True)}


@pytest.mark.parametrize(
    ("slots", "kind", "kept"),
    [
        (32, {"target": "onnxruntime"}, "all"),
        (33, {"target": "onnxruntime"}, "last"),
        (32, {"target": "onnxruntime", "window_slots": "last"}, "last"),
        (32, {}, "last"),
    ],
)
def test_on_onnx_runtime_windows_keep_slots_that_are_few(slots: int, kind: dict[str, str], kept: str, tmp_path) -> None:
    made = export(None, tmp_path / "out", arch="mistral", cache="static", max_tokens=slots, **kind)
    assert (archs.load("mistral").tiny["sliding_window"], made.window_slots) == (8, kept)


def test_a_static_cache_is_of_one_shape_and_the_graph_scatters_into_every_slotted_one(exported) -> None:
    made = manifest.read(exported("gpt_oss", slots=SLOTS))
    [graph] = made.graphs
    inputs, outputs = ({p.name: p for p in ports} for ports in (graph.assembly.inputs, graph.assembly.outputs))
    for before, after in graph.carried.items():
        assert inputs[before].shape == outputs[after].shape
        assert not {d for d in inputs[before].shape[1:] if isinstance(d, str)}
    model = onnx.load(made.folder / graph.file, load_external_data=False)
    scattered = {(n.input[0], n.output[0]) for n in model.graph.node if n.op_type == "TensorScatter"}
    assert scattered == {(b, a) for b, a in graph.carried.items() if inputs[b].use == "slots"}
    assert (made.opset, made.max_tokens) == (24, SLOTS)
    said = json.loads((made.folder / manifest.NAME).read_bytes())
    assert (said["cache"], said["max_tokens"], said["window_slots"]) == ("static", SLOTS, "last")


def test_a_dynamic_export_is_as_it_was(exported) -> None:
    made = manifest.read(exported("llama"))
    assert (made.opset, made.max_tokens) == (23, None)
    said = json.loads((made.folder / manifest.NAME).read_bytes())
    assert (said["cache"], said["max_tokens"], said["window_slots"]) == ("dynamic", None, "last")


def test_an_encoder_has_no_cache(tiny_checkpoint, tmp_path) -> None:
    with pytest.raises(ExportError, match=r"--cache static: this model .* keeps no cache"):
        export(tiny_checkpoint("bert"), tmp_path / "out", cache="static", max_tokens=64)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("cache", "slots", "said"),
    [
        ("static", None, "add --max-tokens"),
        ("dynamic", 64, "add --cache static"),
        ("static", 0, "--max-tokens is 0: make it 16 to"),
        ("static", -1, "--max-tokens is -1: make it 16 to"),
        ("static", 2**40, "make it 16 to"),
        ("static-fused", None, "add --max-tokens"),
        ("static-fused", 8, "--max-tokens is 8: make it 16 to"),
        ("paged", None, "cache is 'paged': choose one of dynamic, static, static-fused"),
    ],
)
def test_a_cache_that_cannot_be_is_refused(cache: str, slots: int | None, said: str, tmp_path) -> None:
    with pytest.raises(ExportError, match=said):
        export(None, tmp_path / "out", arch="llama", cache=cache, max_tokens=slots)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ({"window_slots": "all"}, "--window-slots all is of a static cache: add --cache static"),
        (
            {"window_slots": "some", "cache": "static", "max_tokens": 64},
            "window_slots is 'some': choose one of auto, last, all",
        ),
    ],
)
def test_what_windows_keep_is_said_of_a_static_cache_alone(kind: dict[str, Any], said: str, tmp_path) -> None:
    with pytest.raises(ExportError, match=said):
        export(None, tmp_path / "out", arch="mistral", **kind)


def test_a_cache_that_no_op_can_write_is_refused(tiny_checkpoint, tmp_path) -> None:
    said = "--cache static-fused: no layer here turns q and k by RoPE and writes them into slots: take --cache static"
    with pytest.raises(ExportError, match=said):
        export(tiny_checkpoint("gpt2"), tmp_path / "out", cache="static-fused", max_tokens=64)
    assert not (tmp_path / "out").exists()


def test_a_cache_that_an_op_writes_is_not_for_onnx_runtime(tiny_checkpoint, tmp_path) -> None:
    said = "--cache static-fused is for TensorRT with our plugins: for ONNX Runtime take --cache static"
    with pytest.raises(ExportError, match=said):
        export(tiny_checkpoint("llama"), tmp_path / "out", cache="static-fused", max_tokens=64, target="onnxruntime")


def test_an_op_writes_a_cache_as_the_operators_do(exported) -> None:
    """Bit by bit in ONNX Runtime and in PyTorch, each row from its own slot on; and they carry the same states."""
    folders = [exported("gemma", slots=SLOTS, cache=cache) for cache in ("static", "static-fused")]
    ops = [manifest.read(folder).graphs[0].ops for folder in folders]
    assert ("QkNormRopeWrite" in ops[0], "QkNormRopeWrite" in ops[1]) == (False, True)
    for runner in RUNNERS:
        decoders = [Decoder(folder, runner) for folder in folders]
        ids, mask = prompt()
        positions = np.maximum(mask.cumsum(-1) - 1, 0)
        for _ in range(3):
            one, other = (d.step(ids, positions, mask) for d in decoders)
            assert np.array_equal(one, other)
            assert all(np.array_equal(a, decoders[1].past[n]) for n, a in decoders[0].past.items())
            ids, positions = one[:, -1:].argmax(-1), positions[:, -1:] + 1
            mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)


@pytest.mark.parametrize("window_slots", ["last", "all"])
def test_what_quantisation_moved_is_told_of_either_kind_of_window(window_slots: str, tmp_path: Path) -> None:
    random_checkpoint.write(archs.load("mistral"), tmp_path / "ck")
    kind = {"cache": "static", "max_tokens": 160, "window_slots": window_slots}
    made = export(tmp_path / "ck", tmp_path / "out", quantize="int8", **kind)
    assert made.window_slots == window_slots
    moved = validate(tmp_path / "out", rungs=["onnxruntime"], reference=tmp_path / "ck").moved
    assert moved
    assert 0 < moved.kl_mean < 0.01


def test_a_manifest_from_before_static_caches_reads_as_a_dynamic_one(exported) -> None:
    """Format 2 of it said nothing of caches."""
    later = {"cache", "max_tokens", "window_slots", "keys", "static"}

    def earlier(data: Any) -> Any:
        if isinstance(data, dict):
            return {k: earlier(v) for k, v in data.items() if k not in later}
        return [earlier(v) for v in data] if isinstance(data, list) else data

    folder = exported("llama4")
    data = json.loads((folder / manifest.NAME).read_bytes())
    assert data["blocks"] != earlier(data["blocks"])
    assert manifest.from_record(folder, earlier(data)).blocks == manifest.read(folder).blocks
