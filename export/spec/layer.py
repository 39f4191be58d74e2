"""A residual layer: a row of sublayers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from llmexport.export.spec.block import Block, Port, State
from llmexport.export.spec.mixer import Mixer, Norm


@dataclass(frozen=True)
class Sublayer:
    """x + output_norm(block(input_norm(x))), then sum_norm of that: a norm that is None is not there.

    Pre-norm layers have the first (Llama), sandwich norms the first two (modeling_gemma2.py), OLMo 2 the second
    alone, BERT the third alone. `scale` multiplies what is added to x (modeling_granite.py), and `kept` multiplies x
    (DeepNorm, arXiv 2203.00555). `from_normed`: input_norm(x) takes the place of x in the sum, too (modeling_bloom.py,
    apply_residual_connection_post_layernorm).
    """

    name: str
    block: Block
    input_norm: Norm | None = None
    output_norm: Norm | None = None
    sum_norm: Norm | None = None
    scale: float = 1.0
    kept: float = 1.0
    from_normed: bool = False

    @property
    def norms(self) -> Mapping[str, Norm]:
        """The norms that it has, by the names of their parameters in the layer: `mlp_input_norm`."""
        found = {n: getattr(self, n) for n in ("input_norm", "output_norm", "sum_norm")}
        return {f"{self.name}_{n}": norm for n, norm in found.items() if norm}


@dataclass(frozen=True)
class Layer(Block):
    """Sublayers one after the other; `parallel`: all read the layer's input, those without an input norm of their own
    through the first one's.

    The first input and output of a sublayer's block are hidden states; its others are the layer's. `scaled`: a weight
    of one number multiplies what comes out (modeling_gemma4.py).
    """

    sublayers: tuple[Sublayer, ...]
    parallel: bool = False
    scaled: bool = False

    def __post_init__(self) -> None:
        if self.parallel and any(s.from_normed or s.kept != 1.0 for s in self.sublayers):
            raise ValueError("what parallel sublayers give is added to the layer's input as it is")
        read = {p for s in self.sublayers for p in s.block.inputs[1:]}
        if len(read) > len({p.name for p in read}):
            raise ValueError(f"two sublayers read different ports of one name, of {sorted(p.name for p in read)}")
        given = [p.name for p in self.outputs]
        if len(given) > len(set(given)):
            raise ValueError(f"two sublayers give the same of {', '.join(given)}")

    @property
    def inputs(self) -> tuple[Port, ...]:
        read = {p.name: p for s in self.sublayers for p in s.block.inputs[1:]}
        return (self._hidden("hidden"), *read.values())

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (self._hidden("hidden_out"), *(p for s in self.sublayers for p in s.block.outputs[1:]))

    @property
    def states(self) -> tuple[State, ...]:
        return tuple(state for s in self.sublayers for state in s.block.states)

    @property
    def most(self) -> Mapping[str, int]:
        return {axis: size for s in self.sublayers for axis, size in s.block.most.items()}

    @property
    def parts(self) -> Mapping[str, tuple[Block, str]]:
        found: dict[str, tuple[Block, str]] = {}
        for s in self.sublayers:
            norms = {n: (norm, f"{n}.") for n, norm in s.norms.items()}
            first = {n: part for n, part in norms.items() if n.endswith("_input_norm")}
            found |= first | {s.name: (s.block, f"{s.name}.")} | norms
        return found

    def _hidden(self, name: str) -> Port:
        return dataclasses.replace(self.sublayers[0].block.inputs[0], name=name)


def decoder_layer(
    input_norm: Norm | None,
    mixer: Mixer,
    post_attention_norm: Norm | None,
    mlp: Block,
    mixer_output_norm: Norm | None = None,
    mlp_output_norm: Norm | None = None,
    *,
    parallel: bool = False,
) -> Layer:
    """The layer of most decoders: a mixer, then an MLP or experts, by the names that checkpoints give them."""
    first = Sublayer(mixer.sublayer, mixer, input_norm, mixer_output_norm)
    return Layer((first, Sublayer("mlp", mlp, post_attention_norm, mlp_output_norm)), parallel)
