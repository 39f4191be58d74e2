"""Dynamic axes: the one place that knows that `total` is past + sequence."""

from llmexport.export.spec import AXES, summands, with_sums


def test_a_sum_follows_from_its_summands_and_from_nothing_less():
    assert with_sums({"batch": 2, "past": 3, "sequence": 5}) == {"batch": 2, "past": 3, "sequence": 5, "total": 8}
    assert with_sums({"batch": 2, "past": 3}) == {"batch": 2, "past": 3}


def test_an_axis_is_the_sum_of_its_summands():
    assert summands("total") == ("past", "sequence")
    assert summands("batch") == ("batch",)
    assert summands("experts") == ("experts",)


def test_an_axis_that_is_no_sum_has_sizes_from_its_least_on():
    for axis in AXES.values():
        assert (axis.profile is None) == bool(axis.sum_of)
        if axis.profile:
            low, opt, high = axis.profile
            assert axis.least <= low <= opt <= high
