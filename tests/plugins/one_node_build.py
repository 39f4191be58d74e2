"""Builds an engine of one op in TensorRT-RTX: python one_node_build.py LIBRARY OP DTYPE ATTRIBUTES-AS-JSON.

A process of its own, as the parser ends the process on some errors. Prints the layer types of the network and
the bytes of the plan as JSON.
"""

import json
import sys
from pathlib import Path

import onnx
import tensorrt_rtx as trt
from onnx import TensorProto, helper

from llmexport.plugins import library
from llmexport.plugins.spec import all_ops

TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
STATIC = {"H": 4, "D": 64, "R": 16, "C": 72, "I": 40}
DYNAMIC = {"B": (1, 2, 4), "T": (1, 63, 130)}


def model(name: str, dtype: str, attributes: dict[str, object]) -> onnx.ModelProto:
    op = all_ops()[name]
    inputs = [
        helper.make_tensor_value_info(n, TYPES[dtype], [STATIC.get(d, d) for d in dims])
        for n, dims in op.inputs.items()
    ]
    outputs = [helper.make_tensor_value_info(n, TYPES[dtype], None) for n in op.outputs]
    node = helper.make_node(name, list(op.inputs), list(op.outputs), name="node", domain="llmexport", **attributes)
    graph = helper.make_graph([node], "one", inputs, outputs)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("llmexport", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def main(path: str, name: str, dtype: str, attributes: str) -> None:
    logger = trt.Logger(trt.Logger.WARNING)
    library.load(trt, Path(path))
    library.load(trt, Path(path))
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model(name, dtype, json.loads(attributes)).SerializeToString()):
        sys.exit("\n".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for n, dims in all_ops()[name].inputs.items():
        sizes = [tuple((DYNAMIC[d][i] if d in DYNAMIC else STATIC[d]) for d in dims) for i in range(3)]
        profile.set_shape(n, *sizes)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    layers = [network.get_layer(i).type.name for i in range(network.num_layers)]
    print(json.dumps({"layers": layers, "bytes": plan.nbytes if plan else 0}))


if __name__ == "__main__":
    main(*sys.argv[1:])
