"""The rung `network` passes what TensorRT reads right, and traces what it reads wrong to the layer."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import planted
import pytest
from arch_cases import CASES, EVERY_TIME, ONCE, PRIMARY, SLOTS, TOWERS, Case, in_each_dtype, others_slow
from native import emulated_library
from pairwise import pairwise

from llmexport.export import builder, manifest
from llmexport.export.spec import DTYPES
from llmexport.plugins import library
from llmexport.plugins.normed_route import NORMED_ROUTES
from llmexport.plugins.shared_route import SHARED_ROUTES
from llmexport.validate import ladder, network
from llmexport.validate.report import Rung

pytestmark = pytest.mark.engine

PLUGINS = "ops as plugin layers, by their references"
# The first families once with plugin layers, and once from bodies; other families, cases and dtypes in turn so and so.
BOTH = [e for e in ONCE if e[0].arch in EVERY_TIME]
EVERY = [(*e, p) for e in BOTH for p in (True, False)]
EVERY += [(*e, i % 2 == 0) for i, e in enumerate(e for e in in_each_dtype(CASES) if e not in BOTH)]
AT_ONCE = [(c, d, p) for c, d, p in EVERY if (c, d) in BOTH and (p or c.arch in PRIMARY)]


def climb(folder: Path) -> Rung:
    [rung] = ladder.climb(manifest.read(folder), rungs=["network"]).rungs
    return rung


@pytest.mark.parametrize(("case", "dtype", "plugins"), others_slow(EVERY, AT_ONCE), ids=str)
def test_what_tensorrt_reads_is_right(
    case: Case, dtype: str, plugins: bool, exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "find", emulated_library if plugins else lambda: None)
    folder = exported(case, dtype)
    rung = climb(folder)
    ops = any(g.ops for g in manifest.read(folder).graphs)
    assert (rung.status, rung.note) == ("pass", (PLUGINS if plugins else "ops from their bodies") if ops else "")


@pytest.mark.parametrize("arch", ["gemma", *(pytest.param(a, marks=pytest.mark.slow) for a in PRIMARY if a != "gemma")])
def test_what_tensorrt_reads_of_a_static_cache_is_right(arch: str, exported) -> None:
    assert climb(exported(arch, slots=SLOTS)).status == "pass"


@pytest.mark.parametrize(
    ("arch", "dtype"), [("qwen3_5_moe", "bfloat16"), pytest.param("llama4", "float16", marks=pytest.mark.slow)]
)
def test_and_with_its_ops_as_plugin_layers(arch: str, dtype: str, exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "find", emulated_library)
    rung = climb(exported(arch, dtype, slots=SLOTS))
    assert (rung.status, rung.note) == ("pass", PLUGINS)


SWAPPED = """
op = [n for n in model.graph.node if n.op_type == "JoinedQkNormRopeWrite"][1]
op.input[3], op.input[4] = op.input[4], op.input[3]
"""


@pytest.mark.parametrize("plugins", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_and_with_a_cache_that_an_op_of_ours_writes(plugins: bool, exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the op's reference, and by its body."""
    monkeypatch.setattr(library, "find", emulated_library if plugins else lambda: None)
    assert climb(exported("gemma", "float16", slots=160, cache="static-fused")).status == "pass"


# Of an architecture whose experts are summed and normed by one plugin: what is altered of a node of it.
EXPERT_FAULTS = {
    "residual": ("gpt_oss", "NormedMoeExperts", "op.input[5] = op.input[0]"),
    "norm": ("gpt_oss", "NormedMoeExperts", 'next(a for a in op.attribute if a.name == "weight_offset").f = 1.0'),
    "shared": ("llama4", "NormedSharedMoeExperts", "op.input[7] = op.input[0]"),
    "gate": (
        *("qwen3_5_moe", "NormedGatedSharedMoeExperts"),
        'next(a for a in op.attribute if a.name == "gate_column").i = 0',
    ),
}
# The same where the shared one is among those that are routed to; weights by their names behind "shared/".
ROUTED_FAULTS = {
    "gate": (
        "qwen3_5_moe",
        "JoinedGatedSharedMoeRoute",
        'next(a for a in op.attribute if a.name == "columns").ints[2] = 0',
    ),
    "slots": ("deepseek_v2", "SharedMoeRoute", 'next(a for a in op.attribute if a.name == "slots").i = 3'),
    "halves": ("glm4_moe", "gate_up/every", "op.input[-2:] = op.input[:-3:-1]"),
    "experts": ("qwen3_5_moe", "down/every", "op.input[:] = [op.input[-1], *op.input[:-1]]"),
    "slices": ("deepseek_v2", "gate_up/both", "op.input[:] = [op.input[0], op.input[0]]"),
    "turned": ("llama4", "down/turned", "op.attribute[0].ints[:] = [1, 0, 2]"),
}
# And where a router is one with the norm that it reads, by what is altered of the second of the plugin's nodes.
OTHERS = "first = next(n for n in model.graph.node if n.op_type == op.op_type); op.input[{0}] = first.input[{0}]"
ROUTER_FAULTS = {
    "norm": ("gpt_oss", "NormedMoeRoute", 'next(a for a in op.attribute if a.name == "weight_offset").f = 1.0'),
    "residual": ("gpt_oss", "NormedMoeRoute", "op.input[0] = op.input[1]"),
    "weight": ("gpt_oss", "NormedMoeRoute", OTHERS.format(3)),
    "bias": ("gpt_oss", "NormedMoeRoute", OTHERS.format(4)),
    "wide norm": ("glm4_moe", "NormedSharedMoeRoute", 'next(a for a in op.attribute if a.name == "epsilon").f = 9.0'),
    "wide weight": ("glm4_moe", "NormedSharedMoeRoute", OTHERS.format(3)),
    "bias of the choice": ("glm4_moe", "NormedSharedMoeRoute", OTHERS.format(5)),
    "gate": ("qwen3_5_moe", "NormedGatedSharedMoeRoute", OTHERS.format(5)),
}
EXPERT_ALTERED = """
named = lambda n: (n.op_type, n.output[0].partition("/shared/")[2])
op = [n for n in model.graph.node if "{}" in named(n)][1]
{}
"""


@pytest.mark.parametrize(
    "what", ["gate", *(pytest.param(w, marks=pytest.mark.slow) for w in EXPERT_FAULTS if w != "gate")]
)
def test_experts_that_are_normed_wrong_are_traced(what: str, exported, monkeypatch: pytest.MonkeyPatch) -> None:
    served = library.served(emulated_library())
    monkeypatch.setattr(library, "served", lambda path: served - {*SHARED_ROUTES})
    arch, which, altered = EXPERT_FAULTS[what]
    check_traced(exported(arch, "float16", slots=SLOTS), which, altered, monkeypatch)


@pytest.mark.parametrize(
    "what", ["gate", *(pytest.param(w, marks=pytest.mark.slow) for w in ROUTED_FAULTS if w != "gate")]
)
def test_shared_experts_that_are_routed_to_wrong_are_traced(
    what: str, exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = library.served(emulated_library())
    monkeypatch.setattr(library, "served", lambda path: served - {*NORMED_ROUTES})
    arch, which, altered = ROUTED_FAULTS[what]
    check_traced(exported(arch, "float16", slots=SLOTS), which, altered, monkeypatch)


@pytest.mark.parametrize(
    "what",
    [w if w in ("weight", "wide weight") else pytest.param(w, marks=pytest.mark.slow) for w in ROUTER_FAULTS],
)
def test_routers_that_are_one_with_a_norm_and_wrong_are_traced(
    what: str, exported_as_stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch, which, altered = ROUTER_FAULTS[what]
    check_traced(exported_as_stored(arch, "float16", slots=SLOTS), which, altered, monkeypatch, "moe_(route|experts)")


def check_traced(
    folder: Path, which: str, altered: str, monkeypatch: pytest.MonkeyPatch, layer: str = "moe_experts"
) -> None:
    monkeypatch.setattr(library, "find", emulated_library)
    assert climb(folder).status == "pass"
    monkeypatch.setattr(builder, "COMMAND", planted.builder("", EXPERT_ALTERED.format(which, altered)))
    rung = climb(folder)
    assert rung.status == "fail"
    assert re.search(rf"first in \w+: layer layers\.\d/{layer}\S* \(PLUGIN_V3\)", rung.note), rung.note


@pytest.mark.slow
def test_pasts_in_each_others_place_are_traced_to_the_op(exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "find", emulated_library)
    monkeypatch.setattr(builder, "COMMAND", planted.builder("", SWAPPED))
    rung = climb(exported("gemma", "float16", slots=160, cache="static-fused"))
    assert rung.status == "fail"
    assert re.search(r"first in \w+: layer layers\.1/\S+QkNormRopeWrite \(PLUGIN_V3\)", rung.note), rung.note


NO_BIAS = """
op = [n for n in model.graph.node if n.op_type == "BiasedJoinedQkNormRopeWrite"][1]
bias = next(t for t in model.graph.initializer if t.name == op.input[1])
bias.raw_data = bytes(len(bias.raw_data))
"""


def test_and_with_biases_that_an_op_of_ours_adds(exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is lost is traced to the op."""
    monkeypatch.setattr(library, "find", emulated_library)
    folder = exported("glm4", "bfloat16", slots=160, cache="static-fused")
    assert climb(folder).status == "pass"
    monkeypatch.setattr(builder, "COMMAND", planted.builder("", NO_BIAS))
    rung = climb(folder)
    assert rung.status == "fail"
    assert re.search(r"first in \w+: layer layers\.1/\S+QkNormRopeWrite \(PLUGIN_V3\)", rung.note), rung.note


SEEING = pairwise(TOWERS, DTYPES, (True, False))
SEEING_ONCE = SEEING[:2]


@pytest.mark.parametrize(("case", "dtype", "plugins"), others_slow(SEEING, SEEING_ONCE), ids=str)
def test_what_tensorrt_reads_of_both_graphs_is_right(
    case: Case, dtype: str, plugins: bool, exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "find", emulated_library if plugins else lambda: None)
    assert climb(exported(case, dtype, part="all")).status == "pass"


# Of a block that sees: what is altered of its network, in which as many numbers come out.
BLOCKS_ALTERED = {
    "padding": ("llama4", "tile_embedding", 'x = of("CONVOLUTION")[0]; x.pre_padding, x.post_padding = (1, 1), (0, 0)'),
    "transposition": (
        *("llama4", "pixel_shuffle"),
        'x = next(x for x in layers if x.name.endswith("/transpose")); x.first_transpose = (0, 3, 2, 1, 4)',
    ),
    "erf": ("llama4", "pixel_shuffle", 'of("ACTIVATION")[0].type = trt.ActivationType.GELU_TANH'),
    "division": (
        *("qwen3_5_moe", "patch_places"),
        'next(x for x in of("ELEMENTWISE") if "Div" in x.name).op = trt.ElementWiseOperation.MIN',
    ),
    "sum so far": ("qwen3_5_moe", "patch_places", 'of("CUMULATIVE")[0].exclusive = True'),
    "comparison": (
        *("qwen3_5_moe", "splice"),
        'next(x for x in of("ELEMENTWISE") if x.op.name == "EQUAL").op = trt.ElementWiseOperation.GREATER',
    ),
}


@pytest.mark.parametrize("what", BLOCKS_ALTERED)
def test_a_block_that_sees_and_is_read_wrong_fails(what: str, exported, monkeypatch: pytest.MonkeyPatch) -> None:
    arch, block, altered = BLOCKS_ALTERED[what]
    folder = exported(arch, block=block, part="all")
    assert climb(folder).status == "pass"
    monkeypatch.setattr(builder, "COMMAND", planted.builder(altered))
    assert climb(folder).status == "fail"


def test_what_tensorrt_reads_wrong_of_a_tower_is_traced_to_its_layer(exported, monkeypatch: pytest.MonkeyPatch) -> None:
    shifted = 'for x in of("CONVOLUTION"): x.pre_padding, x.post_padding = (1, 1), (0, 0)'
    monkeypatch.setattr(builder, "COMMAND", planted.builder(shifted))
    rung = climb(exported(TOWERS[0], "float16", part="all"))
    assert rung.status == "fail"
    assert re.search(r"first in prompt: layer tile_embedding/\S+ \(CONVOLUTION\)", rung.note), rung.note


# Of an architecture in a dtype: what is altered of its network, or of the model before it is parsed; what is said then.
WINDOW = """
[inside] = [x for x in layers if x.name == "mask_window_8/logical_and_1"]
inside.set_input(1, inside.get_input(0))
"""
SQUARE = """
square = next(x for x in of("MATRIX_MULTIPLY") if x.get_input(1).shape[-1] == x.get_input(1).shape[-2] > 0)
square.op1 = trt.MatrixOperation.TRANSPOSE
"""
# A function of ours by the name of an operator, which TensorRT then takes for that.
HIDDEN = """
from onnx.helper import make_function, make_node, make_opsetid
node = [n for n in model.graph.node if n.op_type == "Sigmoid"][1]
node.op_type, node.domain = "Tanh", "llmexport"
body = [make_node("Sigmoid", ["x"], ["y"])]
model.functions.append(make_function("llmexport", "Tanh", ["x"], ["y"], body, [make_opsetid("", 23)]))
model.opset_import.append(make_opsetid("llmexport", 1))
"""
FIELD = """
norm = [n for n in model.graph.node if n.op_type == "AddRmsNorm"][1]
next(a for a in norm.attribute if a.name == "epsilon").f = 0.1
"""
LOST = FIELD.replace('next(a for a in norm.attribute if a.name == "epsilon").f = 0.1', "del norm.attribute[:]")
COLUMNS = """
act = [n for n in model.graph.node if n.op_type == "JoinedGatedAct"][1]
said = next(a for a in act.attribute if a.name == "columns").ints
said[0], said[2] = said[2], said[0]
"""
ALTERED = {
    "epsilon": (
        "cohere",
        "float32",
        'of("NORMALIZATION")[1].epsilon = 0.1',
        "",
        r"layer layers\.1/layer_norm \(NORMAL",
    ),
    "axis": ("gemma", "float32", 'of("SOFTMAX")[1].axes = 1 << 3', "", r"layer \S+ \(\w+\), whose p__9 is"),
    "transposition": ("llama", "float16", SQUARE, "", r"layer layers\.0/linear \(MATRIX_MULTIPLY\)"),
    "trip count": (
        "gpt_oss",
        "float32",
        'of("TRIP_LIMIT")[0].set_input(0, network.add_constant((), np.array(1, np.int32)).get_output(0))',
        "",
        r"loop node_of_passed\S+ makes 1 turns, and \d+ entries of",
    ),
    "window": ("mistral", "float32", WINDOW, "", r"first in prompt: layer mask_window_8/logical_and_1 \(ELEMENTWISE\)"),
    "window, in bf16": (
        "mistral",
        "bfloat16",
        WINDOW,
        "",
        r"first in prompt: layer mask_window_8/\S+ \(\w+\), whose mask",
    ),
    "hidden body": ("llama", "float32", "", HIDDEN, r"layer node_Sigmoid\S+ \(ACTIVATION\), whose"),
    "plugin field": ("llama", "float32", "", FIELD, r"layer layers\.\d/\S+ \(PLUGIN_V3\)"),
    "plugin columns": ("llama", "float32", "", COLUMNS, r"layer layers\.1/\S+ \(PLUGIN_V3\)"),
    "lost plugin columns": (
        *("llama", "float32", "", COLUMNS.replace("said[0], said[2] = said[2], said[0]", "del said[:]")),
        *(r"JoinedGatedAct layers\.1/mul/GatedAct: .*Could not create the plugin",),
    ),
    "lost plugin field": ("llama", "float32", "", LOST, r"Attribute epsilon not found in plugin node"),
}


@pytest.mark.parametrize("what", ALTERED)
def test_what_tensorrt_reads_wrong_is_traced_to_its_layer(what: str, exported, monkeypatch: pytest.MonkeyPatch) -> None:
    arch, dtype, parsed, model, said = ALTERED[what]
    monkeypatch.setattr(library, "find", emulated_library if "plugin" in what else lambda: None)
    monkeypatch.setattr(builder, "COMMAND", planted.builder(parsed, model))
    rung = climb(exported(arch, dtype))
    assert rung.status == "fail"
    assert re.search(said, rung.note), rung.note


def test_a_large_model_is_left_to_who_asks_for_it(exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "MOST", 1e6)
    export = manifest.read(exported("llama"))
    reason = r"^a prompt takes \d+\.?\d*e\+07 multiply-adds, over 1e\+06: --rungs network runs it anyway$"
    assert re.match(reason, network.unable(export, False))
    assert network.unable(export, True) == ""


def test_a_block_alone_has_the_rung(exported) -> None:
    assert climb(exported("llama", block="attention")).status == "pass"


@pytest.mark.parametrize(
    ("asked", "beside"),
    [({}, "ONNX Runtime"), ({"dtype": "bfloat16"}, "PyTorch"), ({"block": "attention"}, "PyTorch")],
    ids=str,
)
def test_a_rung_is_called_after_what_it_is_compared_with(asked: dict[str, str], beside: str, exported) -> None:
    assert climb(exported("llama", **asked)).name == f"TensorRT's network / {beside}"


def test_without_tensorrt_the_rung_names_the_command(exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reason = network.unable(manifest.read(exported("llama")), True)
    assert reason == "tensorrt-rtx is not installed: pip install tensorrt-rtx"
