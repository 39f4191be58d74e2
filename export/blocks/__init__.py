"""Torch modules that read a spec; the meaning of every block."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from llmexport.export import spec
from llmexport.export.blocks.attention import Attention
from llmexport.export.blocks.bias import Alibi, RelativeBias
from llmexport.export.blocks.context import (
    BidirectionalMask,
    Mask,
    PlacedTemperature,
    Presence,
    Rotary,
    Span,
    Temperature,
)
from llmexport.export.blocks.cross import CrossAttention, CrossKeys, CrossMask
from llmexport.export.blocks.decoder import Embedding, Head
from llmexport.export.blocks.delta import CausalConv, GatedDeltaNet, GatedNorm
from llmexport.export.blocks.disentangled import DisentangledAttention, RelativePositions
from llmexport.export.blocks.filtered import FilteredAttention, LocalizedFilter
from llmexport.export.blocks.kimi_delta import KimiDeltaAttention
from llmexport.export.blocks.latent import LatentAttention
from llmexport.export.blocks.layer import Layer
from llmexport.export.blocks.mlp import Mlp
from llmexport.export.blocks.moe import Experts, MlpWithExperts, Moe, Router, SharedExpert
from llmexport.export.blocks.norm import Norm
from llmexport.export.blocks.passage import Passage
from llmexport.export.blocks.patches import (
    PatchEmbedding,
    PatchMerger,
    PatchPlaces,
    PatchPositions,
    PatchRotary,
    SegmentMask,
)
from llmexport.export.blocks.per_layer import PerLayerEmbedding, PerLayerInput
from llmexport.export.blocks.splice import Splice
from llmexport.export.blocks.static import Slots, StaticMask, StaticPresence, StaticSpan, StaticTemperature
from llmexport.export.blocks.tiles import PixelShuffle, PooledProjector, Projector, TileEmbedding, TileRotary
from llmexport.export.blocks.wkv import ChannelMix, TimeMix
from llmexport.export.blocks.wkv7 import DeltaTimeMix, ShiftedMlp


def module(block: spec.Block, dtype: torch.dtype) -> nn.Module:
    """The module that computes `block` in `dtype`, its parameters on the meta device: shapes, no memory.

    Buffers are real: constants that follow from the spec, fp32 whatever `dtype` is. Parameter paths are those that
    `Arch.names` maps to a checkpoint. `forward` takes the block's input ports in order and returns its output
    ports, a tuple if there are several.
    """
    with torch.device("meta"):
        made = _module(block, dtype)
    for path, parameter in made.named_parameters():
        if block.dtype_of(path) in ("T", "W"):
            parameter.data = parameter.data.to(dtype)
    return made.requires_grad_(False).eval()


def _module(block: spec.Block, dtype: torch.dtype) -> nn.Module:
    match block:
        case spec.Embedding():
            return Embedding(block, dtype)
        case spec.Layer():
            return Layer(block, _module, dtype)
        case spec.Alibi():
            return Alibi(block, dtype)
        case spec.RelativeBias():
            return RelativeBias(block)
        case spec.PerLayerEmbedding():
            return PerLayerEmbedding(block, dtype)
        case spec.Rotary():
            return Rotary(block, dtype)
        case spec.PatchRotary():
            return PatchRotary(block, dtype)
        case spec.TileRotary():
            return TileRotary(block, dtype)
        case spec.Presence():
            return StaticPresence(dtype) if block.static else Presence(dtype)
        case spec.BidirectionalMask():
            return BidirectionalMask()
        case spec.CrossMask():
            return CrossMask()
        case spec.Slots():
            return Slots()
        case spec.Span():
            return StaticSpan(block.keys) if block.keys else Span()
        case spec.Mask(keys=spec.Keys()):
            return StaticMask(block)
        case spec.Temperature(placed=True):
            return PlacedTemperature(block)
        case spec.Temperature(static=True):
            return StaticTemperature(block)
    return PLAIN[type(block)](block)


def matrices(block: spec.Block) -> list[str]:
    """Paths of the weights [out, in] of a block's Linear layers, without those that have a class of their own."""
    made = module(block, torch.float32)
    return [f"{path}.weight" for path, inner in made.named_modules() if type(inner) is nn.Linear]


# The modules that are made of their block alone.
PLAIN: dict[type[spec.Block], Callable[[Any], nn.Module]] = {
    spec.Attention: Attention,
    spec.CausalConv: CausalConv,
    spec.DeltaTimeMix: DeltaTimeMix,
    spec.DisentangledAttention: DisentangledAttention,
    spec.ChannelMix: ChannelMix,
    spec.CrossAttention: CrossAttention,
    spec.CrossKeys: CrossKeys,
    spec.Experts: Experts,
    spec.FilteredAttention: FilteredAttention,
    spec.GatedDeltaNet: GatedDeltaNet,
    spec.GatedNorm: GatedNorm,
    spec.Head: Head,
    spec.KimiDeltaAttention: KimiDeltaAttention,
    spec.LatentAttention: LatentAttention,
    spec.LocalizedFilter: LocalizedFilter,
    spec.Mask: Mask,
    spec.Mlp: Mlp,
    spec.MlpWithExperts: MlpWithExperts,
    spec.Moe: Moe,
    spec.Norm: Norm,
    spec.Passage: Passage,
    spec.PatchEmbedding: PatchEmbedding,
    spec.PatchMerger: PatchMerger,
    spec.PatchPlaces: PatchPlaces,
    spec.PatchPositions: PatchPositions,
    spec.PerLayerInput: PerLayerInput,
    spec.PixelShuffle: PixelShuffle,
    spec.PooledProjector: PooledProjector,
    spec.Projector: Projector,
    spec.RelativePositions: RelativePositions,
    spec.Router: Router,
    spec.SegmentMask: SegmentMask,
    spec.SharedExpert: SharedExpert,
    spec.ShiftedMlp: ShiftedMlp,
    spec.Splice: Splice,
    spec.TileEmbedding: TileEmbedding,
    spec.Temperature: Temperature,
    spec.TimeMix: TimeMix,
}
