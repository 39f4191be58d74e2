"""Cases that stand for a full product."""

import itertools

from pairwise import pairwise


def test_every_pair_of_values_occurs_in_far_fewer_cases_than_the_product():
    parameters = [range(11), "abc", "xyz", (False, True), (0, 1)]
    cases = pairwise(*parameters)
    for (a, first), (b, second) in itertools.combinations(enumerate(parameters), 2):
        assert {(c[a], c[b]) for c in cases} == set(itertools.product(first, second))
    assert len(cases) <= 40 < 396
    assert len(set(cases)) == len(cases)


def test_two_parameters_are_the_product():
    assert sorted(pairwise((1, 2), "ab")) == [(1, "a"), (1, "b"), (2, "a"), (2, "b")]
