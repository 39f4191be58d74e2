"""What follows the mixer in a layer: the MLP, and the mixture of experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from llmexport.export.errors import ExportError
from llmexport.export.spec.block import BATCH, SEQUENCE, Block, Dim, Port, hidden
from llmexport.export.spec.mixer import Norm
from llmexport.export.spec.storage import Plain, Storage, Stored

Activation = Literal["silu", "gelu_tanh", "gelu_erf", "gelu_sigmoid", "relu", "relu2", "swiglu_clamped"]


@dataclass(frozen=True)
class Mlp(Block):
    """Gated MLP (arXiv 2002.05202): down(activation(gate(x)) * up(x)). `fused`: gate and up are one matrix.

    Unless `gated`, it is down(activation(up(x))). GELU is x times the normal distribution up to x ("gelu_erf"), or one
    of its approximations (arXiv 1606.08415): with a tanh, which most models mean by its other names, or with
    sigmoid(1.702 x). `transposed`: matrices are [in, out] (Conv1D, modeling_gpt2.py). `axes` are those of rows and of
    tokens.
    """

    hidden: int
    intermediate: int
    activation: Activation
    bias: bool = False
    fused: bool = False
    gated: bool = True
    transposed: bool = False
    axes: tuple[Dim, Dim] = (BATCH, SEQUENCE)

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (hidden("normed", self.hidden, self.axes),)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (hidden("mixed", self.hidden, self.axes),)


@dataclass(frozen=True)
class Router(Block):
    """Which `top_k` of the experts a token goes to, and with what weight (the MoeRoute op).

    `correction`: experts are chosen by score plus one number each, which their weights leave out. Of `groups` of
    experts, `groups_kept` are eligible: those whose `group_best` best choices sum highest. `scale` multiplies the
    weights. `wide`: all is computed in float32, of the router's own weights too, and what comes out is rounded once
    (modeling_deepseek_v3.py). It may have a `norm` of its own and an `input_scale` for what it reads; with
    `expert_scale` one number for each expert multiplies weights (modeling_gemma4.py). "sparse_mixer" is no mode of the
    op: each of two choices is weighed against the experts that are within `jitter` of it (modeling_phimoe.py).
    """

    hidden: int
    experts: int
    top_k: int
    scoring: Literal["softmax", "softmax_top_k", "sigmoid", "sparse_mixer"]
    renormalise: bool = False
    bias: bool = False
    correction: bool = False
    groups: int = 1
    groups_kept: int = 1
    group_best: int = 2
    scale: float = 1.0
    wide: bool = False
    norm: Norm | None = None
    input_scale: float = 1.0
    expert_scale: bool = False
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if self.top_k > self.experts:
            raise ExportError(f"config.json: num_experts_per_tok is {self.top_k}, there are {self.experts} experts")
        if self.experts % self.groups or (self.groups > 1 and self.experts < 2 * self.groups):
            raise ExportError(f"config.json: {self.experts} experts are not {self.groups} groups of two or more")
        if not 1 <= self.groups_kept <= self.groups:
            raise ExportError(
                f"config.json: topk_group is {self.groups_kept}, there are {self.groups} groups of experts"
            )
        if self.top_k > self.groups_kept * self.experts // self.groups:
            raise ExportError(
                f"config.json: num_experts_per_tok is {self.top_k}, the {self.groups_kept} groups that a token may "
                f"choose from have {self.groups_kept * self.experts // self.groups} experts"
            )

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (hidden("normed", self.hidden),)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return routed(self.top_k)

    @property
    def stored(self) -> Mapping[str, Stored]:
        if not self.wide:
            return {}
        own = {"bias": self.bias, "correction": self.correction}
        rows = {name: Stored("", (self.experts,), "F") for name, there in own.items() if there}
        return {"weight": Stored("", (self.experts, self.hidden), "F"), **rows}

    @property
    def parts(self) -> Mapping[str, tuple[Block, str]]:
        return {"norm": (self.norm, "norm.")} if self.norm else {}


@dataclass(frozen=True)
class Experts(Block):
    """The experts' gated MLPs, of which each token runs the chosen `top_k` (the MoeExperts op).

    Weights are [E, 2I, C] and [E, C, I], or the other way round if `transposed`; gate and up are halves of 2I, or
    alternate if `interleaved`. `scale_input`: the routing weight multiplies what goes in, not what comes out.
    `storage` is that of each expert's matrices.
    """

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    activation: Activation = "silu"
    alpha: float = 0.0
    limit: float = 0.0
    transposed: bool = False
    interleaved: bool = False
    bias: bool = False
    scale_input: bool = False
    storage: Storage = dataclasses.field(default=Plain())

    def __post_init__(self) -> None:
        try:
            scaled = any(len(held) > 1 for held in self.matrices.values())
        except ExportError as error:
            says = f"hidden_size {self.hidden} and intermediate_size {self.intermediate}"
            raise ExportError(f"config.json says {says}: {error}, is it from the same model?") from error
        if scaled and self.transposed:
            raise ValueError("experts with scales are not transposed")

    @property
    def sizes(self) -> Mapping[str, tuple[int, int]]:
        """Rows and columns of an expert's matrices, by name."""
        return {"gate_up_proj": (2 * self.intermediate, self.hidden), "down_proj": (self.hidden, self.intermediate)}

    @property
    def matrices(self) -> Mapping[str, tuple[Stored, ...]]:
        """What holds a matrix of all experts, by its name."""
        turn, each = -1 if self.transposed else 1, {"gate_up_proj": 2, "down_proj": 1}
        sizes = {n: (size[::turn], each[n]) for n, size in self.sizes.items()}
        held = {n: self.storage.tensors(rows, columns, count) for n, ((rows, columns), count) in sizes.items()}
        return {n: tuple(map(self._of_all, tensors)) for n, tensors in held.items()}

    @property
    def stored(self) -> Mapping[str, Stored]:
        return {name + s.suffix: s for name, held in self.matrices.items() for s in held}

    def _of_all(self, one: Stored) -> Stored:
        # The op casts floats itself, expert by expert: these are the largest weights there are.
        return dataclasses.replace(one, shape=(self.experts, *one.shape), dtype="W" if one.dtype == "T" else one.dtype)

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (hidden("normed", self.hidden), *routed(self.top_k))

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (hidden("mixed", self.hidden),)


@dataclass(frozen=True)
class SharedExpert(Block):
    """The expert that every token runs; `gated`: times the sigmoid of a projection to one number."""

    mlp: Mlp
    gated: bool = False

    @property
    def inputs(self) -> tuple[Port, ...]:
        return self.mlp.inputs

    @property
    def outputs(self) -> tuple[Port, ...]:
        return self.mlp.outputs


@dataclass(frozen=True)
class Moe(Block):
    """Mixture of experts: the routed ones, and the shared one if there is any, summed."""

    router: Router
    experts: Experts
    shared: SharedExpert | None = None

    @property
    def inputs(self) -> tuple[Port, ...]:
        return self.router.inputs

    @property
    def outputs(self) -> tuple[Port, ...]:
        return self.experts.outputs

    @property
    def parts(self) -> Mapping[str, tuple[Block, str]]:
        shared = {"shared": (self.shared, "shared_expert.")} if self.shared else {}
        return {"router": (self.router, "router."), "experts": (self.experts, "experts."), **shared}


@dataclass(frozen=True)
class MlpWithExperts(Block):
    """An MLP and routed experts side by side, each between norms of its own, summed; the router reads what neither of
    these norms has touched (modeling_gemma4.py)."""

    norm: Norm
    mlp: Mlp
    router: Router
    experts: Experts

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (hidden("hidden", self.mlp.hidden),)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return self.experts.outputs

    @property
    def parts(self) -> Mapping[str, tuple[Block, str]]:
        names = ("mlp_input_norm", "mlp_output_norm", "experts_input_norm", "experts_output_norm")
        norms = {name: (self.norm, f"{name}.") for name in names}
        return {
            **norms,
            "mlp": (self.mlp, "mlp."),
            "router": (self.router, "router."),
            "experts": (self.experts, "experts."),
        }


def routed(top_k: int) -> tuple[Port, Port]:
    """The ports of a routing."""
    shape = (BATCH, SEQUENCE, top_k)
    return Port("weights", shape, use="routing_weights"), Port("experts", shape, "int32", "routing_experts")
