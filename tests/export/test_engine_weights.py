"""Networks whose weights are inputs: a real parser and builder, no GPU."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from arch_cases import COMPUTED, FEW_MATRICES, FIRST, MATRIX, ONCE, UNBOUND, Case, in_each_dtype, others_slow
from native import emulated_library
from onnx import TensorProto, helper
from onnx.helper import make_node

from llmexport.export import beside, builder, engine, engine_weights, manifest
from llmexport.export.cli.engine import summary
from llmexport.export.errors import EngineError

trt = pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")
pytestmark = pytest.mark.engine
Exporter = Callable[..., Path]


class Read(Exception):
    """The network was read, and what follows is no part of the test."""


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "LARGE", MATRIX)


# Each architecture with plugins and from bodies; those that are tested in more dtypes, in these in turn.
AT_ONCE = [(c, d, i % 3 > 0) for i, (c, d) in enumerate(ONCE)]
EACH = [*AT_ONCE, *((c, d, not p) for c, d, p in AT_ONCE)]
EACH += [(c, d, i % 2 > 0) for i, (c, d) in enumerate(in_each_dtype(FIRST)) if (c, d) not in ONCE]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("case", "dtype", "plugins"), others_slow(EACH, AT_ONCE), ids=str)
def test_no_network_makes_a_weight_anew_at_every_step(
    case: Case, dtype: str, plugins: bool, exported: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks: list[builder.Network] = []
    run = builder.run

    def read(work: Path, module: str, timeout: float | None, check: Callable[[builder.Network], None]) -> None:
        def then_end(network: builder.Network) -> None:
            networks.append(network)
            check(network)
            raise Read

        run(work, module, timeout, then_end)

    monkeypatch.setattr(builder, "run", read)
    export = manifest.read(exported(case, dtype))
    built = pytest.raises(EngineError, match=UNBOUND) if case.arch in COMPUTED else pytest.raises(Read)
    with built:
        engine.build(export.folder, plugins=emulated_library() if plugins else None, weights="beside")
    if case.arch in COMPUTED:
        return
    [network] = networks
    assert network.computed == []
    each, assembly = 1 if case.arch in FEW_MATRICES else 2, export.graphs[0].assembly
    assert len(network.inputs) > len(assembly.inputs) + each * len(assembly.blocks)


def parsed(nodes: list[onnx.NodeProto], **weights: tuple[int, ...]) -> tuple[trt.INetworkDefinition, object]:
    """The network of nodes from x [B, T, 4], and weights of these shapes, to y; and what it must outlive."""
    shapes = {"x": ("B", "T", 4), **weights}
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, s) for n, s in shapes.items()]
    graph = helper.make_graph(nodes, "g", values, [helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    logger = trt.Logger(trt.Logger.ERROR)
    builder_ = trt.Builder(logger)
    network = builder_.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString())
    return network, (parser, builder_, logger)


def products(network: trt.INetworkDefinition) -> list[tuple[str, str]]:
    """The right operand of each matrix multiplication, and how it is read."""
    found = []
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        if layer.type == trt.LayerType.MATRIX_MULTIPLY:
            layer.__class__ = trt.IMatrixMultiplyLayer
            found.append((layer.get_input(1).name, layer.op1.name))
    return found


def swap(name: str, *perm: int) -> onnx.NodeProto:
    return make_node("Transpose", [name], [f"{name}_moved"], f"swap {name}", perm=perm)


def test_a_product_reads_a_swapped_weight_transposed() -> None:
    network, _held = parsed([swap("w", 0, 2, 1), make_node("MatMul", ["x", "w_moved"], ["y"])], w=(1, 6, 4))
    assert products(network) == [("w_moved", "NONE")]
    assert engine_weights.computed(trt, network, ["w"], 48) == ["SHUFFLE swap w"]
    engine_weights.read_swapped(trt, network, ["w"])
    assert products(network) == [("w", "TRANSPOSE")]
    assert engine_weights.computed(trt, network, ["w"], 48) == []


def test_what_is_no_swap_or_no_weight_stays() -> None:
    nodes = [swap("v", 1, 2, 0), make_node("MatMul", ["x", "v_moved"], ["xv"]), swap("w", 0, 2, 1)]
    network, _held = parsed([*nodes, make_node("MatMul", ["xv", "w_moved"], ["y"])], v=(4, 1, 4), w=(1, 6, 4))
    engine_weights.read_swapped(trt, network, ["v"])
    assert products(network) == [("v_moved", "NONE"), ("w_moved", "NONE")]


@pytest.mark.parametrize(("least", "found"), [(48, ["UNARY n"]), (49, [])])
def test_a_layer_that_makes_a_large_weight_anew_is_found(least: int, found: list[str]) -> None:
    nodes = [make_node("Neg", ["w"], ["minus"], "n"), make_node("Mul", ["x", "minus"], ["y"])]
    network, _held = parsed(nodes, w=(1, 6, 4))
    assert engine_weights.computed(trt, network, ["w"], least) == found


@pytest.mark.parametrize(("shape", "found"), [((6, 4), []), ((1, 24), ["SHUFFLE reshape"])])
def test_an_axis_before_a_weight_makes_nothing_anew(shape: tuple[int, ...], found: list[str]) -> None:
    sizes = helper.make_tensor("sizes", TensorProto.INT64, [2], [6, 4])
    whole = make_node("Constant", [], ["sizes"], value=sizes)
    reshape = make_node("Reshape", ["w", "sizes"], ["shaped"], "reshape")
    network, _held = parsed([whole, reshape, make_node("Add", ["x", "shaped"], ["y"])], w=shape)
    assert "SHUFFLE" in [network.get_layer(i).type.name for i in range(network.num_layers)]
    assert engine_weights.computed(trt, network, ["w"], 48) == found


@pytest.mark.usefixtures("tiny")
def test_an_engine_with_weights_beside_it_says_what_each_is_bound_to(exported: Exporter, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported("gemma", "bfloat16"), tmp_path / "export"))
    inside = engine.build(folder)
    assert (inside.weights_at, inside.graphs["model"].bindings) == ("inside", {})
    built = engine.build(folder, weights="beside")
    [plan] = built.graphs.values()
    assert built.weights_at == "beside"
    assert plan.bytes < inside.graphs["model"].bytes
    assert (plan.inputs, plan.outputs) == (inside.graphs["model"].inputs, inside.graphs["model"].outputs)
    said = json.loads((folder / engine.RECORD).read_bytes())["graphs"]["model"]["bindings"]
    table = manifest.read(folder).checkpoint().tensors["model.embed_tokens.weight"]
    source = {"tensor": table.name, "file": table.file, "offset": table.offset}
    assert said[table.name] == {
        "dtype": "bfloat16",
        "shape": [1, *table.shape],
        "sources": [{**source, "dtype": "float32", "shape": [*table.shape]}],
        "operations": [{"do": "cast", "to": "bfloat16"}, {"do": "reshape", "to": [1, *table.shape]}],
    }
    assert len(said) == 22
    assert "weights" not in dict(summary(inside))
    assert dict(summary(built))["weights"] == "beside the plan: 22 inputs, 0 of them bound as they are stored"


@pytest.mark.usefixtures("tiny")
def test_an_engine_that_would_make_weights_anew_is_not_built(
    exported: Exporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of TensorRT's parser may read a product in another way."""
    folder = Path(shutil.copytree(exported("llama", "float16"), tmp_path / "export"))
    before = sorted(folder.iterdir())
    code = (
        "import sys; from pathlib import Path; from llmexport.export import engine_build, engine_weights; "
        "engine_weights.read_swapped = lambda *_: None; engine_build.main(Path(sys.argv[1]))"
    )
    monkeypatch.setattr(builder, "COMMAND", (sys.executable, "-c", code))
    with pytest.raises(EngineError, match=r"^TensorRT would compute weights at every step, by SHUFFLE .*/swap"):
        engine.build(folder, weights="beside")
    assert sorted(folder.iterdir()) == before
