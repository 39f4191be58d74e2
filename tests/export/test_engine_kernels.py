"""The list of kernels as TensorRT writes it, and what cannot be read of one."""

import pytest

from llmexport.export.engine_kernels import Kernel, by_kind, listed, with_launches

IO = "Inputs: [ { Name: x, Dimensions: [-1,64], Datatype: Half }], Outputs: [], TacticName: t, StreamId: 0"
JOINED = "[ONNX Layer: a/q]\x1e[ONNX Layer: w/cast]\x1f[ONNX Layer: a/k]"
PLUGIN = 'PluginType: Q, PluginMetadata: "{"epsilon": 0, "norm_first": true}", TacticValue: 0x0, StreamId: 0'
# As TensorRT-RTX 1.7 lists them; separators of nodes are control characters.
LINES = (
    "Name: __mye2093_0_myl0_0, LayerType: shape_call, Inputs: [], Outputs: [], TacticName: , StreamId: 0, Metadata: ",
    f"Name: a/q+a/k_myl0_1, LayerType: gemm, {IO}, Metadata: {JOINED}",
    "Name: __mye24593_myl0_22, LayerType: signal, Inputs: [], Outputs: [], TacticName: , StreamId: 0, Metadata: ",
    "Name: __mye24595_myl0_23, LayerType: wait, Inputs: [], Outputs: [], TacticName: , StreamId: 1, Metadata: ",
    f"Name: __myl_Resh_myl0_2, LayerType: kgen, {IO}, Metadata: ",
    f"Name: a/rope, LayerType: PluginV3, Inputs: [], Outputs: [], {PLUGIN}, Metadata: [ONNX Layer: a/rope]",
    f"Name: a/experts_U1_myl0_3, LayerType: custom_layer, {IO}, Metadata: [ONNX Layer: a/experts][ONNX Layer: e/cast]",
    f"Name: __myl_FcAdd_myl0_4, LayerType: runtime_fusion, {IO}, Metadata: [ONNX Layer: a/o]",
    f"Name: head, LayerType: CaskGemm, {IO}",
)  # fmt: skip
LIST = "Layers:\n" + "\n".join(LINES) + "\n\nI/O Tensors:\n Name: x, IOMode: Input\n"
KERNELS = (
    Kernel("a/q+a/k_myl0_1", "gemm", ("a/q", "w/cast", "a/k")),
    Kernel("__myl_Resh_myl0_2", "generated", ()),
    Kernel("a/rope", "plugin", ("a/rope",)),
    Kernel("a/experts_U1_myl0_3", "plugin", ("a/experts", "e/cast")),
    Kernel("__myl_FcAdd_myl0_4", "gemm", ("a/o",)),
    Kernel("head", "CaskGemm", ()),
)


def test_a_list_is_its_kernels_in_their_order() -> None:
    assert listed([LIST]) == KERNELS


@pytest.mark.parametrize(
    "texts",
    [
        [],
        [LIST, LIST],
        ["Layers:\n"],
        ["Layers:\n\nI/O Tensors:\n"],
        [LIST.replace("LayerType: kgen", "Type: kgen")],
        [LIST.replace("Name: head", "head")],
    ],
    ids=["none", "two", "empty", "no layer", "a line without a type", "a line without a name"],
)
def test_what_cannot_be_read_is_no_list(texts: list[str]) -> None:
    assert listed(texts) is None


def test_a_plugin_launches_as_often_as_its_op() -> None:
    counted = with_launches(KERNELS, {"a/rope": 1, "a/experts": 3})
    assert counted is not None
    assert [k.launches for k in counted] == [1, 1, 1, 3, 1, 1]
    assert by_kind(counted) == {"gemm": 2, "generated": 1, "plugin": 4, "CaskGemm": 1}


@pytest.mark.parametrize(
    "ops", [{"a/rope": 1, "a/experts": 3, "a/other": 1}, {"a/rope": 1, "a/o": 1}], ids=["not listed", "not a plugin"]
)
def test_a_list_that_lacks_a_plugin_is_none(ops: dict[str, int]) -> None:
    assert with_launches(KERNELS, ops) is None
    assert with_launches(None, ops) is None
    assert with_launches((*KERNELS, KERNELS[2]), {"a/rope": 1, "a/experts": 3}) is None
