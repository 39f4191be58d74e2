"""Blocks at their places: what reads what, and what a step carries to the next."""

from dataclasses import dataclass

import pytest
from arch_cases import CASES, Case

from llmexport.export import archs
from llmexport.export.onnx_file import read_model
from llmexport.export.spec import AXES, Attention, Block, Embedding, Layer, Mask, Mlp, Norm, Port, State, Sublayer
from llmexport.export.static import StaticCache
from llmexport.export.trace import SIZES
from llmexport.export.wiring import Wiring

NORM, IDS = Norm(8, 1e-6), Port("input_ids", ("batch", "sequence"), "int64")


@pytest.fixture
def two_states(monkeypatch: pytest.MonkeyPatch) -> Block:
    """A block that reads and gives hidden states, and carries one state that grows and one that does not."""
    monkeypatch.setattr(Block, "kinds", dict(Block.kinds))

    @dataclass(frozen=True)
    class Shift(Block):
        @property
        def inputs(self) -> tuple[Port, ...]:
            return (Port("hidden", ("batch", "sequence", 8)), *(s.past for s in self.states))

        @property
        def outputs(self) -> tuple[Port, ...]:
            return (Port("shifted", ("batch", "sequence", 8)), *(s.present for s in self.states))

        @property
        def states(self) -> tuple[State, ...]:
            last = State(Port("past_token", ("batch", 8)), Port("present_token", ("batch", 8)))
            return (State(Port("past_key", ("batch", "past", 8)), Port("present_key", ("batch", "total", 8))), last)

    return Shift()


def test_a_block_reads_what_is_given_or_what_is_called_like_its_port():
    wiring = Wiring()
    wiring.take(IDS)
    assert wiring.place("embedding", Embedding(9, 8)) == ("hidden",)
    assert wiring.place("first", NORM, ["a"]) == ("a",)
    wiring.place("second", NORM, path="elsewhere.", hidden="a")
    wiring.give(*NORM.outputs)
    steps = wiring.done().assembly.steps
    assert [(s.inputs, s.outputs) for s in steps] == [
        (("input_ids",), ("hidden",)),
        (("hidden",), ("a",)),
        (("a",), ("normed",)),
    ]
    assert [s.path for s in steps] == ["embedding.", "first.", "elsewhere."]


def test_states_are_inputs_and_outputs_of_the_graph_and_carried(two_states: Block):
    wiring = Wiring("decoder")
    wiring.take(Port("hidden", ("batch", "sequence", 8)))
    wiring.place("mix", two_states, ["hidden.1"], state="0")
    wiring.place("again", two_states, state="1", hidden="hidden.1")
    wiring.give(Port("shifted", ("batch", "sequence", 8)))
    graph = wiring.done()
    assert [p.name for p in graph.assembly.inputs] == ["hidden", *graph.carried]
    assert [p.name for p in graph.assembly.outputs] == ["shifted", *graph.carried.values()]
    assert graph.carried == {
        f"past_key_values.{i}.{what}": f"present.{i}.{what}" for i in range(2) for what in ("key", "token")
    }
    assert {p.name: p.shape for p in graph.assembly.inputs}["past_key_values.1.key"] == ("batch", "past", 8)


def test_shared_blocks_are_placed_once_and_read_as_context():
    wiring = Wiring()
    wiring.take(IDS, Port("attention_mask", ("batch", "total"), "int64"))
    wiring.share([Mask(), Mask(window=3), Mask()])
    assert [(s.name, s.outputs) for s in wiring.done().assembly.steps] == [
        ("mask", ("mask",)),
        ("mask_window_3", ("mask_window_3",)),
    ]


def test_what_nothing_makes_cannot_be_read_or_given():
    wiring = Wiring()
    with pytest.raises(KeyError, match="norm reads hidden, which nothing before it makes"):
        wiring.place("norm", NORM)
    with pytest.raises(KeyError, match="give reads normed"):
        wiring.give(*NORM.outputs)


def test_a_value_is_made_once():
    wiring = Wiring()
    wiring.take(Port("hidden", ("batch", "sequence", 8)))
    wiring.place("first", NORM)
    with pytest.raises(KeyError, match="second makes normed again"):
        wiring.place("second", NORM)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_state_of_a_model_is_carried_to_a_place_of_its_type(case: Case):
    arch = archs.load(case.arch)
    for graph in read_model(arch, {**arch.tiny, **case.changes}).graphs:
        past = {p.name: p for p in graph.assembly.inputs if p.name in graph.carried}
        present = {p.name: p for p in graph.assembly.outputs}
        assert len(graph.carried) == sum(len(s.block.states) for s in graph.assembly.steps) == len(past)
        for before, after in graph.carried.items():
            assert past[before].dtype == present[after].dtype
            assert len(past[before].shape) == len(present[after].shape)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_value_is_of_one_use_wherever_it_is_made_and_read(case: Case):
    arch = archs.load(case.arch)
    for graph in read_model(arch, {**arch.tiny, **case.changes}).graphs:
        uses: dict[str, set[str]] = {}
        for port in (*graph.assembly.inputs, *graph.assembly.outputs):
            uses.setdefault(port.name, set()).add(port.use)
        for step in graph.assembly.steps:
            ends = (
                zip(step.inputs, step.block.inputs, strict=True),
                zip(step.outputs, step.block.outputs, strict=True),
            )
            for value, port in (pair for pairs in ends for pair in pairs):
                uses.setdefault(value, set()).add(port.use)
        assert {n: found for n, found in uses.items() if len(found) > 1} == {}
        assert all(uses[before] == uses[after] for before, after in graph.carried.items())


def test_two_blocks_of_a_context_that_give_the_same_are_refused():
    wiring = Wiring()
    masks = (Mask(), Mask(window=4))
    wiring.take(IDS, *(p for p in Mask().inputs if p.name != IDS.name))
    wiring.share(masks)
    attention = Attention(8, 2, 2, 4, rotated=0)
    with pytest.raises(KeyError, match="two blocks of the context of mix give mask"):
        wiring.place("mix", attention, state="0", context=masks, normed="x")


def test_sublayers_that_read_different_ports_of_one_name_are_refused():
    """A decoder's mask is over the past too, an encoder's is not."""
    own, other = Attention(8, 2, 2, 4, rotated=0), Attention(8, 2, 2, 4, rotated=0, cached=False)
    Layer((Sublayer("self_attn", own), Sublayer("mlp", Mlp(8, 16, "silu"))))
    with pytest.raises(ValueError, match=r"different ports of one name, of .*mask"):
        Layer((Sublayer("self_attn", own), Sublayer("cross_attn", other)))


def test_every_axis_has_a_size_of_its_own_to_be_traced_at():
    assert SIZES.keys() == AXES.keys()
    assert len(set(SIZES.values())) == len(AXES)
    assert min(SIZES.values()) > 1


@pytest.mark.parametrize(("slots", "sliding"), [(None, "present.0.key"), (64, "seen_key.0")])
def test_a_layer_that_borrows_reads_the_keys_that_the_last_lender_of_its_kind_sees(slots, sliding):
    """A static cache that slides keeps less than its step sees; the second layer is the only full one that lends."""
    case = next(c for c in CASES if c.name == "gemma4_text-shared-keys")
    named = archs.load(case.arch)
    [graph] = read_model(named, {**named.tiny, **case.changes}, slots and StaticCache(slots)).graphs
    steps = {s.name: s for s in graph.assembly.steps}
    read = [steps[f"layers.{i}"].reads["seen_key"] for i in (2, 3, 4)]
    assert read == [sliding, "present.1.key", "present.1.key"]
    assert {n.split(".")[1] for n in graph.carried} == {"0", "1"}
