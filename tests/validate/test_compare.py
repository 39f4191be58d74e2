"""The comparison itself must be able to fail."""

import math

import numpy as np
import pytest

from llmexport.validate.compare import Difference, Mismatch, compare
from llmexport.validate.tolerance import TOLERANCE, Tolerance


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
    assert Difference(1e-3, math.inf, 0.0).excess(TOLERANCE["float16"]) == math.inf
    assert Difference(0.0, 0.0, 0.0).excess(TOLERANCE["float16"]) == 0


def test_a_scaled_tolerance_grows_with_the_reference() -> None:
    difference = Difference(max_abs=0.1, rms_ratio=0.0, scale=100.0)
    assert difference.excess(Tolerance(0.01, 1.0)) == pytest.approx(10)
    assert difference.excess(Tolerance(0.01, 1.0, scaled=True)) == pytest.approx(0.1)
