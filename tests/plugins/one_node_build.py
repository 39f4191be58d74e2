"""Builds engines of one op each in TensorRT-RTX: python one_node_build.py FOLDER LIBRARY ATTRIBUTES-AS-JSON DTYPE...

ATTRIBUTES maps the name of each case to the attributes of its op. Each case and dtype is built in a process of its own,
as the parser ends the process on some errors: it leaves what it says in FOLDER, in CASE.DTYPE.out and CASE.DTYPE.err,
and its exit code is in the JSON that is printed. Weights are constants, as in an export.
"""

import json
import multiprocessing
import os
import sys
from pathlib import Path

import onnx
import tensorrt_rtx as trt
from onnx import TensorProto, helper

sys.path.insert(0, str(Path(__file__).parents[1]))

from plugin_cases import ALL_CASES, Case, array_of

from llmexport.export.tensorrt_form import tensorrt_form
from llmexport.plugins import library
from llmexport.plugins.spec import VERSION

TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
TYPES |= {"int32": TensorProto.INT32, "uint8": TensorProto.UINT8}
DYNAMIC = "BT"


def is_weight(case: Case, name: str) -> bool:
    """Whether it has no dimension of its own for every batch; and nothing is left to run if that is all."""
    return name != case.inputs[0] and "B" not in case.spec.inputs[name]


def model(case: Case, dtype: str, attributes: dict[str, object]) -> onnx.ModelProto:
    arrays = {n: array_of(x) for n, x in zip(case.inputs, case.tensors(dtype), strict=True)}
    weights = [n for n in arrays if is_weight(case, n)]
    constants = [
        helper.make_tensor(n, TYPES[str(arrays[n].dtype)], arrays[n].shape, arrays[n].tobytes(), raw=True)
        for n in weights
    ]
    inputs = [
        helper.make_tensor_value_info(
            n, TYPES[str(array.dtype)], [d if d in DYNAMIC else case.sizes[d] for d in case.spec.inputs[n]]
        )
        for n, array in arrays.items()
        if n not in weights
    ]
    kinds = {n: str(case.dtype_of(n, dtype)).removeprefix("torch.") for n in case.spec.outputs}
    outputs = [helper.make_tensor_value_info(n, TYPES[kind], None) for n, kind in kinds.items()]
    node = helper.make_node(case.op, case.inputs, list(case.spec.outputs), "node", domain="llmexport", **attributes)
    graph = helper.make_graph([node], "one", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("llmexport", VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def build(path: str, name: str, attributes: dict[str, object], dtype: str) -> None:
    """Prints the layer types of the network and the bytes of the plan as JSON; ends the process if there is none."""
    case = ALL_CASES[name]
    logger = trt.Logger(trt.Logger.WARNING)
    library.load(trt, Path(path))
    library.load(trt, Path(path))
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    form, _ = tensorrt_form(model(case, dtype, attributes), library.served(Path(path)))
    if not parser.parse(form.SerializeToString()):
        sys.exit("\n".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, bool(case.spec.aliases))
    for n in case.inputs:
        if not is_weight(case, n):
            dims = case.spec.inputs[n]
            least = {**case.sizes, **dict.fromkeys(DYNAMIC, 1)}
            sizes = [tuple(s[d] for d in dims) for s in (least, case.sizes, case.sizes)]
            profile.set_shape(n, *sizes)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    kinds = [network.get_layer(i).type.name for i in range(network.num_layers)]
    # TensorRT makes a layer of each constant.
    layers = [kind for kind in kinds if kind != "CONSTANT"]
    if plan is None:
        sys.exit("no engine was built")
    print(json.dumps({"layers": layers, "bytes": plan.nbytes}))


def leaving(folder: str, path: str, name: str, attributes: dict[str, object], dtype: str) -> None:
    """Builds, with standard output and error in files."""
    for stream, end in ((sys.stdout, "out"), (sys.stderr, "err")):
        with open(Path(folder) / f"{name}.{dtype}.{end}", "xb") as file:
            os.dup2(file.fileno(), stream.fileno())
    build(path, name, attributes, dtype)
    sys.stdout.flush()


def main(folder: str, path: str, attributes: str, *dtypes: str) -> None:
    # What is imported here once takes longer than a build.
    forked = multiprocessing.get_context("fork")
    codes: dict[str, dict[str, int | None]] = {}
    for name, of_it in json.loads(attributes).items():
        codes[name] = {}
        for dtype in dtypes:
            child = forked.Process(target=leaving, args=(folder, path, name, of_it, dtype))
            child.start()
            child.join()
            codes[name][dtype] = child.exitcode
    print(json.dumps(codes))


if __name__ == "__main__":
    main(*sys.argv[1:])
