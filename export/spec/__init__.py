"""What a model is made of, as frozen data: blocks, the model built from them, and an architecture.

A block is a hashable value: equal blocks are traced once. Every block names its inputs and outputs as `Port`s,
whose symbolic dimensions are the dynamic axes of the exported graph. Nothing here imports torch.
"""

from llmexport.export.spec.axis import AXES, BATCH, PAST, SEQUENCE, TOTAL, Axis, Sizes, summands, with_sums
from llmexport.export.spec.block import DTYPES, OPSET, Block, Dim, Port, State
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
from llmexport.export.spec.feed_forward import Activation, Experts, Mlp, Moe, Router, SharedExpert
from llmexport.export.spec.graph import Assembly, Graph, Step
from llmexport.export.spec.layer import Layer, Sublayer, decoder_layer
from llmexport.export.spec.mixer import Attention, CausalConv, GatedDeltaNet, GatedNorm, Mixer, Norm
from llmexport.export.spec.model import (
    Arch,
    Embedding,
    Head,
    Model,
    Whole,
    from_data,
    to_data,
)
from llmexport.export.spec.storage import ANY_FLOAT, Mxfp4, Plain, Storage, Stored

__all__ = [
    "ANY_FLOAT",
    "AXES",
    "BATCH",
    "DTYPES",
    "OPSET",
    "PAST",
    "SEQUENCE",
    "TOTAL",
    "Activation",
    "Arch",
    "Assembly",
    "Attention",
    "Axis",
    "Block",
    "CausalConv",
    "Dim",
    "Embedding",
    "Experts",
    "GatedDeltaNet",
    "GatedNorm",
    "Graph",
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
    "Mxfp4",
    "Norm",
    "Plain",
    "Port",
    "Presence",
    "Rotary",
    "Router",
    "Scaling",
    "SharedExpert",
    "Sizes",
    "Span",
    "State",
    "Step",
    "Storage",
    "Stored",
    "Sublayer",
    "Temperature",
    "Whole",
    "YarnScaling",
    "decoder_layer",
    "from_data",
    "summands",
    "to_data",
    "with_sums",
]
