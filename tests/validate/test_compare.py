"""The comparison itself must be able to fail."""

import math

import numpy as np
import pytest
from tiny_configs import placed_layers, read

from llmexport.export import archs
from llmexport.export.spec import Assembly, GatedDeltaNet, Moe
from llmexport.validate.compare import Difference, Mismatch, compare
from llmexport.validate.tolerance import RECURRENT, TOLERANCE, Tolerance, tolerance


def test_measures_the_largest_error_and_the_ratio_of_rms() -> None:
    found = compare(np.array([3.0, 4.0]), np.array([3.0, 4.5]))
    assert found.max_abs == 0.5
    assert found.rms_ratio == pytest.approx(0.1)
    assert found.scale == 4.0


def test_a_nan_on_either_side_is_beyond_every_tolerance() -> None:
    for reference, other in (([1.0, math.nan], [1.0, 2.0]), ([1.0, 2.0], [math.nan, 2.0])):
        difference = compare(np.array(reference), np.array(other))
        assert difference.excess(Tolerance(1e9, 1e9)) == math.inf


def test_an_infinity_is_beyond_every_tolerance() -> None:
    assert compare(np.array([1.0]), np.array([np.inf])).excess(TOLERANCE["float16"]) == math.inf


def test_shapes_must_be_equal_and_do_not_broadcast() -> None:
    with pytest.raises(Mismatch, match=r"\[2, 1\] and \[2\]"):
        compare(np.zeros((2, 1)), np.zeros(2))


def test_padding_can_be_left_out() -> None:
    reference, found = np.array([[1.0], [2.0]]), np.array([[9.0], [2.0]])
    assert compare(reference, found, np.array([False, True])).max_abs == 0


def test_half_precision_is_compared_in_double() -> None:
    values = np.full(1000, 60000, np.float16)
    assert compare(values, values).rms_ratio == 0


def test_a_zero_reference_has_no_ratio() -> None:
    assert compare(np.zeros(2), np.ones(2)).rms_ratio == math.inf
    assert compare(np.zeros(2), np.zeros(2)).rms_ratio == 0


def test_an_error_where_nothing_was_expected_is_beyond_every_scaled_tolerance() -> None:
    assert Difference(1e-3, math.inf, 0.0, 0.0).excess(TOLERANCE["float16"]) == math.inf
    assert Difference(0.0, 0.0, 0.0, 0.0).excess(TOLERANCE["float16"]) == 0


def test_a_scaled_tolerance_grows_with_the_reference() -> None:
    difference = Difference(max_abs=0.1, rms_ratio=0.0, scale=100.0, spread=0.0)
    assert difference.excess(Tolerance(0.01, 1.0)) == pytest.approx(10)
    assert difference.excess(Tolerance(0.01, 1.0, scaled=True)) == pytest.approx(0.1)


# Rows of two, the second of which goes astray.
STRAYED = np.array([[1.0, 2.0], [9.0, 9.0], [3.0, 4.5]])
STRAIGHT = np.array([[1.0, 2.0], [3.0, 4.0], [3.0, 4.0]])


def test_the_rows_that_differ_most_may_be_left_out() -> None:
    assert compare(STRAIGHT, STRAYED).max_abs == 6
    assert compare(STRAIGHT, STRAYED, strays=0.4).max_abs == 0.5


def test_no_more_rows_are_left_out_than_may_stray() -> None:
    # 0.9 of three rows, rounded up, are all three.
    assert compare(STRAIGHT, STRAYED, strays=0.1).max_abs == 6
    assert compare(STRAIGHT[1:2], STRAYED[1:2], strays=0.5).max_abs == 6


def test_rows_may_stray_in_any_leading_axis() -> None:
    assert compare(STRAIGHT.reshape(1, 3, 1, 2), STRAYED.reshape(1, 3, 1, 2), strays=0.4).max_abs == 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_row_that_is_not_finite_is_never_left_out(value: float, row: int) -> None:
    found = STRAYED.copy()
    found[row, 1] = value
    with np.errstate(invalid="ignore"):
        difference = compare(STRAIGHT, found, strays=0.5)
        assert difference.excess(Tolerance(1e9, 1e9)) == math.inf


def model(arch: str) -> Assembly:
    return read(arch).graphs[0].assembly


@pytest.mark.parametrize("arch", archs.names())
def test_tokens_may_stray_where_experts_are_chosen_in_16_bits_alone(arch: str) -> None:
    routed = any(isinstance(layer.mlp, Moe) for layer in placed_layers(read(arch)))
    for dtype, bound in TOLERANCE.items():
        assert (tolerance(dtype, model(arch)).strays > 0) == (routed and dtype != "float32")
        assert bound.strays == 0


@pytest.mark.parametrize("arch", archs.names())
def test_a_model_without_a_delta_rule_has_the_bound_of_its_dtype(arch: str) -> None:
    recurrent = any(isinstance(layer.mixer, GatedDeltaNet) for layer in placed_layers(read(arch)))
    for dtype, bound in TOLERANCE.items():
        found = tolerance(dtype, model(arch))
        factor = RECURRENT if recurrent else 1.0
        assert (found.max_abs, found.rms_ratio) == (factor * bound.max_abs, factor * bound.rms_ratio)
