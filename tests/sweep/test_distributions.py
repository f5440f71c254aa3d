"""Points, quantiles and the nearest value of a domain: pytest tests/sweep/test_distributions.py"""

from typing import Any

import pytest

from job.sweep.distributions import (
    Choice,
    Constant,
    FloatRange,
    IntRange,
    SteppedFloats,
    contains,
    nearest,
    num_points,
    point,
    quantile,
)


def test_points_of_a_stepped_range_are_written_as_a_person_would() -> None:
    steps = SteppedFloats(0.0, 0.3, 0.05)
    assert [point(steps, i) for i in range(num_points(steps) or 0)] == [
        *(0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
    ]


def test_quantiles_follow_the_probabilities() -> None:
    weighted = Choice(("linear", "cosine"), (0.75, 0.25))
    drawn = [quantile(weighted, i / 100) for i in range(100)]
    assert drawn.count("linear") == 75
    log = FloatRange(1.0e-6, 1.0e-2, log=True)
    assert quantile(log, 0.5) == pytest.approx(1.0e-4)
    assert {quantile(IntRange(1, 3), i / 9) for i in range(9)} == {1, 2, 3}
    log_ints = [quantile(IntRange(1, 4, log=True), i / 1000) for i in range(1000)]
    assert [log_ints.count(n) for n in (1, 2, 3, 4)] == [500, 233, 153, 114]  # ln 3 / ln 9, …


@pytest.mark.parametrize(
    ("domain", "value", "expected"),
    [
        (FloatRange(0.0, 0.5), 0.7, 0.5),
        (FloatRange(0.0, 0.5), None, 0.0),
        (IntRange(8, 32, 8), 19, 16),
        (IntRange(8, 32, 8), 100, 32),
        (SteppedFloats(0.0, 0.15, 0.05), 0.12, 0.1),
        (Choice((32, 8)), 8.0, 8),
        (Choice((32, 8)), 16, 8),
        (Choice(("cosine", "constant")), "linear", "cosine"),
        (Constant(0.2), 0.1, 0.2),
    ],
)
def test_nearest_is_spelt_as_the_domain_spells_it(domain: Any, value: Any, expected: Any) -> None:
    found = nearest(domain, value)
    assert (found, type(found)) == (expected, type(expected))
    assert contains(domain, found)
