"""MoeRoute's kernels against float64: every scoring, bias, groups, ties; experts by part of a warp and by a warp.

Imports neither torch nor onnx: test_sanitizers.py runs it again under sanitizers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_numbers import Values, near, random, wide
from native import ORDERS
from pairwise import pairwise
from plugin_host import DTYPES, Machine, computed

from llmexport.plugins.host import Refused
from llmexport.plugins.joined import COLUMNS, JOINED
from llmexport.plugins.shared_route import SLOTS

SCORINGS = ("softmax", "softmax_top_k", "sigmoid")


def softmax(x: Values) -> Values:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def best_first(choice: Values) -> Values:
    return np.argsort(-choice, axis=-1, kind="stable")


def exact(inputs: list[Values], attributes: dict[str, Any]) -> tuple[Values, Values]:
    """Weights in float64, and the experts."""
    logits, *bias = wide(*inputs)
    scores = {"softmax": softmax, "softmax_top_k": lambda x: x, "sigmoid": lambda x: 1 / (1 + np.exp(-x))}
    score = scores[attributes["scoring"]](logits)
    choice = score + bias[0] if bias else logits
    groups = attributes["groups"]
    if groups > 1:
        grouped = choice.reshape(*choice.shape[:-1], groups, -1)
        of_group = np.sort(grouped, -1)[..., -attributes["group_best"] :].sum(-1)
        dropped = best_first(of_group)[..., attributes["groups_kept"] :]
        np.put_along_axis(grouped, dropped[..., None], -np.inf, axis=-2)
        choice = grouped.reshape(choice.shape)
    experts = best_first(choice)[..., : attributes["top_k"]]
    weights = np.take_along_axis(score, experts, -1)
    if attributes["scoring"] == "softmax_top_k":
        weights = softmax(weights)
    if attributes["renormalise"]:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return weights * attributes["scale"], experts


def asked(top_k: int, scoring: str = "softmax", groups: int = 1, kept: int = 1, **changed: Any) -> dict[str, Any]:
    whole = {"top_k": top_k, "scoring": scoring, "renormalise": False, "scale": 1.0, "group_best": 2}
    return {**whole, "groups": groups, "groups_kept": kept, **changed}


def run(machine: Machine, inputs: list[Values], attributes: dict[str, Any], shift: int = 0) -> list[Values]:
    return computed(machine.library.create("MoeRoute", attributes), machine.memory(), inputs, shift)


def is_right(machine: Machine, inputs: list[Values], attributes: dict[str, Any], dtype: str, shift: int = 0) -> bool:
    weights, experts = run(machine, inputs, attributes, shift)
    exact_weights, exact_experts = exact(inputs, attributes)
    return bool((experts == exact_experts).all()) and near(weights, exact_weights, dtype)


# E and K of models and odd ones; 16 experts a lane from 257 on; as many winners as experts.
EXPERTS = [(4, 1), (8, 8), (16, 1), (32, 4), (60, 4), (64, 6), (100, 7), (128, 8), (256, 8), (260, 5), (512, 10)]


@pytest.mark.parametrize(
    ("experts", "dtype", "scoring", "with_bias", "shift"),
    pairwise(EXPERTS, [*DTYPES], SCORINGS, (False, True), (0, 1)),
)
def test_experts(
    machine: Machine, experts: tuple[int, int], dtype: str, scoring: str, with_bias: bool, shift: int
) -> None:
    e, k = experts
    inputs = [random((1, 7, e), dtype, e), random((e,), dtype, k)][: 2 if with_bias else 1]
    assert is_right(machine, inputs, asked(k, scoring), dtype, shift)


@pytest.mark.parametrize(
    ("size", "e", "dtype"), pairwise([(1, 1), (7, 1), (1, 63), (1, 64), (5, 13), (2, 65)], (32, 256), [*DTYPES])
)
def test_tokens(machine: Machine, size: tuple[int, int], e: int, dtype: str) -> None:
    attributes = asked(4, "softmax", renormalise=True, scale=2.5)
    assert is_right(machine, [random((*size, e), dtype, 1)], attributes, dtype)


# E, groups, kept, K: of DeepSeek-V3, GLM-4.5 and odd ones; groups that straddle lanes; as many as lanes.
GROUPS = [(256, 8, 4, 8), (160, 8, 3, 6), (60, 4, 2, 5), (30, 2, 1, 15), (64, 32, 5, 4), (512, 16, 16, 9), (8, 4, 2, 4)]


@pytest.mark.parametrize(
    ("grouped", "dtype", "renormalise", "with_bias", "best"),
    pairwise(GROUPS, [*DTYPES], (False, True), (False, True), (1, 2)),
)
def test_groups(
    machine: Machine, grouped: tuple[int, int, int, int], dtype: str, renormalise: bool, with_bias: bool, best: int
) -> None:
    e, groups, kept, k = grouped
    inputs = [random((2, 5, e), dtype, 1), random((e,), dtype, 2)][: 2 if with_bias else 1]
    attributes = asked(k, "sigmoid", groups, kept, renormalise=renormalise, scale=2.5, group_best=best)
    assert is_right(machine, inputs, attributes, dtype)


@pytest.mark.parametrize(
    ("e", "dtype", "with_bias", "groups"), pairwise((16, 60, 512), [*DTYPES], (False, True), (1, 4))
)
def test_the_lower_index_wins_a_tie(machine: Machine, e: int, dtype: str, with_bias: bool, groups: int) -> None:
    """Few different values, so that experts and, with one value, groups tie."""
    draw = np.random.default_rng(0)
    logits = draw.integers(-1, 2, (1, 9, e)).astype(DTYPES[dtype])
    logits[0, 0], logits[0, 1] = 1, logits[0, 1] * 0.0  # 0.0 and -0.0
    bias = (draw.integers(0, 2, e) / 4).astype(DTYPES[dtype])
    inputs = [logits, bias][: 2 if with_bias else 1]
    assert is_right(machine, inputs, asked(e // 2, "sigmoid", groups, groups // 2 or 1), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_too_few_are_eligible(machine: Machine, dtype: str) -> None:
    """The rest are the lowest of those outside the groups, as in the reference."""
    inputs = [random((1, 7, 24), dtype, 1)]
    _, experts = run(machine, inputs, asked(20, "sigmoid", 6, 3))
    assert (experts == exact(inputs, asked(20, "sigmoid", 6, 3))[1]).all()
    assert (np.sort(experts[..., 12:], -1) == experts[..., 12:]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
def test_infinities_and_nan(machine: Machine, dtype: str, with_bias: bool) -> None:
    """NaN is the best, as torch sorts it, and whatever comes the experts are different ones."""
    rows = [[0, -np.inf, 1, -np.inf], [0, np.nan, np.inf, 1], [np.nan, -np.nan, np.nan, 0], [-np.inf] * 4]
    inputs = [np.array([rows], DTYPES[dtype]), np.zeros(4, DTYPES[dtype])][: 2 if with_bias else 1]
    weights, experts = run(machine, inputs, asked(4, "sigmoid"))
    assert experts.tolist() == [[[2, 0, 1, 3], [1, 2, 3, 0], [0, 1, 2, 3], [0, 1, 2, 3]]]
    assert np.isnan(weights[0, 1:3].astype(np.float64)).sum(-1).tolist() == [1, 3]
    assert weights[0, 0, 2:].astype(np.float64).tolist() == [0, 0]


SHARED = {False: "SharedMoeRoute", True: "GatedSharedMoeRoute"}


def with_shared(
    machine: Machine, inputs: list[Values], gate: Values | None, attributes: dict[str, Any], slots: int, shift: int = 0
) -> list[Values]:
    """What the plugin makes of logits, the gate if there is one, and the bias."""
    plugin = machine.library.create(SHARED[gate is not None], {**attributes, SLOTS: slots})
    given = [inputs[0], *([] if gate is None else [gate]), *inputs[1:]]
    return computed(plugin, machine.memory(), given, shift)


def check_shared(
    found: list[Values], inputs: list[Values], gate: Values | None, attributes: dict[str, Any], dtype: str
) -> None:
    top_k, experts = attributes["top_k"], inputs[0].shape[-1]
    weights, chosen = exact(inputs, attributes)
    assert near(found[0][..., :top_k], weights, dtype)
    assert (found[1][..., :top_k] == chosen).all()
    behind = found[1].shape[-1] - top_k
    assert behind > 0
    assert (found[1][..., top_k:] == np.arange(experts, experts + behind)).all()
    own = np.ones((1, 1, 1)) if gate is None else 1 / (1 + np.exp(-gate.astype(np.float64)))
    assert near(found[0][..., top_k:], np.broadcast_to(own, found[1][..., top_k:].shape), dtype)


@pytest.mark.parametrize(
    ("experts", "dtype", "gated", "more", "with_bias", "shift"),
    pairwise(EXPERTS, [*DTYPES], (False, True), (1, 2, 8, 40), (False, True), (0, 1)),
)
def test_shared_experts_are_behind_the_chosen_ones(
    machine: Machine, experts: tuple[int, int], dtype: str, gated: bool, more: int, with_bias: bool, shift: int
) -> None:
    e, k = experts
    inputs = [random((2, 7, e), dtype, e), random((e,), dtype, k)][: 2 if with_bias else 1]
    gate = random((2, 7, 1), dtype, 5) * 3 if gated else None
    attributes = asked(k, "sigmoid", renormalise=True, scale=2.5)
    check_shared(with_shared(machine, inputs, gate, attributes, k + more, shift), inputs, gate, attributes, dtype)


@pytest.mark.parametrize(
    ("grouped", "dtype", "gated", "scoring"), pairwise(GROUPS, [*DTYPES], (False, True), ("softmax", "sigmoid"))
)
def test_shared_experts_of_groups(
    machine: Machine, grouped: tuple[int, int, int, int], dtype: str, gated: bool, scoring: str
) -> None:
    e, groups, kept, k = grouped
    inputs, gate = [random((1, 9, e), dtype, 1)], random((1, 9, 1), dtype, 5) if gated else None
    attributes = asked(k, scoring, groups, kept, group_best=1)
    check_shared(with_shared(machine, inputs, gate, attributes, k + 2), inputs, gate, attributes, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
def test_a_gate_may_be_a_column_of_what_has_the_logits(machine: Machine, dtype: str, with_bias: bool) -> None:
    both, first, at, e = random((2, 7, 90), dtype, 1), 16, 81, 60
    attributes = asked(4, "softmax")
    said = {**attributes, SLOTS: 5, COLUMNS: [first, e, at, 1]}
    plugin = machine.library.create(f"{JOINED}{SHARED[True]}", said)
    bias = [random((e,), dtype, 2)] if with_bias else []
    found = computed(plugin, machine.memory(), [both, *bias])
    inputs, gate = [both[..., first : first + e], *bias], both[..., at : at + 1]
    check_shared(found, inputs, gate, attributes, dtype)
    alone = with_shared(machine, inputs, gate, attributes, 5)
    assert [x.tobytes() for x in found] == [x.tobytes() for x in alone]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_at_their_ends(machine: Machine, dtype: str) -> None:
    gate = np.array([[[-200.0], [0.0], [200.0], [-np.inf], [np.inf]]], DTYPES[dtype])
    weights, _ = with_shared(machine, [random((1, 5, 8), dtype, 1)], gate, asked(2), 4)
    assert weights[..., 2:].astype(np.float64).tolist() == [[[v, v] for v in (0.0, 0.5, 1.0, 0.0, 1.0)]]


@pytest.mark.parametrize("plugin", SHARED.values())
def test_attributes_of_shared_experts_survive_serialisation(machine: Machine, plugin: str) -> None:
    given = {**asked(4, "sigmoid", 8, 3), SLOTS: 6}
    made = machine.library.create(plugin, given)
    again = made.clone().recreate()
    assert again.attributes() == made.attributes()
    assert again.attributes().keys() == given.keys()
    assert int.from_bytes(again.attributes()[SLOTS], "little") == 6


def test_no_tokens_with_shared_experts_are_no_error(machine: Machine) -> None:
    gate = np.zeros((1, 0, 1), np.float16)
    made = with_shared(machine, [random((1, 0, 16), "fp16", 1)], gate, asked(2), 3)
    assert [y.shape for y in made] == [(1, 0, 3), (1, 0, 3)]


@pytest.mark.parametrize(
    ("gate", "slots", "says"),
    [
        (None, 2, "SharedMoeRoute: slots is 2, which leaves none behind top_k = 2"),
        ((1, 2, 1), 1, "GatedSharedMoeRoute: slots is 1, which leaves none behind top_k = 2"),
        ((1, 2, 2), 3, "GatedSharedMoeRoute: shared_gate has L = 2, not one gate"),
        ((1, 3, 1), 3, "GatedSharedMoeRoute: dimension 1 of shared_gate is 3, but T is 2"),
        (None, 3, "MoeRoute: top_k is 2, but there are E = 1 experts"),
    ],
)
def test_refuses_shared_experts(
    machine: Machine, capfd: pytest.CaptureFixture[str], gate: tuple[int, ...] | None, slots: int, says: str
) -> None:
    logits = random((1, 2, 1 if "E = 1" in says else 8), "fp16", 1)
    with pytest.raises(Refused):
        with_shared(machine, [logits], None if gate is None else random(gate, "fp16", 2), asked(2), slots)
    assert f"llmexport: {says}" in capfd.readouterr().err


def test_no_tokens_are_no_error(machine: Machine) -> None:
    weights, experts = run(machine, [random((1, 0, 16), "fp16", 1)], asked(2))
    assert (weights.shape, experts.shape) == ((1, 0, 2), (1, 0, 2))


def test_large_logits_do_not_overflow(machine: Machine) -> None:
    inputs = [np.array([[[80000.0, 1e30, -1e30, 79999.0]]], np.float32)]
    assert run(machine, inputs, asked(2, "softmax"))[0].tolist() == [[[1.0, 0.0]]]
    assert run(machine, inputs, asked(2, "sigmoid"))[0].tolist() == [[[1.0, 1.0]]]


def test_result_does_not_depend_on_the_order_of_threads(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [random((1, 6, 256), "bf16", 1), random((256,), "bf16", 2)]
    results = []
    for seed in ORDERS:
        monkeypatch.setenv("LLMEXPORT_EMULATOR_SEED", str(seed))
        found = run(machine, inputs, asked(8, "softmax", 8, 4, renormalise=True))
        results.append(b"".join(y.tobytes() for y in found))
    assert len(set(results)) == 1


@pytest.mark.parametrize(
    ("e", "attributes", "says"),
    [
        (8, asked(9), "top_k is 9, but there are E = 8 experts"),
        (520, asked(2), "E = 520 experts, the kernel holds 512"),
        (9, asked(2, groups=2), "E = 9 experts are not 2 groups of two or more"),
        (8, asked(2, groups=8), "E = 8 experts are not 8 groups of two or more"),
        (8, asked(2, groups=2, kept=3), "3 of 2 groups are kept"),
        (8, asked(2, groups=2, group_best=3), "the 3 best choices of a group, 1 or 2 are summed"),
        (128, asked(2, groups=64, kept=2), "64 groups, the kernel has a lane for 32"),
    ],
)
def test_refuses(
    machine: Machine, capfd: pytest.CaptureFixture[str], e: int, attributes: dict[str, Any], says: str
) -> None:
    with pytest.raises(Refused):
        run(machine, [random((1, 2, e), "fp16", 1)], attributes)
    assert f"llmexport: MoeRoute: {says}" in capfd.readouterr().err
