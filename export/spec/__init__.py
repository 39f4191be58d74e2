"""What a model is made of, as frozen data: blocks, the model built from them, and an architecture.

A block is a hashable value: equal blocks are traced once. Every block names its inputs and outputs as `Port`s,
whose symbolic dimensions are the dynamic axes of the exported graph. Nothing here imports torch.
"""

from llmexport.export.spec.block import BATCH, DTYPES, OPSET, PAST, SEQUENCE, TOTAL, Block, Dim, Port
from llmexport.export.spec.context import (
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    Mask,
    Presence,
    Rotary,
    Scaling,
    Span,
    Temperature,
    YarnScaling,
)
from llmexport.export.spec.feed_forward import MXFP4_BLOCK, Activation, Experts, Mlp, Moe, Router, SharedExpert
from llmexport.export.spec.mixer import Attention, CausalConv, GatedDeltaNet, GatedNorm, Mixer, Norm
from llmexport.export.spec.model import (
    Arch,
    DecoderLayer,
    Embedding,
    Head,
    Layer,
    Model,
    Whole,
    from_data,
    to_data,
)

__all__ = [
    "BATCH",
    "DTYPES",
    "MXFP4_BLOCK",
    "OPSET",
    "PAST",
    "SEQUENCE",
    "TOTAL",
    "Activation",
    "Arch",
    "Attention",
    "Block",
    "CausalConv",
    "DecoderLayer",
    "Dim",
    "Embedding",
    "Experts",
    "GatedDeltaNet",
    "GatedNorm",
    "Head",
    "Layer",
    "LinearScaling",
    "Llama3Scaling",
    "LongScaling",
    "Mask",
    "Mixer",
    "Mlp",
    "Model",
    "Moe",
    "Norm",
    "Port",
    "Presence",
    "Rotary",
    "Router",
    "Scaling",
    "SharedExpert",
    "Span",
    "Temperature",
    "Whole",
    "YarnScaling",
    "from_data",
    "to_data",
]
