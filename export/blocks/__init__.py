"""Torch modules that read a spec; the meaning of every block."""

import torch
from torch import nn

from llmexport.export import spec
from llmexport.export.blocks.attention import Attention, Mask, Rotary
from llmexport.export.blocks.decoder import DecoderLayer, Embedding, Head
from llmexport.export.blocks.mlp import Mlp
from llmexport.export.blocks.norm import Norm


def module(block: spec.Block, dtype: torch.dtype) -> nn.Module:
    """The module that computes `block` in `dtype`, its parameters on the meta device: shapes, no memory.

    Buffers are real: constants that follow from the spec, fp32 whatever `dtype` is. Parameter paths are those that
    `Arch.names` maps to a checkpoint. `forward` takes the block's input ports in order and returns its output
    ports, a tuple if there are several.
    """
    with torch.device("meta"):
        made = _module(block, dtype)
    for parameter in made.parameters():
        parameter.data = parameter.data.to(dtype)
    return made.requires_grad_(False).eval()


def _module(block: spec.Block, dtype: torch.dtype) -> nn.Module:
    match block:
        case spec.Embedding():
            return Embedding(block, dtype)
        case spec.Rotary():
            return Rotary(block, dtype)
        case spec.Mask():
            return Mask(block)
        case spec.Norm():
            return Norm(block)
        case spec.Attention():
            return Attention(block)
        case spec.Mlp():
            return Mlp(block)
        case spec.DecoderLayer():
            return DecoderLayer(block)
        case spec.Head():
            return Head(block)
    raise TypeError(f"no module for {type(block).__name__}")
