"""The kernel that sums and norms what experts make, bit for bit that of the ops one after another.

Imports no torch: test_sanitizers.py runs it under sanitizers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from kernel_numbers import Values, near, rounded
from moe_nodes import MXFP4, Node, name, run
from native import ORDERS
from pairwise import pairwise
from plugin_host import DTYPES, Machine, computed, lay_out

from llmexport.plugins.host import Refused
from llmexport.plugins.normed import ADDENDS, GATE_COLUMN, OWN

NORM = {"epsilon": 1e-5, "weight_offset": 0.0, "round_before_weight": False}
COLUMN, COLUMNS = 2, 5  # of a gate
# By addends: the plugins of them.
PLUGINS = {len(addends): plugin for plugin, addends in ADDENDS.items()}
NONE, SHARED, GATED = sorted(PLUGINS)


@dataclass(frozen=True)
class Case:
    """A node's experts, and what is added to their sum and normed."""

    experts: Node
    addends: int
    dtype: str

    def inputs(self) -> list[Values]:
        """The gates make 0, 1/2 and 1, which every sigmoid does."""
        node, random = self.experts, np.random.default_rng(3)
        own, row = node.inputs(self.dtype), (node.B, node.T, node.C)
        gates = random.choice([-200.0, 0.0, 200.0], (node.B, node.T, COLUMNS))
        made = [random.standard_normal(row), random.standard_normal(node.C)]
        made += [random.standard_normal(row), gates][: self.addends]
        return [*own[:OWN], *(x.astype(DTYPES[self.dtype]) for x in made), *own[OWN:]]

    def run(self, machine: Machine, inputs: list[Values], shift: int = 0, **norm: Any) -> list[Values]:
        gate = {GATE_COLUMN: COLUMN} if self.addends == GATED else {}
        attributes = {**self.experts.attributes, **NORM, **norm, **gate}
        plugin = machine.library.create(PLUGINS[self.addends], attributes)
        return computed(plugin, machine.memory(), inputs, shift)

    def apart(self, machine: Machine, inputs: list[Values], shift: int = 0, **norm: Any) -> list[Values]:
        """By the plugins of its ops, and what numpy rounds between them."""
        residual, weight, *addends = inputs[OWN : OWN + 2 + self.addends]
        own = [*inputs[:OWN], *inputs[OWN + 2 + self.addends :]]
        y = run(machine, self.experts, own, shift)
        if addends:
            shared = addends[0]
            if self.addends == GATED:
                factor = 1 / (1 + np.exp(-addends[1][..., COLUMN, None].astype(np.float64)))
                shared = (factor * shared.astype(np.float64)).astype(y.dtype)
            y = (y.astype(np.float64) + shared.astype(np.float64)).astype(y.dtype)
        plugin = machine.library.create("AddRmsNorm", {**NORM, **norm})
        return computed(plugin, machine.memory(), [y, residual, weight], shift)

    def is_same(self, machine: Machine, inputs: list[Values] | None = None, shift: int = 0, **norm: Any) -> bool:
        given = inputs or self.inputs()
        found, want = (made(machine, given, shift, **norm) for made in (self.run, self.apart))
        assert np.isfinite(found[0].astype(np.float32)).all()
        return all(a.tobytes() == b.tobytes() for a, b in zip(found, want, strict=True))


# Rows of one vector a thread and several rows a block, of two and of four, of a block each, of more than a block
# keeps, and of no whole vectors; experts a token 1, 4, 8 and numbers that fill no turn of reads.
SIZES = [
    Node(1, 4, 32, 64, 8),
    Node(37, 1, 4, 40, 8),
    Node(9, 8, 16, 256, 8),
    Node(5, 3, 4, 1000, 8),
    Node(3, 4, 4, 1536, 8),
    Node(2, 5, 6, 5120, 8),
    Node(2, 2, 2, 16416, 8),
    Node(7, 4, 6, 37, 19),
    Node(65, 2, 4, 64, 40),
]


@pytest.mark.parametrize(("experts", "dtype", "addends"), pairwise(SIZES, [*DTYPES], [*PLUGINS]))
def test_every_bit_is_that_of_the_ops(machine: Machine, experts: Node, dtype: str, addends: int) -> None:
    assert Case(experts, addends, dtype).is_same(machine)


@pytest.mark.parametrize("addends", PLUGINS)
@pytest.mark.parametrize("round_before_weight", [False, True])
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
def test_norms_of_every_kind(machine: Machine, addends: int, weight_offset: float, round_before_weight: bool) -> None:
    norm = {"epsilon": 1e-2, "weight_offset": weight_offset, "round_before_weight": round_before_weight}
    assert Case(SIZES[2], addends, "bf16").is_same(machine, **norm)


EXPERTS = [
    Node(7, 2, 4, 64, 40, biases=True, transposed=True, interleaved=True, activation="swiglu_clamped"),
    Node(7, 2, 4, 64, 40, scale_input=True, transposed=True),
    Node(40, 1, 4, 64, 40, scale_input=True),
    Node(9, 4, 8, 96, 64, stored=MXFP4, biases=True),
    Node(9, 2, 4, 96, 64, stored="uint4", group=48, biases=True, zeros=True),
    Node(9, 2, 4, 96, 64, stored="fp8", biases=True, factors=True),
    Node(5, 2, 4, 64, 40, B=3),
]


@pytest.mark.parametrize("addends", PLUGINS)
@pytest.mark.parametrize("experts", EXPERTS, ids=name)
def test_experts_of_every_form(machine: Machine, experts: Node, addends: int) -> None:
    assert Case(experts, addends, "bf16").is_same(machine)


@pytest.mark.parametrize(("dtype", "addends"), pairwise([*DTYPES], [*PLUGINS]))
def test_misaligned_tensors(machine: Machine, dtype: str, addends: int) -> None:
    assert Case(Node(20, 2, 4, 64, 32), addends, dtype).is_same(machine, shift=1)


@pytest.mark.parametrize("addends", PLUGINS)
def test_what_is_no_expert_adds_nothing(machine: Machine, addends: int) -> None:
    case = Case(Node(9, 6, 8, 64, 40), addends, "bf16")
    inputs = case.inputs()
    inputs[2][0, ::2, 1], inputs[2][0, 1::3, 0], inputs[2][0, 4, 4:] = -1, 8, -1
    inputs[2][0, -1] = 2**31 - 1
    assert case.is_same(machine, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gate_may_make_any_number(machine: Machine, dtype: str) -> None:
    case = Case(SIZES[2], GATED, dtype)
    inputs = case.inputs()
    gates = np.random.default_rng(4).standard_normal(inputs[OWN + 3].shape) * 3
    inputs[OWN + 3] = gates.astype(DTYPES[dtype])
    found = case.run(machine, inputs)[1]
    experts = run(machine, case.experts, inputs[:OWN]).astype(np.float64)
    residual, _, shared, gate = (x.astype(np.float64) for x in inputs[OWN:])
    factor = rounded(1 / (1 + np.exp(-gate[..., COLUMN, None])), dtype)
    total = rounded(experts + rounded(factor * shared, dtype), dtype) + residual
    # The sigmoid, the product and each sum may fall on the other side of a tie.
    assert near(found, total, dtype, 4)
    assert dtype == "fp32" or (found == total.astype(found.dtype)).mean() > 0.98


@pytest.mark.parametrize("experts", [SIZES[2], SIZES[4], SIZES[6], SIZES[7]], ids=name)
def test_result_does_not_depend_on_the_order_of_threads(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, experts: Node
) -> None:
    case = Case(experts, GATED, "bf16")
    results = set()
    for seed in ORDERS:
        monkeypatch.setenv("LLMEXPORT_EMULATOR_SEED", str(seed))
        results.add(b"".join(x.tobytes() for x in case.run(machine, case.inputs())))
    assert len(results) == 1


@pytest.mark.parametrize("addends", PLUGINS)
def test_no_tokens_are_no_error(machine: Machine, addends: int) -> None:
    case = Case(Node(0, 2, 4, 64, 40), addends, "fp16")
    assert [x.shape for x in case.run(machine, case.inputs())] == [(1, 0, 64), (1, 0, 64)]


@pytest.mark.parametrize("addends", PLUGINS)
def test_its_workspace_is_that_of_the_experts(machine: Machine, addends: int) -> None:
    case = Case(Node(65, 2, 4, 64, 40), addends, "bf16")
    inputs = case.inputs()
    gate = {GATE_COLUMN: COLUMN} if addends == GATED else {}
    plugin = machine.library.create(PLUGINS[addends], {**case.experts.attributes, **NORM, **gate})
    alone = machine.library.create("MoeExperts", case.experts.attributes)
    both = [lay_out(p, machine.memory(), i) for p, i in ((plugin, inputs), (alone, inputs[:OWN]))]
    assert both[0].workspace.shape == both[1].workspace.shape


@pytest.mark.parametrize("addends", PLUGINS)
def test_attributes_survive_serialisation(machine: Machine, addends: int) -> None:
    gate = {GATE_COLUMN: COLUMN} if addends == GATED else {}
    given = {**SIZES[0].attributes, **NORM, **gate}
    plugin = machine.library.create(PLUGINS[addends], given)
    again = plugin.clone().recreate()
    assert again.attributes() == plugin.attributes()
    assert again.attributes().keys() == given.keys()


@pytest.mark.parametrize(
    ("place", "shape", "says"),
    [
        (OWN, (1, 3, 63), "NormedGatedSharedMoeExperts: dimension 2 of residual is 63, but C is 64"),
        (OWN + 1, (65,), "NormedGatedSharedMoeExperts: dimension 0 of norm_weight is 65, but C is 64"),
        (OWN + 2, (1, 2, 64), "NormedGatedSharedMoeExperts: dimension 1 of shared is 2, but T is 3"),
        (OWN + 3, (1, 3, 2), "NormedGatedSharedMoeExperts: gate_column is 2 of L = 2 columns"),
        (4, (4, 72, 40), "MoeExperts: down has R = 72 rows, but x has C = 64 columns"),
    ],
)
def test_refuses_sizes(
    machine: Machine, capfd: pytest.CaptureFixture[str], place: int, shape: tuple[int, ...], says: str
) -> None:
    case = Case(Node(3, 2, 4, 64, 40), GATED, "fp16")
    inputs = case.inputs()
    inputs[place] = np.zeros(shape, np.float16)
    with pytest.raises(Refused):
        case.run(machine, inputs)
    assert f"llmexport: {says}" in capfd.readouterr().err


@pytest.mark.parametrize("addends", PLUGINS)
def test_refuses_packed_weights_without_scales(
    machine: Machine, capfd: pytest.CaptureFixture[str], addends: int
) -> None:
    """It counts MoeExperts' own inputs."""
    case = Case(replace(EXPERTS[3], biases=True), addends, "fp16")
    with pytest.raises(Refused):
        case.run(machine, case.inputs()[:-1])
    assert "llmexport: MoeExperts: mxfp4 weights are bytes with biases and scales" in capfd.readouterr().err
