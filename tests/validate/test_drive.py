"""An export is driven graph by graph and stage by stage."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from arch_cases import SLOTS
from rungs import EVERYWHERE
from two_graphs import in_two, rebuilt, with_source

from llmexport.export import manifest, onnx_file
from llmexport.export.exported import Export
from llmexport.export.spec import Embedding
from llmexport.validate import drive, feeds, ladder, stages, thresholds
from llmexport.validate.compare import Mismatch, compare
from llmexport.validate.feeds import Feed
from llmexport.validate.tolerance import TOLERANCE

pytestmark = pytest.mark.usefixtures("up_to_onnx_runtime")

PYTORCH, FILE, BLOCKS = "PyTorch / transformers", "ONNX Runtime / PyTorch", "blocks: ONNX Runtime / PyTorch"


@pytest.fixture(scope="module")
def sourced(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Export:
    folder = tmp_path_factory.mktemp("sourced") / "out"
    return onnx_file.write(rebuilt("llama", tiny_checkpoint("llama"), with_source), folder)


def test_a_graph_that_reads_every_step_beside_one_with_states_climbs_as_one_model(tiny_checkpoint, tmp_path) -> None:
    export = onnx_file.write(rebuilt("llama", tiny_checkpoint("llama"), in_two), tmp_path / "out")
    rungs = {r.name: r for r in ladder.climb(export, rungs=EVERYWHERE).rungs}
    assert {n: (r.status, r.note) for n, r in rungs.items()} == dict.fromkeys((PYTORCH, BLOCKS, FILE), ("pass", ""))
    steps = {d["step"] for d in rungs[BLOCKS].details}
    assert steps == {f"{g.name}: {s.name}" for g in export.graphs for s in g.assembly.steps}


def test_a_source_is_run_once_for_a_prompt_and_every_stage_reads_what_it_made(sourced: Export) -> None:
    """Against ONNX Runtime called by hand."""
    prompt = stages.prompt(sourced, tokens=21)
    step = prompt.then("decode 1", "decode", prompt.ids[:, :1])
    run = {g.name: onnxruntime.InferenceSession(sourced.folder / g.file) for g in sourced.graphs}
    read: dict[str, list[Feed]] = {"source": [], "decoder": []}

    class Heard:
        """A runner that remembers what it is fed."""

        def __init__(self, graph: str) -> None:
            self.graph = graph

        def infer(self, feed: Feed, check_inputs: bool) -> Feed:
            read[self.graph].append(feed)
            outputs = [o.name for o in run[self.graph].get_outputs()]
            return dict(zip(outputs, run[self.graph].run(outputs, feed), strict=True))

        def last_inference_time(self) -> float:
            return 0.0

    driver = drive.Driver(sourced, {name: Heard(name) for name in run})
    found = [driver.run(stage) for stage in (prompt, step, prompt)]
    assert [len(feeds) for feeds in read.values()] == [2, 3]
    assert {n: a.shape for n, a in read["source"][0].items()} == {"source_mask": (2, 11), "last_id": (2, 1)}
    temperature = run["source"].run(["temperature"], read["source"][0])[0]
    assert np.ptp(temperature) > 0
    given = [{"input_ids": s.ids, "position_ids": s.positions, "attention_mask": s.mask} for s in (prompt, step)]
    past = {n: a for n, a in read["decoder"][0].items() if n.startswith("past_key_values")}
    for stage, outputs in zip(given, found, strict=False):
        expected = run["decoder"].run(["logits"], {**stage, **past, "temperature": temperature})[0]
        assert compare(expected, outputs["logits"]).excess(TOLERANCE["float32"]) <= 1
        past = {n: outputs[n.replace("past_key_values", "present")] for n in past}
    assert compare(found[0]["logits"], found[2]["logits"]).max_abs == 0


def test_a_model_with_a_source_agrees_in_pytorch_and_onnx_runtime(sourced: Export) -> None:
    rungs = {r.name: (r.status, r.note) for r in ladder.climb(sourced, rungs=EVERYWHERE).rungs}
    assert rungs == {
        PYTORCH: ("not run", "nobody knows what transformers calls source_mask, last_id"),
        BLOCKS: ("pass", ""),
        FILE: ("pass", ""),
    }


def test_an_encoder_is_run_on_padding_on_either_side_and_decodes_nothing(exported) -> None:
    export = manifest.read(exported("bert"))
    with drive.in_torch(export) as model:
        script, run, recorded = drive.record(model, stages.prompt(export))
    assert [(s.name, s.kind) for s in script] == [("prompt", "opening"), ("prompt, padded right", "opening")]
    assert recorded.keys() == {s.name for s in script}
    left, right = (s.real[1] for s in script)
    assert (left[0], left[-1], right[0], right[-1]) == (False, True, True, False)
    assert len(set(script[0].types.flat)) == 3
    assert run.medians.keys() == {"prefill"}


def test_an_encoder_takes_no_more_tokens_than_it_has_positions(exported) -> None:
    export = manifest.read(exported("bert"))
    assert stages.prompt(export, tokens=320).ids.shape == (2, 320)
    with pytest.raises(Mismatch, match="tokens 321: this model has positions for 320: name as many or fewer"):
        stages.prompt(export, tokens=321)


def test_a_script_of_a_decoder_is_a_prompt_greedy_tokens_and_a_piece(exported) -> None:
    export = manifest.read(exported("llama"))
    with drive.in_torch(export) as model:
        script, run, recorded = drive.record(model, stages.prompt(export))
    assert [s.kind for s in script] == ["opening", *["decode"] * drive.DECODE_STEPS, "piece"]
    assert [s.past for s in script] == [0, *range(67, 67 + drive.DECODE_STEPS + 1)]
    assert recorded.keys() == {"prompt", "last"}
    for before, stage, outputs in zip(script, script[1:-1], run.outputs, strict=False):
        assert np.array_equal(stage.ids, outputs["logits"][:, -1:].argmax(-1))
        assert np.array_equal(stage.positions, before.positions[:, -1:] + 1)
    # The states that a wrong one would put off, once.
    assert [bool(run.carried & outputs.keys()) for outputs in run.outputs] == [s.kind == "piece" for s in script]


class Cold:
    """A model whose first call takes ten seconds, and every later one two."""

    seconds = 10.0
    calls = 0

    def run(self, stage: stages.Stage) -> Feed:
        self.seconds = 2.0 if self.calls else 10.0
        self.calls += 1
        return {}


def test_a_first_call_is_in_no_median() -> None:
    ids = np.zeros((1, 3), np.int64)
    script = (stages.opening(ids, ids + 1),)
    nothing = types.SimpleNamespace(graphs=())
    assert drive.follow(Cold(), nothing, script, timed=True).medians == {"prefill": 2.0}
    assert drive.follow(Cold(), nothing, script).medians == {}


def test_a_quick_prompt_is_timed_several_times_and_a_slow_one_three_times() -> None:
    prompt = stages.opening(np.zeros((1, 3), np.int64), np.ones((1, 3), np.int64))
    slow, quick = Cold(), Cold()
    slow.calls = 1
    assert drive.time_again(slow, prompt) == [2.0] * drive.LEAST_CALLS
    quick.run = lambda stage: setattr(quick, "seconds", 0.001) or {}
    assert drive.time_again(quick, prompt) == [0.001] * drive.WARM_CALLS


def test_ids_are_such_that_every_table_takes_them():
    blocks = [Embedding(100, 8, types=3), Embedding(1000, 8)]
    assert {use: feeds.limits(blocks)[use] for use in ("tokens", "token_types")} == {"tokens": 100, "token_types": 3}


def test_a_step_beyond_a_static_cache_is_refused_and_no_prompt_leaves_its_steps_no_room(exported) -> None:
    export = manifest.read(exported("llama", slots=40))
    with pytest.raises(Mismatch, match="--tokens 30: a static cache of 40 has room for a prompt of 29: name fewer"):
        stages.prompt(export, tokens=30)
    prompt = stages.prompt(export)
    assert prompt.ids.shape == (2, 29)
    stage = prompt.then("last", "piece", np.zeros((2, 11), np.int64))
    with drive.in_torch(export) as driver:
        driver.run(prompt)
        driver.run(stage)
        with pytest.raises(Mismatch, match="again ends at token 41, the static cache has 40: export with"):
            driver.run(stage.then("again", "decode", np.zeros((2, 1), np.int64)))


def test_a_past_stands_in_the_first_slots_and_a_windows_at_its_end(exported) -> None:
    [graph] = manifest.read(exported("gpt_oss", slots=SLOTS)).graphs
    sizes = thresholds.block_sizes(graph.assembly.steps[-1].block)[0] | {"past": 5}
    held, laid = feeds.earlier(graph, "float32", sizes), feeds.states(graph, "float32", sizes)
    assert held.keys() == laid.keys() == graph.carried.keys()
    uses = {p.name: p.use for p in graph.assembly.inputs}
    for name, tokens in held.items():
        places = slice(0, 5) if uses[name] == "slots" else slice(-5, None)
        assert np.array_equal(laid[name][:, :, places], tokens)
        assert np.count_nonzero(laid[name]) == tokens.size
    longer = feeds.states(graph, "float32", sizes | {"past": 30})["past_key_values.0.key"]
    whole = feeds.earlier(graph, "float32", sizes | {"past": 30})["past_key_values.0.key"]
    assert np.array_equal(longer, whole[:, :, -8:])
