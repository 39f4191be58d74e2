"""What @op derives from a torch reference, and what it refuses."""

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmexport.export.trace import trace_body
from llmexport.plugins import spec
from llmexport.plugins.spec import DOMAIN, Attribute, Op, all_ops, op, op_name

# What TensorRT's ONNX parser imports itself, whatever the domain, besides the ONNX operators.
TENSORRT_IMPORTERS = {
    "CausalConvWithState",
    "GroupQueryAttention",
    "LinearAttention",
    "MatMulNBits",
    "MultiHeadAttention",
    "QMoE",
    "SimplifiedLayerNormalization",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
    "SwiGLU",
}
TURNED = ("QkNormRope", "QkNormRopeWrite")
NORM = {"epsilon": 1e-6, "weight_offset": 1.0, "round_before_weight": True}
ATTRIBUTES = {
    "Rope": {"interleaved": True},
    **{key: {"interleaved": False, **NORM, "norm_first": True} for key in TURNED},
    "AddRmsNorm": NORM,
    "GatedAct": {"activation": "silu", "alpha": 0.0, "limit": 0.0},
    "SinkAttention": {"scale": 0.5, "softcap": 30.0, "window": 3},
    **{key: {"scale": 0.5, "l2_norm": True} for key in ("GatedDeltaRule", "KimiDeltaRule")},
    "GatedDeltaNet": {"scale": 1.0, "l2_norm": True, "activation": "silu", "epsilon": 0.1, "round_before_weight": True},
    "CausalConv1d": {"activation": "silu"},
    **{key: {} for key in ("Wkv", "Wkv7")},
    "GatedRmsNorm": {"epsilon": 1e-6, "activation": "silu", "round_before_weight": True},
    "MoeRoute": {"top_k": 2, "scoring": "sigmoid", "renormalise": True, "scale": 2.5}
    | {"groups": 2, "groups_kept": 1, "group_best": 2},
    "MoeExperts": {"activation": "swiglu_clamped", "alpha": 1.702, "limit": 7.0, "format": "uint8", "group": 32}
    | {"transposed": False, "interleaved": True, "scale_input": False},
}
SIZES = {"B": 2, "H": 3, "T": 5, "D": 6, "R": 2, "C": 7, "I": 8, "J": 8}
# Those of an op that means something else by a letter, or needs sizes that fit each other.
OWN_SIZES = {
    **{key: {"G": 1, "Q": 9, "S": 8} for key in TURNED},
    "SinkAttention": {"G": 1, "S": 8},
    "GatedDeltaNet": {"C": 48, "V": 4, "O": 1, "K": 4, "S": 3},
    **{key: {"G": 1, "V": 4} for key in ("GatedDeltaRule", "KimiDeltaRule", "Wkv7")},
    "CausalConv1d": {"O": 1, "K": 4, "S": 3},
    "MoeRoute": {"E": 8},
    "MoeExperts": {"C": 32, "K": 2, "E": 4, "P": 64, "Q": 32, "R": 32, "S": 32, "J": 64, "M": 1, "N": 1}
    | {"F": 2, "G": 1},
}
# Every op with all its inputs, and without as many of the last as may be left out.
CALLS = [(n, 0) for n in ATTRIBUTES]
CALLS += [(n, 1) for n in ("SinkAttention", "CausalConv1d", "MoeRoute", "GatedAct", "AddRmsNorm")]
CALLS += [*((n, 2) for n in TURNED), *(("MoeExperts", n) for n in (2, 4, 6, 8))]
calls = pytest.mark.parametrize(("name", "without"), CALLS)


def attributes(name: str, without: int) -> dict[str, Attribute]:
    """Experts without scales are plain."""
    return ATTRIBUTES[name] | ({"format": "plain", "group": 0} if name == "MoeExperts" and without > 4 else {})


def tensors(made: Op, without: int = 0) -> dict[str, Tensor | None]:
    """Every input; integers are below 3, whatever they count."""
    seed = torch.Generator().manual_seed(0)
    packed = made.name == "MoeExperts" and without <= 4
    sizes = {**SIZES, **OWN_SIZES.get(made.name, {})}

    def tensor(name: str) -> Tensor:
        shape, kind = [sizes[d] for d in made.inputs[name]], made.types[name]
        if kind in ("int32", "uint8") or (kind == "W" and packed):
            dtype = torch.int32 if kind == "int32" else torch.uint8
            return torch.randint(0, 3, shape, generator=seed, dtype=dtype)
        return torch.randn(shape, generator=seed)

    there = list(made.inputs)[: len(made.inputs) - without]
    return dict.fromkeys(made.inputs) | {n: tensor(n) for n in there}


@pytest.fixture
def scratch_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops that a test defines are gone after it."""
    monkeypatch.setattr(spec, "OPS", dict(spec.OPS))


@pytest.fixture(scope="module")
def shrink() -> Op:
    """An op with every kind of parameter; its reference halves x."""
    kept = dict(spec.OPS)

    @op("SpecShrink", 3, {"x": "B T D", "w": "D"}, {"y": "B T D", "z": "D"}, ("D",), choices={"mode": ("m", "n")})
    def spec_shrink(x: Tensor, w: Tensor, flag: bool, count: int, scale: float, mode: str) -> tuple[Tensor, Tensor]:
        """Halves x."""
        return x / 2, w.clone()

    # Ours alone: a trace would register its schema with onnx for good.
    spec.OPS.clear()
    spec.OPS.update(kept)
    return spec_shrink


def test_tensors_become_inputs_with_their_dimensions(shrink):
    assert shrink.inputs == {"x": ("B", "T", "D"), "w": ("D",)}


def test_scalars_become_attributes_with_their_types(shrink):
    assert shrink.attributes == {"flag": bool, "count": int, "scale": float, "mode": str}


def test_torch_op_is_named_after_the_function(shrink):
    assert str(torch.ops.llmexport.spec_shrink.default._schema).startswith(f"llmexport::{shrink.torch_name}(")


def test_an_op_is_called_like_its_function(shrink):
    x, w = torch.randn(1, 3, 5), torch.randn(5)
    y, z = shrink(x, w, True, count=2, scale=0.5, mode="m")
    assert torch.equal(y, x / 2)
    assert torch.equal(z, w)


def test_meta_tensors_give_shapes_without_numbers(shrink):
    y, _ = shrink(torch.empty(1, 3, 5, device="meta"), torch.empty(5, device="meta"), True, 2, 0.5, "m")
    assert (y.device.type, y.shape) == ("meta", (1, 3, 5))


def test_schema_has_the_ops_name_domain_version_and_docstring(shrink):
    schema = shrink.schema
    assert (schema.name, schema.domain, schema.since_version) == ("SpecShrink", "llmexport", 3)
    assert schema.doc == "Halves x."


def test_schema_lists_inputs_and_outputs_of_one_float_type(shrink):
    schema = shrink.schema
    assert [(i.name, i.type_str) for i in schema.inputs] == [("x", "T"), ("w", "T")]
    assert [(o.name, o.type_str) for o in schema.outputs] == [("y", "T"), ("z", "T")]
    assert [set(c.allowed_type_strs) for c in schema.type_constraints] == [
        {"tensor(float)", "tensor(float16)", "tensor(bfloat16)"}
    ]


def test_schema_requires_every_attribute_and_knows_its_type(shrink):
    kinds = {n: (a.type.name, a.required) for n, a in shrink.schema.attributes.items()}
    assert kinds == {
        "flag": ("INT", True),
        "count": ("INT", True),
        "scale": ("FLOAT", True),
        "mode": ("STRING", True),
    }


def test_every_op_is_checked_here():
    assert ATTRIBUTES.keys() == all_ops().keys()


def test_every_op_is_called_without_each_input_that_may_be_left_out():
    may = {(n, i) for n, made in all_ops().items() for i in range(len(made.optional) + 1)}
    # What experts may have comes in pairs, as the weights of two norms do.
    assert set(CALLS) == may - {*((n, 1) for n in TURNED), *(("MoeExperts", n) for n in (1, 3, 5, 7))}


@calls
def test_torch_agrees_with_the_schema_and_the_fake(name, without):
    made = all_ops()[name]
    checks = ("test_schema", "test_faketensor")
    arguments = {**tensors(made, without), **attributes(name, without)}
    torch.library.opcheck(made.call, (), arguments, test_utils=checks)


@calls
def test_call_gives_what_the_reference_gives(name, without):
    made = all_ops()[name]
    expected, found = (f(**tensors(made, without), **attributes(name, without)) for f in (made.reference, made))
    expected, found = ((v,) if isinstance(v, Tensor) else v for v in (expected, found))
    assert [torch.equal(e, f) for e, f in zip(expected, found, strict=True)] == [True] * len(made.outputs)


def test_tracing_registers_the_schemas_with_onnx():
    trace_body("GatedAct", ATTRIBUTES["GatedAct"], ["float32"] * 2, [["B", "T", "I"]] * 2)
    registered = {s.name for s in onnx.defs.get_all_schemas_with_history() if s.domain == DOMAIN}
    assert registered >= ATTRIBUTES.keys()


@calls
def test_outputs_have_the_types_that_the_op_names(name, without):
    made = all_ops()[name]
    found = made(**tensors(made, without), **attributes(name, without))
    found = (found,) if isinstance(found, Tensor) else found
    kinds = {"T": torch.float32, "float32": torch.float32, "int32": torch.int32}
    assert [f.dtype for f in found] == [kinds[made.types[n]] for n in made.outputs]


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_no_op_has_the_name_of_an_onnx_operator(name):
    assert name not in {s.name for s in onnx.defs.get_all_schemas_with_history() if s.domain != DOMAIN}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_no_op_has_a_name_that_tensorrt_imports_itself(name):
    assert name not in TENSORRT_IMPORTERS
    assert not name.startswith("TRT_")


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_the_function_has_the_ops_name_in_snake_case(name):
    snake = "".join("_" + c.lower() if c.isupper() else c for c in name).lstrip("_")
    assert all_ops()[name].torch_name == snake


NAMES = [
    ({"flag": True}, ["float32"] * 2, {}),
    ({"flag": False}, "float32", {}),
    ({"flag": True}, "float16", {}),
    ({"flag": True}, ["float32"] * 2, {"D": 8}),
    ({"flag": True}, ["float32"] * 2, {"D": 80}),
    ({"flag": True}, ["float32"] * 2, {"D": 8, "R": 4}),
    ({"flag": True}, ["float32"] * 2, {"D": 4, "R": 8}),
    ({"scale": 1.0}, ["float32"] * 2, {}),
    ({"scale": -1.0}, "float32", {}),
    ({"scale": 1e-5}, "float32", {}),
    ({"scale": 1e-6}, "float32", {}),
    ({"scale": float(np.float32(1e-6))}, "float32", {}),
    ({"scale": 0.5, "mode": "silu"}, "float32", {}),
    ({"scale": 0.5, "mode": "gelu_tanh"}, "float32", {}),
]


def test_each_set_of_values_types_and_sizes_has_a_body_name_of_its_own_that_says_the_op(shrink):
    names = {shrink.body_name(*case) for case in NAMES}
    assert len(names) == len(NAMES)
    assert {op_name(n) for n in (*names, shrink.name)} == {shrink.name}


def test_an_op_whose_name_would_end_within_is_refused(scratch_ops):
    def two__words(x: Tensor) -> Tensor: ...

    with pytest.raises(TypeError, match="Two__Words"):
        op("Two__Words", 1, {"x": "B"}, {"y": "B"})(two__words)


def test_a_body_is_named_alike_whatever_the_order_of_the_attributes(shrink):
    first = shrink.body_name({"scale": 1.0, "flag": True}, ["float32"] * 2, {"D": 8})
    assert first == shrink.body_name({"flag": True, "scale": 1.0}, ["float32"] * 2, {"D": 8})


def test_a_flag_read_from_a_graph_as_an_integer_names_the_same_body(shrink):
    assert shrink.body_name({"flag": True}, ["float32"] * 2, {}) == shrink.body_name({"flag": 1}, ["float32"] * 2, {})


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    scale=st.floats(-1e6, 1e6).filter(lambda v: v == 0 or abs(v) > 1e-9),
    mode=st.text(),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
)
def test_a_body_name_is_an_identifier(shrink, scale, mode, dtype):
    assert shrink.body_name({"scale": scale, "mode": mode}, [dtype] * 2, {"D": 8}).isidentifier()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(one=st.floats(allow_nan=False), other=st.floats(allow_nan=False))
@example(one=1e16, other=1e-16)
@example(one=1.5, other=-1.5)
def test_two_numbers_have_body_names_of_their_own(shrink, one, other):
    assume(one != other)
    first, second = (shrink.body_name({"scale": v}, ["float32"] * 2, {}) for v in (one, other))
    assert first != second


def pick_body(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> str:
    """Says what it was asked for in the name of a value."""
    said = f"{attributes!r}{types!r}{sizes!r}".encode().hex()
    return f"at_{said} = Cast <to = 6> (x) y = Identity (x) at = Identity (at_{said})"


def pick_fake(
    x: Tensor, w: Tensor, code: Tensor, bias: Tensor | None, rest: Tensor | None, flip: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape, dtype=torch.int32)


@pytest.fixture(scope="module")
def pick_once() -> Op:
    """An op with inputs of every type, two that may be left out, a body and a fake."""
    kept = dict(spec.OPS)
    dims = {"x": "B D", "w": "D W", "code": "B", "bias": "D", "rest": "R"}
    types = {"w": "W", "code": "uint8", "rest": "float32", "at": "int32"}

    @op("SpecPick", 1, dims, {"y": "B D", "at": "B D"}, static=("D", "R"), types=types, body=pick_body, fake=pick_fake)
    def spec_pick(
        x: Tensor, w: Tensor, code: Tensor, bias: Tensor | None, rest: Tensor | None, flip: bool
    ) -> tuple[Tensor, Tensor]:
        """Looks at its values, which a tensor without them cannot bear."""
        return x.clone() * len(x.unique().tolist()), x.to(torch.int32)

    spec.OPS.clear()
    spec.OPS.update(kept)
    return spec_pick


@pytest.fixture
def pick(pick_once: Op, monkeypatch: pytest.MonkeyPatch) -> Op:
    monkeypatch.setitem(spec.OPS, pick_once.name, pick_once)
    return pick_once


PICK_TYPES = ["float16", "bfloat16", "uint8", "float16", "float32"]
PICK_SHAPES = [["B", 3], [3, "W"], ["B"], [3], [7]]


def pick_trace(inputs: int) -> onnx.FunctionProto:
    return trace_body("SpecPick", {"flip": 1}, PICK_TYPES[:inputs], PICK_SHAPES[:inputs])


def test_tensors_that_may_be_none_are_optional_inputs(pick):
    assert pick.optional == ("bias", "rest")
    assert list(pick.inputs) == ["x", "w", "code", "bias", "rest"]
    assert pick.attributes == {"flip": bool}
    options = {i.name: i.option.name for i in pick.schema.inputs}
    assert options == {"x": "Single", "w": "Single", "code": "Single", "bias": "Optional", "rest": "Optional"}


def test_tensors_have_the_types_they_are_given_and_else_one_float_type(pick):
    kinds = {"x": "T", "w": "W", "code": "uint8", "bias": "T", "rest": "float32", "y": "T", "at": "int32"}
    assert pick.types == kinds
    assert {v.name: v.type_str for v in (*pick.schema.inputs, *pick.schema.outputs)} == kinds


def test_the_schema_says_what_each_type_allows(pick):
    floats = {"tensor(float)", "tensor(float16)", "tensor(bfloat16)"}
    assert {c.type_param_str: set(c.allowed_type_strs) for c in pick.schema.type_constraints} == {
        "T": floats,
        "W": floats | {"tensor(uint8)"},
        "uint8": {"tensor(uint8)"},
        "float32": {"tensor(float)"},
        "int32": {"tensor(int32)"},
    }


def test_the_fake_answers_where_there_are_no_values(pick):
    x, w, code = torch.empty(2, 3, device="meta"), torch.empty(3, 4, device="meta"), torch.empty(2, device="meta")
    y, at = pick(x, w, code, None, None, True)
    assert (y.device.type, y.shape, at.dtype) == ("meta", (2, 3), torch.int32)


def test_the_reference_answers_where_there_are(pick):
    x = torch.tensor([[1.0, 2.0, 2.0]])
    y, at = pick(x, x.T, torch.zeros(1, dtype=torch.uint8), None, None, True)
    assert (y.tolist(), at.tolist()) == ([[2.0, 4.0, 4.0]], [[1, 2, 2]])


@pytest.mark.parametrize("inputs", [3, 4, 5])
def test_a_body_knows_the_attributes_the_inputs_that_are_there_and_the_static_sizes(pick, inputs):
    body = pick_trace(inputs)
    asked = bytes.fromhex(body.node[0].output[0].removeprefix("at_")).decode()
    types = dict(zip(pick.inputs, PICK_TYPES[:inputs], strict=False))
    assert asked == f"{ {'flip': True}!r}{types!r}{ ({'D': 3, 'R': 7} if inputs == 5 else {'D': 3})!r}"


@pytest.mark.parametrize("inputs", [3, 4, 5])
def test_a_body_of_its_own_takes_the_place_of_the_traced_reference(pick, inputs):
    body = pick_trace(inputs)
    assert [n.op_type for n in body.node] == ["Cast", "Identity", "Identity"]
    assert (list(body.input), list(body.output)) == (list(pick.inputs)[:inputs], ["y", "at"])
    assert {(o.domain, o.version) for o in body.opset_import} == {("", 23)}


def test_a_body_that_is_no_onnx_is_not_taken(pick, monkeypatch):
    monkeypatch.setitem(spec.OPS, "SpecPick", dataclasses.replace(pick, body=lambda *asked: "y = Identity (x"))
    with pytest.raises(onnx.parser.ParseError):
        pick_trace(3)


def test_a_body_name_says_the_type_of_a_weight_kept_in_another(pick):
    stored = [pick.body_name({}, ["float32", w, "uint8", "float32", "float32"], {}) for w in ("float32", "bfloat16")]
    assert stored == ["SpecPick__float32", "SpecPick__float32__bfloat16"]


def test_a_body_name_says_how_many_inputs_are_left_out(pick):
    types = ["float32", "uint8", "uint8", "float32", "float32"]
    names = [pick.body_name({}, types[:n], {}) for n in (5, 4, 3)]
    assert names == ["SpecPick__float32__uint8" + more for more in ("", "__without_1", "__without_2")]


def test_a_required_tensor_after_one_that_may_be_left_out_is_refused(scratch_ops):
    def spec_gap(x: Tensor, bias: Tensor | None, weight: Tensor) -> Tensor: ...

    with pytest.raises(TypeError, match="SpecGap: weight follows an optional tensor"):
        op("SpecGap", 1, {"x": "B", "bias": "B", "weight": "B"}, {"y": "B"})(spec_gap)


@pytest.mark.parametrize(
    ("types", "named"), [({"z": "int32"}, "z"), ({"x": "int7"}, "int7"), ({"scale": "float32"}, "scale")]
)
def test_a_type_of_no_tensor_or_of_no_name_is_refused(scratch_ops, types, named):
    def spec_stray(x: Tensor, scale: float) -> Tensor: ...

    with pytest.raises(TypeError, match=f"SpecStray: types names .*: {named}"):
        op("SpecStray", 1, {"x": "B"}, {"y": "B"}, types=types)(spec_stray)


def listed(x: Tensor, scales: list) -> Tensor: ...
def optional(x: Tensor, bias: Tensor | None) -> Tensor: ...
def typed(x: Tensor, dtype: torch.dtype) -> Tensor: ...
def undescribed(x: Tensor, weight: Tensor) -> Tensor: ...
def unannotated(x: Tensor, scale) -> Tensor: ...
def variadic(x: Tensor, *rest: int) -> Tensor: ...
def silent(x: Tensor): ...
def single(x: Tensor) -> Tensor: ...


@pytest.mark.parametrize(
    ("reference", "parameter"),
    [(listed, "scales"), (optional, "bias"), (typed, "dtype")],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_a_parameter_that_is_no_attribute_is_refused_by_name(scratch_ops, reference, parameter):
    with pytest.raises(TypeError, match=f"SpecBad.*{parameter}"):
        op("SpecBad", 1, {"x": "B"}, {"y": "B"})(reference)


@pytest.mark.parametrize(
    ("reference", "outputs", "static", "named"),
    [
        pytest.param(undescribed, {"y": "B"}, (), "weight", id="a tensor without dims"),
        pytest.param(unannotated, {"y": "B"}, (), "scale", id="a parameter without a type"),
        pytest.param(variadic, {"y": "B"}, (), "rest", id="a variadic parameter"),
        pytest.param(silent, {"y": "B"}, (), "return", id="no return type"),
        pytest.param(single, {"y": "B", "z": "B"}, (), "z", id="more outputs than it returns"),
        pytest.param(single, {"y": "B"}, ("D",), "D", id="a static dimension of no input"),
    ],
)
def test_a_signature_that_cannot_become_an_operator_is_refused(scratch_ops, reference, outputs, static, named):
    with pytest.raises(TypeError, match=f"SpecBad.*{named}"):
        op("SpecBad", 1, {"x": "B"}, outputs, static)(reference)


def test_a_refused_op_is_not_among_the_ops(scratch_ops):
    with pytest.raises(TypeError):
        op("SpecBad", 1, {"x": "B"}, {"y": "B"})(listed)
    assert "SpecBad" not in spec.OPS


def define_spec_once() -> Callable[..., Op]:
    def spec_once(x: Tensor) -> Tensor:
        return x.clone()

    return op("SpecOnce", 1, {"x": "B"}, {"y": "B"})(spec_once)


def test_an_op_cannot_be_defined_twice(scratch_ops):
    define_spec_once()
    with pytest.raises(TypeError, match="SpecOnce is defined twice"):
        define_spec_once()


def test_a_second_definition_leaves_the_first_as_it_was(scratch_ops):
    def spec_kept(x: Tensor) -> Tensor:
        return x.clone()

    first = op("SpecKept", 1, {"x": "B"}, {"y": "B"})(spec_kept)

    def spec_kept(x: Tensor, scale: float) -> Tensor:
        return x * scale

    with pytest.raises(TypeError):
        op("SpecKept", 1, {"x": "B"}, {"y": "B"})(spec_kept)
    assert "scale" not in str(torch.ops.llmexport.spec_kept.default._schema)
    assert first(torch.ones(2)).tolist() == [1, 1]


def test_two_ops_cannot_share_one_onnx_name(scratch_ops):
    def spec_one(x: Tensor) -> Tensor:
        return x.clone()

    def spec_two(x: Tensor) -> Tensor:
        return x.clone()

    op("SpecSame", 1, {"x": "B"}, {"y": "B"})(spec_one)
    with pytest.raises(TypeError, match="SpecSame is defined twice"):
        op("SpecSame", 1, {"x": "B"}, {"y": "B"})(spec_two)


def test_two_ops_cannot_share_one_torch_name(scratch_ops):
    def spec_shared(x: Tensor) -> Tensor:
        return x.clone()

    op("SpecShared", 1, {"x": "B"}, {"y": "B"})(spec_shared)
    with pytest.raises(TypeError, match="spec_shared"):
        op("SpecSharedAgain", 1, {"x": "B"}, {"y": "B"})(spec_shared)
