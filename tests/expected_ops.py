"""What the passes must make of an export, counted from the blocks that it is made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from llmexport.export.spec import Assembly, Attention, DecoderLayer, Head, Moe, Norm, Step

NO_SUM = "its input is not a sum"
NO_SILU = "the sigmoid is not multiplied with its own input"


def ops(assembly: Assembly) -> dict[str, int]:
    """How often each op of ours occurs."""
    found: Counter[str] = Counter()
    for step in assembly.steps:
        found.update(_block_ops(step))
    return dict(found)


def fusions(assembly: Assembly) -> dict[str, dict[str, Any]]:
    """What the manifest must say of every pass: how many were fused, and which were left and why."""
    norms, sigmoids = (list(find(assembly)) for find in (_lonely_norms, _gates))
    count = ops(assembly)
    return {
        "fuse_add_rms_norm": {"count": count.get("AddRmsNorm", 0), "refused": norms},
        "fuse_gated_act": {"count": count.get("GatedAct", 0), "refused": sigmoids},
    }


def _block_ops(step: Step) -> Iterator[str]:
    if isinstance(step.block, Head):
        yield from ["AddRmsNorm"] * _is_rms(step.block.norm)
    if isinstance(step.block, DecoderLayer):
        layer = step.block
        # The first norm of all reads the embedding, every other one the sum that the layer before it ends with.
        yield from ["AddRmsNorm"] * (_is_rms(layer.input_norm) and not _is_first(step))
        yield from _mixer_ops(layer)
        yield from ["AddRmsNorm"] * _is_rms(layer.post_attention_norm)
        yield from _feed_forward_ops(layer)


def _mixer_ops(layer: DecoderLayer) -> Iterator[str]:
    if not isinstance(layer.mixer, Attention):
        yield from ("CausalConv1d", "GatedDeltaRule", "GatedRmsNorm")
        return
    if layer.mixer.turned:
        yield from ("Rope", "Rope")
    if layer.mixer.sinks or layer.mixer.softcap:
        yield "SinkAttention"


def _feed_forward_ops(layer: DecoderLayer) -> Iterator[str]:
    if not isinstance(layer.mlp, Moe):
        yield "GatedAct"
        return
    yield from ("MoeRoute", "MoeExperts")
    if layer.mlp.shared:
        yield "GatedAct"


def _lonely_norms(assembly: Assembly) -> Iterator[list[str]]:
    """The RMSNorms that read no sum: the model's first, those of q and k, and those of a sublayer's output."""
    for step in assembly.steps:
        if isinstance(step.block, DecoderLayer):
            layer = step.block
            heads = layer.mixer.qk_norm if isinstance(layer.mixer, Attention) else None
            in_order: list[tuple[Norm | None, bool]] = [
                (layer.input_norm, _is_first(step)),
                (heads, True),
                (heads, True),
                (layer.mixer_output_norm, True),
                (layer.post_attention_norm, False),
                (layer.mlp_output_norm, True),
            ]
            lonely = [alone for norm, alone in in_order if norm and _is_rms(norm)]
            yield from ([_numbered(step, "rms_norm", i), NO_SUM] for i, alone in enumerate(lonely) if alone)


def _gates(assembly: Assembly) -> Iterator[list[str]]:
    """The sigmoids that gate something else than their own input: a head, the shared expert, a correction."""
    for step in assembly.steps:
        if isinstance(step.block, DecoderLayer):
            mixer, mlp = step.block.mixer, step.block.mlp
            gates = mixer.output_gate if isinstance(mixer, Attention) else True
            shared = isinstance(mlp, Moe) and mlp.shared is not None and mlp.shared.gated
            yield from ([_numbered(step, "sigmoid", i), NO_SILU] for i in range(gates + shared))


def _is_rms(norm: Norm) -> bool:
    return norm.statistics == "rms"


def _is_first(step: Step) -> bool:
    return step.inputs[0] == "hidden.0"


def _numbered(step: Step, name: str, i: int) -> str:
    """What a trace calls the (i + 1)-th node of a name."""
    return f"{step.name}/{name}" + (f"_{i}" if i else "")
