"""The host says what TensorRT would say of types, and why a plugin refuses."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from native import emulated_library

from llmexport.plugins.host import Library, Refused, desc, dtype_name, number


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "int32", "int8", "int64", "bool"])
def test_a_type_has_one_number_by_whichever_name(name: str) -> None:
    of_numpy = np.dtype(getattr(ml_dtypes, name, name))
    assert number(name) == number(of_numpy) == number(getattr(torch, name))
    assert dtype_name(number(name)) == name


def test_bytes_go_to_plugins_as_int8() -> None:
    assert number(torch.uint8) == number("int8")


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(emulated_library())


def test_an_error_says_what_the_plugin_said(library: Library) -> None:
    with pytest.raises(Refused, match=r"^Rope: attribute interleaved is missing$"):
        library.create("Rope", {})


def test_prepare_tells_outputs_and_workspace(library: Library) -> None:
    attributes = {"top_k": 3, "scoring": "softmax", "renormalise": False, "scale": 1.0, "groups": 1}
    attributes |= {"groups_kept": 1, "group_best": 2}
    outputs, workspace = library.create("MoeRoute", attributes).prepare([desc((2, 5, 8), "float16")])
    assert [(d.shape, dtype_name(d.type)) for d in outputs] == [((2, 5, 3), "float16"), ((2, 5, 3), "int32")]
    assert workspace == 0


def test_prepare_refuses_types_that_the_table_has_not(library: Library) -> None:
    rope = library.create("Rope", {"interleaved": False})
    angle = desc((1, 3, 2), "float32")
    with pytest.raises(Refused, match=r"^Rope: cos has type 0, not the one float type of such inputs"):
        rope.prepare([desc((1, 2, 3, 4), "float16"), angle, angle])


def test_an_op_without_a_plugin_is_named_with_those_that_have_one(library: Library) -> None:
    with pytest.raises(Refused, match=r"^Attention has no plugin in this library, which serves AddRmsNorm, "):
        library.create("Attention", {})
