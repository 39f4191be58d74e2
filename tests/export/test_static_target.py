"""`--target onnxruntime --cache static`: slots written in place by one operator, and the logits of transformers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from arch_cases import Case
from decoders import Decoder, prompt, reference, theirs
from reseal import reseal

from llmexport.export import archs, onnx_file
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.exported import Export
from llmexport.export.graph_file import cut_step, load
from llmexport.run.prompts import opening
from llmexport.run.session import RuntimeSession, decode, greedy
from llmexport.validate import validate
from llmexport.validate.compare import compare
from llmexport.validate.judge import feeds_alone
from llmexport.validate.runtime import SessionOptions, open_session
from llmexport.validate.tolerance import TOLERANCE

pytestmark = pytest.mark.usefixtures("static_caches")
SLOTS, DECODE, PIECE = 59, 8, 3
PASSES = ("lower_static_attention", "lower_attention", "lower_sink_attention")
# How many layers have slots, how many a window that moves up, which are lowered as a growing cache is, and how many
# spans of keys, of either kind. Plain, biases and windows, norms of heads before RoPE, windows, pairs side by side,
# part of a head, linear attention between, experts; sinks and windows, soft caps and windows; ALiBi's biases; norms of
# heads behind RoPE, temperatures, both of those and chunks.
LOWERED = {
    "llama": (3, 0, 0),
    "qwen2": (1, 2, 0),
    "qwen3": (3, 0, 0),
    "gemma3_text": (1, 2, 0),
    "cohere": (3, 0, 0),
    "stablelm": (3, 0, 0),
    "qwen3_5": (1, 0, 0),
    "mixtral": (3, 0, 0),
    "gpt_oss": (0, 0, 3),
    "gemma2": (0, 0, 3),
    "bloom": (3, 0, 0),
    "hunyuan_v1_dense": (3, 0, 0),
    "ministral3": (3, 0, 0),
    "llama4": (1, 3, 0),
}


# How many layers attend over latents: RoPE of pairs side by side and of halves, none.
LATENT = {"deepseek_v2": 3, "deepseek_v3": 3, "glm4_moe_lite": 3, "kimi_linear": 1}


@pytest.fixture
def lowered(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Export]:
    def make(case: Case | str, slots: int = SLOTS, **kind: str) -> Export:
        checkpoint, arch = open_checkpoint(tiny_checkpoint(case)), case.arch if isinstance(case, Case) else case
        static = {"cache": "static", "max_tokens": slots, **kind}
        request = onnx_file.Request(archs.load(arch), checkpoint, target="onnxruntime", **static)
        return onnx_file.write(request, tmp_path / f"out of {slots}")

    return make


WINDOWS = {"qwen2": 2, "gemma3_text": 2, "gpt_oss": 2, "gemma2": 2}  # how many layers have one
# Nodes that a step runs beside those of its layers, as each takes about two microseconds.
BESIDE = {"llama": 64, "gpt_oss": 71}


@pytest.mark.parametrize("arch", BESIDE)
def test_a_step_runs_few_nodes_beside_its_layers(arch, lowered, tmp_path):
    export, options = lowered(arch), SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    open_session(load(export, export.graphs[0]), export.folder, options)
    nodes = onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node
    assert len([n for n in nodes if not n.output[0].startswith(("layers.", "present."))]) <= BESIDE[arch]


def wide(mask: np.ndarray) -> np.ndarray:
    """The mask over all slots."""
    return np.pad(mask, ((0, 0), (0, SLOTS - mask.shape[1])))


@pytest.mark.parametrize("arch", LOWERED)
@pytest.mark.parametrize("window_slots", ["last", "all"])
def test_it_gives_the_logits_of_transformers(arch, window_slots, lowered, tiny_checkpoint):
    full, windows, spans = LOWERED[arch]
    if window_slots == "all" and not windows and not spans:
        pytest.skip("it has no windows")
    export = lowered(arch, window_slots=window_slots)
    done = [export.graphs[0].fusions[name] for name in PASSES]
    counts = (full, windows, spans) if window_slots == "last" else (full + windows, 0, spans)
    assert (tuple(f.count for f in done), [f.refused for f in done]) == (counts, [[], [], []])
    graph = onnx.load(export.folder / "model.onnx", load_external_data=False).graph
    assert not [n for n in graph.node if n.op_type == "TensorScatter"]
    if window_slots == "all":
        branches = [onnx.helper.get_node_attr_value(n, "then_branch") for n in graph.node if n.op_type == "If"]
        said = [a.i for b in branches for a in b.node[0].attribute if a.name == "local_window_size"]
        assert said == [archs.load(arch).tiny.get("sliding_window")] * WINDOWS.get(arch, 0)
    check_logits(export, tiny_checkpoint(arch))


@pytest.mark.parametrize("arch", LATENT)
def test_attention_over_latents_gives_the_logits_of_transformers(arch, lowered, tiny_checkpoint):
    export = lowered(arch)
    fused = export.graphs[0].fusions["lower_latent_attention"]
    assert (fused.count, fused.refused) == (LATENT[arch], [])
    check_logits(export, tiny_checkpoint(arch))


# Heads of 12 and 4, as OpenLLaMA 3B has them of 100.
HEADS = (
    Case("llama", "llama-heads-of-12", {"head_dim": 12}),
    Case("mistral", "mistral-heads-of-12", {"head_dim": 12}),
    Case("gpt_oss", "gpt-oss-heads-of-12", {"head_dim": 12}),
    Case("bloom", "bloom-heads-of-4", {"n_head": 8}),
)


@pytest.mark.parametrize("case", HEADS, ids=str)
@pytest.mark.parametrize("window_slots", ["last", "all"])
def test_heads_of_a_size_that_the_operator_does_not_take_give_the_logits_of_transformers(
    case, window_slots, lowered, tiny_checkpoint
):
    """It takes multiples of 8, and stops at others, when it runs."""
    if window_slots == "all" and case.arch in ("llama", "bloom"):
        pytest.skip("it has no windows")
    export = lowered(case, window_slots=window_slots)
    fusions = export.graphs[0].fusions
    refused = [why for name in PASSES for _, why in fusions[name].refused]
    said = f"its heads are of size {4 if case.arch == 'bloom' else 12}, which is no multiple of 8"
    moves_up = case.arch == "mistral" and window_slots == "last"
    assert (refused.count(said), fusions["lower_attention"].count) == ((0, 3) if moves_up else (3, 0))
    check_logits(export, tiny_checkpoint(case))


@pytest.mark.parametrize("arch", ["mistral", "deepseek_v3", "bloom", "gpt_oss"])
def test_who_opens_it_reads_no_warning(arch, lowered, capfd):
    folder = lowered(arch).folder
    capfd.readouterr()
    onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert capfd.readouterr().err == ""


def check_logits(export: Export, checkpoint: Path) -> None:
    """Batch 2, left padding, a prompt beyond every window, decode steps, a later piece of several tokens, and one of a
    row alone."""
    model, decoder = reference(checkpoint), Decoder(export.folder, "onnxruntime")
    ids, mask = prompt()
    positions, cache = np.maximum(mask.cumsum(-1) - 1, 0), None
    for step in range(DECODE + 2):
        made = theirs(model, ids, mask, positions, cache)
        cache = made.past_key_values
        found = decoder.step(ids, positions, wide(mask))
        decoder.check(made.logits.numpy(), found, mask.astype(bool) if step == 0 else None)
        ids = made.logits.numpy()[:, -1:].argmax(-1) if step < DECODE else prompt()[0][:, :PIECE]
        positions = positions[:, -1:] + 1 + np.arange(ids.shape[1])
        mask = np.concatenate((mask, np.ones_like(ids)), 1)


@pytest.mark.parametrize("arch", ["llama", "qwen3_5", "gpt_oss", "deepseek_v3"])
def test_a_row_in_a_batch_with_a_longer_one_is_as_alone_and_its_later_piece_is_as_transformers(
    arch, lowered, tiny_checkpoint
):
    folder, model = lowered(arch).folder, reference(tiny_checkpoint(arch))
    ids, _ = prompt(padding=0)
    ends, together = (37, 21), Decoder(folder, "onnxruntime")
    alone = [Decoder(folder, "onnxruntime") for _ in ends]
    for decoder, row, end in zip(alone, ids, ends, strict=True):
        cache = None
        # The second piece begins at slot 9.
        for first, last in ((0, 9), (9, end)):
            given = row[None, first:last], np.ones((1, last), np.int64), np.arange(first, last)[None]
            made = theirs(model, *given, cache)
            cache = made.past_key_values
            decoder.check(made.logits.numpy(), decoder.step(given[0], given[2], wide(given[1])))
    together.past = {n: np.concatenate([d.past[n] for d in alone]) for n in alone[0].past}
    for step in range(3):
        positions = np.array(ends)[:, None] + step
        mask = (np.arange(SLOTS) <= positions).astype(np.int64)
        found = together.step(ids[:, :1], positions, mask)
        for i, decoder in enumerate(alone):
            decoder.check(decoder.step(ids[i : i + 1, :1], positions[i : i + 1], mask[i : i + 1]), found[i : i + 1])


def test_many_slots_are_lowered_as_few(lowered):
    """Of more than 8192 the trace does not fold their numbers' shape."""
    ids, mask = prompt()
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    few, many = (lowered("llama", slots=n) for n in (SLOTS, 8193))
    assert many.graphs[0].fusions["lower_static_attention"].count == LOWERED["llama"][0]
    first, other = (Decoder(e.folder, "onnxruntime").step(ids, positions, mask) for e in (few, many))
    assert np.array_equal(first, other)


def test_a_step_beyond_the_last_slot_fails(lowered):
    ids, mask = prompt(SLOTS)
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    decoder = Decoder(lowered("llama").folder, "onnxruntime")
    decoder.step(ids, positions, mask)
    with pytest.raises(Exception, match="GroupQueryAttention"):
        decoder.step(ids[:, :1], positions[:, -1:] + 1, np.pad(mask, ((0, 0), (0, 1)), constant_values=1))


def test_generate_keeps_one_buffer_and_finds_the_same_tokens(lowered, exported, tiny_checkpoint):
    export = lowered("qwen3", slots=64)
    session, stage, addresses = RuntimeSession(export), opening(prompt()[0]), set()
    for _ in range(3):
        scores = session.run(stage)
        addresses.add(tuple(v.data_ptr() for held in session._carried.values() for v in held.values()))
        stage = stage.then("decode", "decode", scores.argmax(-1)[:, None])
    assert len(addresses) == 1
    plain = onnx_file.Request(archs.load("qwen3"), open_checkpoint(tiny_checkpoint("qwen3")))
    other = onnx_file.write(plain, export.folder.parent / "plain")
    sessions = [decode(RuntimeSession(e), prompt()[0], greedy) for e in (export, other)]
    for _ in range(20):
        ours, expected = (next(tokens) for tokens in sessions)
        assert np.array_equal(ours, expected)


@pytest.mark.parametrize("arch", ["qwen3", "deepseek_v3", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_pieces_of_several_rows_are_written_into_one_buffer(arch, lowered, tiny_checkpoint):
    plain, export = onnx_file.Request(archs.load(arch), open_checkpoint(tiny_checkpoint(arch))), lowered(arch, slots=64)
    sessions = [RuntimeSession(e) for e in (export, onnx_file.write(plain, export.folder.parent / "plain"))]
    pieces = (prompt()[0][:, :tokens] for tokens in (1, 3, 2, 1))
    for stage in accumulate(pieces, lambda s, ids: s.then("decode", "decode", ids), initial=opening(prompt()[0])):
        ours, expected = (s.run(stage) for s in sessions)
        assert compare(expected, ours).excess(TOLERANCE["float32"]) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["qwen3", "gpt_oss", "deepseek_v3"])
def test_layers_alone_on_what_is_drawn_for_them_are_as_in_the_portable_form(arch, lowered, tiny_checkpoint):
    export = lowered(arch)
    request = onnx_file.Request(
        archs.load(arch), open_checkpoint(tiny_checkpoint(arch)), cache="static", max_tokens=SLOTS
    )
    both = [(e, load(e, e.graphs[0])) for e in (export, onnx_file.write(request, export.folder.parent / "portable"))]
    for step in (s for s in export.graphs[0].assembly.steps if s.name.startswith("layers.")):
        for _, feed in feeds_alone(step, "float32", 0):
            ours, expected = (open_session(cut_step(m, step, "float32"), e.folder).run(None, feed)[0] for e, m in both)
            assert compare(expected, ours).excess(TOLERANCE["float32"]) <= 1


WHOLE = [("gemma3_text", "float32"), ("gpt_oss", "float32"), ("qwen3", "float16")]
WHOLE += [pytest.param(a, "float16", marks=pytest.mark.slow) for a in ("gpt_oss", "gemma2")]


@pytest.mark.parametrize(("arch", "dtype"), WHOLE)
def test_it_is_validated(arch, dtype, lowered):
    export = lowered(arch, slots=160, dtype=dtype)
    assert tuple(export.graphs[0].fusions[name].count for name in PASSES) == LOWERED[arch]
    rungs = {r.key: r for r in validate(export.folder).rungs}
    assert [rungs[k].status for k in ("transformers", "blocks", "onnxruntime")] == ["pass"] * 3


def test_a_fault_where_no_row_is_padded_is_found_by_the_prompt_without_padding(lowered):
    export = lowered("llama", slots=160)
    model = onnx.load(export.folder / "model.onnx", load_external_data=False)
    for node in (n for n in model.graph.node if n.name.endswith("attention/slots")):
        [attend] = onnx.helper.get_node_attr_value(node, "then_branch").node
        next(a for a in attend.attribute if a.name == "scale").f *= 2
    onnx.save(model, export.folder / "model.onnx")
    reseal(export.folder)
    [rung] = [r for r in validate(export.folder, rungs=["onnxruntime"]).rungs if r.key == "onnxruntime"]
    wrong = {d["step"] for d in rung.details if d["difference"].excess(d["allowed"]) > 1}
    # After the prompt, steps of decode and a piece.
    assert (rung.status, wrong) == ("fail", {DECODE + 2})


ALONE = [
    ("deepseek_v3", "lower_latent_attention", "its mask may show keys that are written behind the query's"),
    ("llama", "lower_static_attention", "its mask may show keys that are written behind the query's"),
    ("gpt_oss", "lower_sink_attention", "its keys may end elsewhere than the step that is written"),
]


@pytest.mark.parametrize(("arch", "lowering", "why"), ALONE)
def test_a_block_whose_mask_or_span_is_given_is_left_and_named(arch, lowering, why, lowered):
    fused = lowered(arch, block="layers.0").graphs[0].fusions[lowering]
    assert (fused.count, [said for _, said in fused.refused]) == (0, [why])


@pytest.mark.parametrize(("arch", "count"), [("chatglm_6b", 3), ("gpt_oss", 0)])
def test_attention_that_sees_later_keys_is_left_and_named_and_with_spans_is_no_candidate(arch, count, lowered):
    fused = lowered(arch).graphs[0].fusions["lower_static_attention"]
    assert (fused.count, len(fused.refused)) == (0, count)
