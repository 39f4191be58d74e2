"""The kernels that norm, multiply by a router's weights and route, against the ops one after another, in clusters and
without.

Imports neither torch nor onnx: test_sanitizers.py runs it under sanitizers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from kernel_numbers import HALVES, Values, near, random
from native import ORDERS
from pairwise import pairwise
from plugin_host import DTYPES, Machine, computed, lay_out
from plugin_memory import GpuMemory

from llmexport.plugins.host import Refused
from llmexport.plugins.shared_route import SLOTS

SWITCH = "LLMEXPORT_SM90A"
NORM = {"epsilon": 1e-5, "weight_offset": 0.0, "round_before_weight": False}
NONE, ALONE, GATED = "NormedMoeRoute", "NormedSharedMoeRoute", "NormedGatedSharedMoeRoute"
PLUGINS = (NONE, ALONE, GATED)


@dataclass(frozen=True)
class Case:
    """A router of E experts for [B, T, C], of which K are chosen and `more` are always there."""

    C: int
    E: int
    K: int
    T: int = 3
    B: int = 1
    plugin: str = NONE
    dtype: str = "bf16"
    wide: bool = False
    correction: bool = False
    scoring: str = "softmax"
    groups: int = 1
    more: int = 2
    exact: bool = False  # whether all sums are exact, so that every bit of 16 is known

    @property
    def route(self) -> dict[str, Any]:
        said = {"top_k": self.K, "scoring": self.scoring, "renormalise": True, "scale": 1.5, "group_best": 2}
        return {**said, "groups": self.groups, "groups_kept": max(self.groups // 2, 1)}

    @property
    def slots(self) -> dict[str, int]:
        return {} if self.plugin == NONE else {SLOTS: self.K + self.more}

    @property
    def is_exact(self) -> bool:
        """In fp32 a norm of 1 may be one by a unit in the last place, which unties logits."""
        return self.exact and self.dtype in HALVES

    def inputs(self) -> list[Values]:
        """Exact ones have rows of 1 and -1, whose norms are these, and weights of few digits: logits tie."""
        draw, row = np.random.default_rng(self.C + self.E), (self.B, self.T, self.C)
        rows, count = self.E + (self.plugin == GATED), self.C
        if self.is_exact:
            signs = draw.choice([-1.0, 1.0], row)
            x, residual = 3 * signs, -2 * signs
            norm, router = draw.choice([0.5, 1.0, 2.0], count), draw.integers(-1, 2, (rows, count)) / 8.0
            bias, correction = draw.integers(-2, 3, self.E) / 4, draw.integers(0, 2, self.E) / 4
        else:
            x, residual, norm = (draw.standard_normal(s) for s in (row, row, (count,)))
            router = draw.standard_normal((rows, count)) * 3 / np.sqrt(count)
            bias, correction = draw.standard_normal(self.E), draw.standard_normal(self.E)
        given = [a.astype(DTYPES[self.dtype]) for a in (x, residual, norm, router[: self.E], bias)]
        given += [router[self.E :].astype(DTYPES[self.dtype])] if self.plugin == GATED else []
        return [*given, *([correction.astype(np.float32)] if self.correction else [])]

    def run(self, machine: Machine, inputs: list[Values], shift: int = 0, **norm: Any) -> list[Values]:
        said = {**self.route, **self.slots, **NORM, **norm, "wide": self.wide}
        return computed(machine.library.create(self.plugin, said), machine.memory(), inputs, shift)

    def normed(self, machine: Machine, inputs: list[Values], **norm: Any) -> list[Values]:
        return computed(machine.library.create("AddRmsNorm", {**NORM, **norm}), machine.memory(), inputs[:3])

    def routed(self, machine: Machine, inputs: list[Values], y: Values) -> list[Values]:
        """What the plugin that routes alone makes of a y, its logits by float64."""
        kind = np.dtype(np.float32) if self.wide else y.dtype
        products = [y.astype(np.float64) @ w.astype(np.float64).T for w in inputs[3:6:2] if w.ndim == 2]
        products[0] += inputs[4].astype(np.float64)
        logits, *gate = (p.astype(kind) for p in products)
        correction = [inputs[-1].astype(kind)] if self.correction else []
        plugin = machine.library.create(self.plugin.removeprefix("Normed"), {**self.route, **self.slots})
        weights, experts = computed(plugin, machine.memory(), [logits, *gate, *correction])
        return [weights.astype(y.dtype), experts]

    def check(self, machine: Machine, shift: int = 0, **norm: Any) -> None:
        """The norm is AddRmsNorm's up to the order of its squares; what follows is held against the y that was made."""
        inputs = self.inputs()
        y, total, weights, experts = self.run(machine, inputs, shift, **norm)
        expected, sums = self.normed(machine, inputs, **norm)
        assert total.tobytes() == sums.tobytes()
        assert near(y, expected.astype(np.float64), self.dtype)
        wanted, chosen = self.routed(machine, inputs, y)
        if self.is_exact:
            assert y.tobytes() == expected.tobytes()
            assert weights.tobytes() == wanted.tobytes()
            assert (experts == chosen).all()
            return
        # A logit, or what it is chosen by, may fall on the other side of a tie.
        same = (experts == chosen).all(-1)
        assert same.mean() > 0.8
        assert near(weights[same], wanted[same].astype(np.float64), self.dtype, 8)


# One lane's columns, a step's, columns for some parts of a cluster alone, for all and unevenly, no whole vectors; and
# logits of one tile, of so many that each warp has one, two, five tiles or more, of two rounds.
SIZES = [(8, 4, 1), (32, 8, 8), (96, 32, 4), (360, 60, 4), (520, 128, 8), (37, 100, 7), (264, 256, 8), (64, 512, 10)]


@pytest.fixture(autouse=True)
def as_users_have_it(monkeypatch: pytest.MonkeyPatch, portable: None) -> None:
    monkeypatch.delenv(SWITCH)


@pytest.fixture(params=["clusters", "apart"])
def clusters(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, as_users_have_it: None) -> str:
    if request.param == "apart":
        monkeypatch.setenv(SWITCH, "0")
    return str(request.param)


@pytest.mark.parametrize(
    ("size", "dtype", "plugin", "wide", "exact", "scoring"),
    pairwise(SIZES, [*DTYPES], PLUGINS, (False, True), (False, True), ("softmax", "softmax_top_k", "sigmoid")),
)
def test_experts(
    machine: Machine,
    clusters: str,
    size: tuple[int, int, int],
    dtype: str,
    plugin: str,
    wide: bool,
    exact: bool,
    scoring: str,
) -> None:
    kind = {"wide": wide and plugin != GATED, "exact": exact, "scoring": scoring}
    Case(*size, T=3 if size[1] < 256 else 1, plugin=plugin, dtype=dtype, **kind).check(machine)


@pytest.mark.parametrize(
    ("tokens", "size", "dtype", "plugin"),
    pairwise([(1, 1), (2, 1), (1, 8), (1, 9), (3, 5), (1, 16), (1, 17), (5, 13)], SIZES[2:5], [*DTYPES], PLUGINS),
)
def test_tokens(
    machine: Machine, clusters: str, tokens: tuple[int, int], size: tuple[int, int, int], dtype: str, plugin: str
) -> None:
    Case(*size, B=tokens[0], T=tokens[1], plugin=plugin, dtype=dtype, exact=True).check(machine)


def test_more_tokens_than_share_columns_without_clusters(machine: Machine, clusters: str) -> None:
    Case(96, 32, 4, T=530, plugin=GATED, exact=True).check(machine)


@pytest.mark.parametrize(
    ("grouped", "dtype", "wide", "plugin", "correction"),
    pairwise(
        [(60, 4, 5), (64, 32, 4), (256, 8, 8), (512, 16, 9)], [*DTYPES], (False, True), PLUGINS[:2], (False, True)
    ),
)
def test_groups_and_corrections(
    machine: Machine,
    clusters: str,
    grouped: tuple[int, int, int],
    dtype: str,
    wide: bool,
    plugin: str,
    correction: bool,
) -> None:
    e, groups, k = grouped
    kind = {"groups": groups, "scoring": "sigmoid", "correction": correction, "wide": wide, "dtype": dtype}
    Case(96, e, k, T=3 if e < 256 else 1, plugin=plugin, exact=True, **kind).check(machine)


@pytest.mark.parametrize(("dtype", "plugin"), pairwise([*DTYPES], PLUGINS))
def test_a_correction_beside_a_gate(machine: Machine, clusters: str, dtype: str, plugin: str) -> None:
    Case(96, 32, 4, plugin=plugin, dtype=dtype, correction=True, scoring="sigmoid", exact=True).check(machine)


@pytest.mark.parametrize("round_before_weight", [False, True])
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
def test_norms_of_every_kind(machine: Machine, weight_offset: float, round_before_weight: bool) -> None:
    norm = {"epsilon": 1e-2, "weight_offset": weight_offset, "round_before_weight": round_before_weight}
    Case(360, 60, 4, T=17).check(machine, **norm)


@pytest.mark.parametrize(("dtype", "plugin"), pairwise([*DTYPES], PLUGINS))
def test_misaligned_tensors(machine: Machine, clusters: str, dtype: str, plugin: str) -> None:
    Case(96, 32, 4, T=17, plugin=plugin, dtype=dtype, exact=True).check(machine, shift=1)


def test_a_row_does_not_depend_on_the_others(machine: Machine) -> None:
    case = Case(360, 128, 8, T=33, plugin=GATED)
    inputs = case.inputs()
    every = case.run(machine, inputs)
    for t in (0, 7, 8, 15, 16, 32):
        alone = replace(case, T=1).run(machine, [x[:, t : t + 1] for x in inputs[:2]] + inputs[2:])
        assert [a.tobytes() for a in alone] == [e[:, t : t + 1].tobytes() for e in every]


def test_a_row_of_what_is_no_number_spoils_no_other(machine: Machine, clusters: str) -> None:
    case = Case(96, 32, 4, T=17)
    inputs = case.inputs()
    clean = case.run(machine, inputs)
    inputs[0][0, 5, 3], inputs[1][0, 16, 95] = np.nan, np.inf
    found, spoilt = case.run(machine, inputs), [5, 16]
    for a, b in zip(found, clean, strict=True):
        assert np.delete(a, spoilt, 1).tobytes() == np.delete(b, spoilt, 1).tobytes()
    assert np.isnan(found[0][0, 5].astype(np.float32)).all()
    assert all(
        len({*chosen}) == case.K and min(chosen) >= 0 and max(chosen) < case.E for chosen in found[3][0].tolist()
    )


@pytest.mark.parametrize("size", [SIZES[2], SIZES[5], SIZES[6]])
def test_result_does_not_depend_on_the_order_of_threads(
    machine: Machine, clusters: str, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int, int]
) -> None:
    case = Case(*size, T=9, plugin=GATED)
    results = set()
    for seed in ORDERS:
        monkeypatch.setenv("LLMEXPORT_EMULATOR_SEED", str(seed))
        results.add(b"".join(x.tobytes() for x in case.run(machine, case.inputs())))
    assert len(results) == 1


@pytest.mark.parametrize("plugin", PLUGINS)
def test_no_tokens_are_no_error(machine: Machine, clusters: str, plugin: str) -> None:
    case = Case(64, 8, 2, T=0, plugin=plugin)
    slots = case.slots.get(SLOTS, case.K)
    assert [x.shape for x in case.run(machine, case.inputs())] == [(1, 0, 64)] * 2 + [(1, 0, slots)] * 2


def test_clusters_take_no_workspace(machine: Machine, clusters: str) -> None:
    """It lies full of NaN; nothing else tells by which kernels a result came."""
    memory = machine.memory()
    if isinstance(memory, GpuMemory) and memory.torch.cuda.get_device_capability() < (9,):
        pytest.skip("a GPU without clusters")
    case = Case(96, 32, 4)
    plugin = machine.library.create(NONE, {**case.route, **NORM, "wide": False})
    run = lay_out(plugin, memory, case.inputs())
    before = run.workspace.read().tobytes()
    run.enqueue(memory.stream)
    assert (run.workspace.read().tobytes() == before) == (clusters == "clusters")


def test_the_workspace_of_many_tokens_serves_fewer(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is used, some 500 tokens take more than a few more."""
    monkeypatch.setenv(SWITCH, "0")
    plugin = machine.library.create(NONE, {**Case(64, 8, 2).route, **NORM, "wide": False})

    def taken(tokens: int, most: int) -> int:
        inputs = Case(64, 8, 2, T=tokens).inputs()
        own = lay_out(plugin, machine.memory(), Case(64, 8, 2, T=most).inputs())
        return lay_out(plugin, machine.memory(), inputs, most=own.io).workspace.shape[0]

    assert taken(512, 530) >= taken(512, 512) > taken(16, 16) > 0


@pytest.mark.parametrize("plugin", PLUGINS)
def test_attributes_survive_serialisation(machine: Machine, plugin: str) -> None:
    case = Case(64, 8, 2, plugin=plugin)
    given = {**case.route, **case.slots, **NORM, "wide": True}
    made = machine.library.create(plugin, given)
    again = made.clone().recreate()
    assert again.attributes() == made.attributes()
    assert again.attributes().keys() == given.keys()


@pytest.mark.parametrize(
    ("plugin", "place", "shape", "says"),
    [
        (GATED, 1, (1, 3, 63), "NormedGatedSharedMoeRoute: dimension 2 of residual is 63, but C is 64"),
        (NONE, 2, (65,), "NormedMoeRoute: dimension 0 of norm_weight is 65, but C is 64"),
        (ALONE, 3, (8, 65), "NormedSharedMoeRoute: dimension 1 of router_weight is 65, but C is 64"),
        (NONE, 4, (9,), "NormedMoeRoute: dimension 0 of router_bias is 9, but E is 8"),
        (GATED, 5, (2, 64), "NormedGatedSharedMoeRoute: gate_weight has L = 2, not one gate"),
    ],
)
def test_refuses_sizes(
    machine: Machine, capfd: pytest.CaptureFixture[str], plugin: str, place: int, shape: tuple[int, ...], says: str
) -> None:
    case = Case(64, 8, 2, plugin=plugin)
    inputs = case.inputs()
    inputs[place] = random(shape, case.dtype, 1)
    with pytest.raises(Refused):
        case.run(machine, inputs)
    assert f"llmexport: {says}" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("plugin", "experts", "top_k", "more", "says"),
    [
        (ALONE, 8, 2, 0, "NormedSharedMoeRoute: slots is 2, which leaves none behind top_k = 2"),
        (NONE, 8, 9, 0, "MoeRoute: top_k is 9, but there are E = 8 experts"),
        (NONE, 513, 2, 0, "MoeRoute: E = 513 experts, the kernel holds 512"),
    ],
)
def test_refuses_experts(
    machine: Machine, capfd: pytest.CaptureFixture[str], plugin: str, experts: int, top_k: int, more: int, says: str
) -> None:
    case = Case(64, experts, top_k, plugin=plugin, more=more)
    with pytest.raises(Refused):
        case.run(machine, case.inputs())
    assert f"llmexport: {says}" in capfd.readouterr().err
