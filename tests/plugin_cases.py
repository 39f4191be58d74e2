"""A case of each op for the tests that lead plugins through their life: attributes, sizes, inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import torch
from native import PLUGINS

from llmexport.plugins.joined import BIASABLE, BIASED, JOINED
from llmexport.plugins.normed import ADDENDS
from llmexport.plugins.normed_route import NORMED_ROUTES
from llmexport.plugins.shared_route import ROUTE, SHARED_ROUTES
from llmexport.plugins.spec import Op, all_ops

OPS = all_ops()
TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FIXED = {"float32": torch.float32, "int32": torch.int32, "uint8": torch.uint8}
NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}
NUMPY |= {torch.int32: np.int32, torch.uint8: np.uint8}

Sizes = Mapping[str, int]
# From random numbers of its shape and the sizes of the case, the values of one input.
Fill = Callable[[torch.Tensor, Sizes], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A node of an op. `without` counts the optional inputs that it leaves out; `fills` makes the inputs that are
    not plain normal numbers; `stored` is the type of its weights if that is not T, `scales` that of their scales. The
    kernels are made for `dtypes` of T. `exact` names the outputs that are defined rounding by rounding. `units`, of
    fp32 and of the 16-bit types: how far the others may be off.
    """

    op: str
    attributes: dict[str, Any]
    sizes: dict[str, int]
    without: int = 0
    fills: dict[str, Fill] = field(default_factory=dict)
    stored: torch.dtype | None = None
    scales: torch.dtype = torch.uint8
    dtypes: tuple[str, ...] = ("fp32", "fp16", "bf16")
    exact: tuple[str, ...] = ()
    # Rounded once, or on another side of a tie; fp32 inside has a few roundings of its own.
    units: tuple[float, float] = (4.0, 1.01)

    @property
    def spec(self) -> Op:
        return OPS[self.op]

    @property
    def inputs(self) -> list[str]:
        """The inputs that the node has."""
        return list(self.spec.inputs)[: len(self.spec.inputs) - self.without]

    def shapes(self, **changed: int) -> list[tuple[int, ...]]:
        sizes = {**self.sizes, **changed}
        return [tuple(sizes[d] for d in self.spec.inputs[n]) for n in self.inputs]

    def dtype_of(self, name: str, dtype: str) -> torch.dtype:
        """Of an input or output in a node whose T is `dtype`."""
        kind = self.spec.types[name]
        stored = self.stored or TORCH[dtype]
        return {"T": TORCH[dtype], "W": stored, "S": self.scales, **FIXED}[kind]

    def tensors(self, dtype: str, **changed: int) -> list[torch.Tensor]:
        seed, sizes = torch.Generator().manual_seed(3), {**self.sizes, **changed}
        made = []
        for name, shape in zip(self.inputs, self.shapes(**changed), strict=True):
            normal = torch.randn(shape, generator=seed)
            made.append(self.fills.get(name, plain)(normal, sizes).to(self.dtype_of(name, dtype)))
        return made

    def expected(self, inputs: list[torch.Tensor]) -> list[np.ndarray]:
        """The reference's outputs."""
        found = self.spec.reference(*inputs, *[None] * self.without, **self.attributes)
        return [array_of(y.contiguous()) for y in (found if isinstance(found, tuple) else (found,))]


def array_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy().view(NUMPY[tensor.dtype]).reshape(tensor.shape)


def plain(normal: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    return normal


def small(normal: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """Of a matrix that keeps the size of what it is multiplied with."""
    return normal * normal.shape[-1] ** -0.5


def unit(normal: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """Of length one."""
    return torch.nn.functional.normalize(normal, dim=-1)


def probability(normal: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    return normal.sigmoid()


def decay(normal: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    return -torch.nn.functional.softplus(normal)


def mostly(normal: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """1 for a token, 0 for padding."""
    return (normal > -1).float()


def weight(normal: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """At least 1, or 0 before the first token."""
    return (normal > -1) * (1 + normal.abs())


def codes(normal: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """Any byte."""
    return (normal * 1000).long() % 256


def powers(normal: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """MXFP4's scales near 2**-3, whose bias is 127."""
    return 124 + (normal * 1000).long() % 3


def tiny(normal: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """Scales with which differences of 4 bits are of order one by the root of their number."""
    return normal.sigmoid() / 32


def nibbles(normal: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    return (normal * 1000).long() % 16


def choice(normal: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """Different experts for each token."""
    ranked = torch.randn((*normal.shape[:-1], sizes["E"]), generator=torch.Generator().manual_seed(5))
    return ranked.argsort(-1)[..., : normal.shape[-1]]


def first_key(normal: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    return torch.arange(len(normal)) % 3


def last_token(normal: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """The last one, or the one before it."""
    return sizes["T"] - torch.arange(len(normal)) % 2


def odd_slots(normal: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """Another first slot in each row, from 1 on."""
    return 1 + 2 * torch.arange(len(normal))


def all_keys(normal: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    return sizes["S"] - torch.arange(len(normal)) % 2


BEST = {"group_best": 2}
EXPERTS = {"transposed": False, "interleaved": False, "scale_input": False, "format": "plain", "group": 0}
EXPERT_SIZES = {"B": 2, "T": 9, "K": 2, "E": 4, "C": 64, "P": 64, "Q": 64, "R": 64, "S": 32, "J": 64}
EXPERT_FILLS: dict[str, Fill] = {"weights": probability, "experts": choice, "gate_up": small, "down": small}
MXFP4_SIZES = {**EXPERT_SIZES, "Q": 32, "S": 16, "M": 2, "N": 1}
MXFP4_FILLS: dict[str, Fill] = {**EXPERT_FILLS, "gate_up": codes, "down": codes}
MXFP4_FILLS |= {"gate_up_scales": powers, "down_scales": powers}
UINT4_SIZES = {**MXFP4_SIZES, "M": 3, "N": 2, "F": 2, "G": 1}
UINT4_FILLS: dict[str, Fill] = {**EXPERT_FILLS, "gate_up": codes, "down": codes}
UINT4_FILLS |= {
    f"{n}_{what}": fill for n in ("gate_up", "down") for what, fill in (("scales", tiny), ("zeros", nibbles))
}
HEAD_NORM = {"epsilon": 1e-6, "weight_offset": 1.0}
# The norm and the rotation are each rounded, and a rotation adds what the norm rounded to the other side of a tie; as
# does the sum of a normed summand.
HEAD_UNITS = (8.0, 3.0)
KEYS: dict[str, Fill] = {"start": first_key, "length": all_keys}
DELTA_FILLS: dict[str, Fill] = {"g": decay, "beta": probability}
NET_NORM = {"epsilon": 1e-6, "activation": "silu", "round_before_weight": True}
NET_TAPS = {"O": 1, "K": 4, "S": 3}
NET_FILLS: dict[str, Fill] = {"present": mostly, "end": last_token}
# What is normed is rounded before, and up to twice within.
NET_UNITS = (8.0, 3.0)
# Of 16-bit types the states are sums of products that hold 16 bits.
CHUNK_UNITS = (128.0, 1.01)
# The projections are rounded too, each at another place of a tie, and the second sums what the first gave.
EXPERT_UNITS = (16.0, 4.0)
# A logit's rounding, of a few units of its own size, is its weight's; both sides have it.
ATTENTION_UNITS = (8.0, 1.01)

ALL_CASES = {
    "Rope": Case("Rope", {"interleaved": True}, {"B": 2, "H": 3, "T": 63, "D": 40, "R": 16}, exact=("y",)),
    "QkNormRope": Case(
        "QkNormRope",
        {**HEAD_NORM, "interleaved": False, "round_before_weight": True, "norm_first": True},
        {"B": 2, "T": 63, "H": 4, "G": 2, "D": 64, "R": 16, "Q": 64},
        exact=("value",),
        units=HEAD_UNITS,
    ),
    "QkNormRope-after": Case(
        "QkNormRope",
        {**HEAD_NORM, "interleaved": True, "round_before_weight": False, "norm_first": False},
        {"B": 2, "T": 3, "H": 3, "G": 1, "D": 40, "R": 20, "Q": 40},
        exact=("value",),
        units=HEAD_UNITS,
    ),
    "QkNormRope-no-norm": Case(
        "QkNormRope",
        {**HEAD_NORM, "interleaved": False, "round_before_weight": False, "norm_first": True},
        {"B": 1, "T": 9, "H": 5, "G": 2, "D": 128, "R": 64, "Q": 128},
        without=2,
        exact=("query", "key", "value"),
    ),
    "QkNormRope-gated": Case(
        "QkNormRope",
        {**HEAD_NORM, "interleaved": False, "round_before_weight": False, "norm_first": True},
        {"B": 2, "T": 9, "H": 4, "G": 2, "D": 64, "R": 16, "Q": 128},
        exact=("value",),
        units=HEAD_UNITS,
    ),
    "QkNormRopeWrite": Case(
        "QkNormRopeWrite",
        {**HEAD_NORM, "interleaved": False, "round_before_weight": True, "norm_first": True},
        {"B": 2, "T": 9, "H": 4, "G": 2, "D": 64, "R": 16, "Q": 128, "S": 30},
        fills={"write_indices": odd_slots},
        exact=("value",),
        units=HEAD_UNITS,
    ),
    "QkNormRopeWrite-no-norm": Case(
        "QkNormRopeWrite",
        {**HEAD_NORM, "interleaved": True, "round_before_weight": False, "norm_first": True},
        {"B": 3, "T": 1, "H": 3, "G": 1, "D": 40, "R": 20, "Q": 40, "S": 17},
        without=2,
        fills={"write_indices": odd_slots},
        exact=("query", "key", "value"),
    ),
    "AddRmsNorm": Case(
        "AddRmsNorm",
        {"epsilon": 1e-6, "weight_offset": 1.0, "round_before_weight": False},
        {"B": 2, "T": 63, "C": 72},
        without=1,
        exact=("sum",),
    ),
    "AddRmsNorm-inner": Case(
        "AddRmsNorm",
        {"epsilon": 1e-6, "weight_offset": 0.0, "round_before_weight": True},
        {"B": 2, "T": 63, "C": 72},
        units=HEAD_UNITS,
    ),
    "GatedAct": Case(
        "GatedAct", {"activation": "swiglu_clamped", "alpha": 1.702, "limit": 7.0}, {"B": 2, "T": 63, "J": 37, "I": 37}
    ),
    "GatedAct-halves": Case(
        "GatedAct",
        {"activation": "silu", "alpha": 0.0, "limit": 0.0},
        {"B": 2, "T": 63, "J": 144, "I": 72},
        without=1,
    ),
    "CausalConv1d": Case(
        "CausalConv1d",
        {"activation": "silu"},
        {"B": 2, "T": 63, "C": 72, "O": 1, "K": 4, "S": 3},
        fills={"end": last_token},
        exact=("next_state",),
    ),
    "CausalConv1d-no-bias": Case(
        "CausalConv1d",
        {"activation": "none"},
        {"B": 2, "T": 2, "C": 37, "O": 1, "K": 4, "S": 3},
        without=1,
        fills={"end": last_token},
        exact=("next_state",),
    ),
    "GatedRmsNorm": Case(
        "GatedRmsNorm",
        {"epsilon": 1e-6, "activation": "silu", "round_before_weight": False},
        {"B": 2, "T": 63, "H": 3, "D": 40},
    ),
    "GatedRmsNorm-rounded": Case(
        "GatedRmsNorm",
        {"epsilon": 1e-6, "activation": "sigmoid", "round_before_weight": True},
        {"B": 1, "T": 65, "H": 2, "D": 128},
    ),
    "MoeRoute": Case(
        "MoeRoute",
        {"top_k": 4, "scoring": "sigmoid", "renormalise": True, "scale": 2.5, "groups": 4, "groups_kept": 2, **BEST},
        {"B": 2, "T": 63, "E": 32},
        exact=("experts",),
    ),
    "MoeRoute-best-of-group": Case(
        "MoeRoute",
        {"top_k": 6, "scoring": "softmax", "renormalise": False, "scale": 16.0, "groups": 8, "groups_kept": 3}
        | {"group_best": 1},
        {"B": 1, "T": 9, "E": 160},
        without=1,
        exact=("experts",),
    ),
    "MoeRoute-no-bias": Case(
        "MoeRoute",
        {"top_k": 3, "scoring": "softmax", "renormalise": False, "scale": 1.0, "groups": 1, "groups_kept": 1, **BEST},
        {"B": 2, "T": 63, "E": 60},
        without=1,
        exact=("experts",),
    ),
    "MoeRoute-of-the-chosen": Case(
        "MoeRoute",
        {
            "top_k": 4,
            "scoring": "softmax_top_k",
            "renormalise": False,
            "scale": 1.0,
            "groups": 1,
            "groups_kept": 1,
            **BEST,
        },
        {"B": 1, "T": 130, "E": 128},
        without=1,
        exact=("experts",),
    ),
    "MoeRoute-bias": Case(
        "MoeRoute",
        {"top_k": 8, "scoring": "softmax", "renormalise": True, "scale": 1.0, "groups": 1, "groups_kept": 1, **BEST},
        {"B": 1, "T": 64, "E": 256},
        exact=("experts",),
    ),
    "MoeExperts": Case(
        "MoeExperts",
        {"activation": "silu", "alpha": 0.0, "limit": 0.0, **EXPERTS},
        EXPERT_SIZES,
        without=8,
        fills=EXPERT_FILLS,
        units=EXPERT_UNITS,
    ),
    "MoeExperts-mxfp4": Case(
        "MoeExperts",
        {"activation": "swiglu_clamped", "alpha": 1.702, "limit": 7.0, **EXPERTS, "interleaved": True}
        | {"format": "mxfp4", "group": 32},
        MXFP4_SIZES,
        without=4,
        fills=MXFP4_FILLS,
        stored=torch.uint8,
        units=EXPERT_UNITS,
    ),
    "MoeExperts-uint4": Case(
        "MoeExperts",
        {"activation": "silu", "alpha": 0.0, "limit": 0.0, **EXPERTS, "format": "uint4", "group": 24},
        UINT4_SIZES,
        fills=UINT4_FILLS,
        stored=torch.uint8,
        scales=torch.float32,
        units=EXPERT_UNITS,
    ),
    "SinkAttention": Case(
        "SinkAttention",
        {"scale": 0.125, "softcap": 0.0, "window": 16},
        {"B": 2, "H": 4, "G": 2, "T": 33, "S": 65, "D": 64},
        fills=KEYS,
        units=ATTENTION_UNITS,
    ),
    "SinkAttention-no-sinks": Case(
        "SinkAttention",
        {"scale": 0.125, "softcap": 30.0, "window": 0},
        {"B": 2, "H": 4, "G": 2, "T": 1, "S": 65, "D": 64},
        without=1,
        fills=KEYS,
        units=ATTENTION_UNITS,
    ),
    "Wkv": Case("Wkv", {}, {"B": 2, "T": 63, "C": 37}, fills={"present": mostly, "denominator": weight}),
    "Wkv7": Case(
        "Wkv7",
        {},
        {"B": 2, "T": 9, "H": 3, "D": 16, "V": 20},
        fills={"present": mostly, "kappa": unit, "a": probability, "k": small},
    ),
    "KimiDeltaRule": Case(
        "KimiDeltaRule",
        {"scale": 0.25, "l2_norm": True},
        {"B": 2, "T": 9, "H": 3, "D": 16, "V": 32},
        fills=DELTA_FILLS,
    ),
    "KimiDeltaRule-chunks": Case(
        "KimiDeltaRule",
        {"scale": 0.125, "l2_norm": True},
        {"B": 2, "T": 65, "H": 2, "D": 64, "V": 64},
        fills=DELTA_FILLS,
        units=CHUNK_UNITS,
    ),
    "GatedDeltaNet": Case(
        "GatedDeltaNet",
        {"scale": 0.25, "l2_norm": True, **NET_NORM},
        {"B": 2, "T": 1, "C": 192, "H": 4, "D": 16, "V": 32, **NET_TAPS},
        fills=NET_FILLS,
        units=NET_UNITS,
    ),
    "GatedDeltaNet-few": Case(
        "GatedDeltaNet",
        {"scale": 0.25, "l2_norm": True, **NET_NORM, "activation": "sigmoid", "round_before_weight": False},
        {"B": 2, "T": 9, "C": 192, "H": 4, "D": 16, "V": 32, **NET_TAPS},
        fills=NET_FILLS,
        units=NET_UNITS,
    ),
    "GatedDeltaNet-chunks": Case(
        "GatedDeltaNet",
        {"scale": 0.125, "l2_norm": True, **NET_NORM},
        {"B": 2, "T": 65, "C": 256, "H": 2, "D": 64, "V": 64, **NET_TAPS},
        fills=NET_FILLS,
        units=(CHUNK_UNITS[0], NET_UNITS[1]),
    ),
    "GatedDeltaRule": Case(
        "GatedDeltaRule",
        {"scale": 0.25, "l2_norm": True},
        {"B": 2, "T": 9, "G": 2, "H": 4, "D": 16, "V": 32},
        fills=DELTA_FILLS,
    ),
    "GatedDeltaRule-chunks": Case(
        "GatedDeltaRule",
        {"scale": 0.125, "l2_norm": True},
        {"B": 2, "T": 65, "G": 1, "H": 2, "D": 64, "V": 64},
        fills=DELTA_FILLS,
        units=CHUNK_UNITS,
    ),
}


def served() -> set[str]:
    """The ops that have a plugin; another is built from its function body."""
    return {op.name for op in OPS.values() if (PLUGINS / op.torch_name / "plugin.cpp").is_file()}


def plugins() -> set[str]:
    """The plugins of the library."""
    routes = {*SHARED_ROUTES} if ROUTE in served() else set()
    return (
        served()
        | {f"{JOINED}{op}" for op in served() if OPS[op].joins}
        | {*ADDENDS}
        | ({*NORMED_ROUTES} if routes else set())
        | routes
        | {f"{JOINED}{route}" for route in routes}
        | {f"{BIASED}{JOINED}{op}" for op in BIASABLE}
    )


CASES = {name: case for name, case in ALL_CASES.items() if case.op in served()}
