"""Dynamic axes: the one place that knows that `total` is past + sequence."""

from llmexport.export.spec import (
    AXES,
    FEATURES,
    IMAGES,
    SPLICED,
    TILES,
    behind,
    patch_axis,
    size_of,
    summands,
    with_sums,
)


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


def test_the_tokens_of_a_step_behind_others_are_an_axis_of_their_own():
    assert summands(behind(4)) == ("sequence",)
    assert size_of(behind(4), {"sequence": 5}) == 9
    assert (size_of(7, {}), size_of("past", {"past": 3}), size_of("experts", {}, 11)) == (7, 3, 11)


def test_patches_are_so_many_times_the_features_that_are_made_of_them():
    assert summands(patch_axis(4)) == (FEATURES,)
    assert size_of(patch_axis(9), {FEATURES: 5}) == 45
    # A size that nobody says is that of the axis it is a multiple of.
    assert size_of(patch_axis(4), {}, 11) == 44
    assert patch_axis(1) == FEATURES


def test_a_step_may_be_given_no_features_at_all():
    assert (AXES[SPLICED].least, AXES[FEATURES].least, AXES[IMAGES].least, AXES[TILES].least) == (0, 1, 1, 1)
