"""Profiles: the sizes that an engine takes, of axes that are multiples of others too."""

import pytest

from llmexport.export.errors import EngineError
from llmexport.export.profile import Profile
from llmexport.export.spec import FEATURES, Norm, PatchMerger, PatchPlaces, patch_axis

PATCHES = patch_axis(4)
PORTS = (*PatchPlaces(2, 96, PATCHES).inputs, *PatchMerger(Norm(64, 1e-6, axes=(1, PATCHES)), 2, 48, PATCHES).outputs)


def test_patches_follow_from_features():
    sizes = Profile({"features": (1, 4, 9), "images": (1, 2, 3)}).resolve(PORTS)
    assert sizes == {"images": (1, 2, 3), "features": (1, 4, 9), "features_times_4": (4, 16, 36)}


def test_an_engine_sees_pictures_of_usual_sizes_where_nobody_says_others():
    sizes = Profile().resolve(PORTS)
    assert sizes[PATCHES] == tuple(4 * n for n in sizes[FEATURES])
    assert sizes[FEATURES][0] == 1


def test_a_multiple_cannot_be_named():
    with pytest.raises(EngineError, match=r"but features_times_4 is 4 \* features: name those"):
        Profile({PATCHES: (4, 4, 4)})


def test_a_multiple_stays_below_32_bits():
    with pytest.raises(EngineError, match=r"up to 536870912 features: make features_times_4 less than 2\*\*31"):
        Profile({FEATURES: (1, 1, 2**29)}).resolve(PORTS)
