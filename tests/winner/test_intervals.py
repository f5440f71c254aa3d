"""Intervals between trials, by simulation and by hand. `pytest tests/winner/test_intervals.py`"""

from __future__ import annotations

import numpy as np
import pytest

from job.ledger.records import RowLosses
from job.winner.intervals import Interval, _ratio, compare, paired_difference, share

SWEEPS = 1000
# Nats a token: how rows differ, how trials differ on a row, and by how much more on a long one.
HARD, OWN, SLOPE = 0.5, 0.08, 0.02


def _sweep(
    rng: np.random.Generator, means: list[float], num_rows: int
) -> tuple[dict[int, RowLosses], np.ndarray]:
    """Trials on rows drawn anew; a trial differs more on long rows, as real ones do.

    Returns the rows, and the true losses: long rows are worse for odd trials, so an average over
    rows, unweighted, would be another number.
    """
    lengths = np.ceil(rng.lognormal(4, 0.6, num_rows))
    hard = rng.normal(1.5, HARD, num_rows)
    slope = np.array([SLOPE * (trial % 2) for trial in range(len(means))])
    rows = {}
    for trial, mean in enumerate(means):
        each = hard + mean + slope[trial] * lengths / 65 + rng.normal(0, OWN, num_rows)
        rows[trial] = RowLosses(
            step=1,
            nll=tuple((each * lengths).tolist()),
            targets=tuple(lengths.astype(int).tolist()),
        )
    true = np.array(means) + slope * _LENGTH_RATIO
    return rows, true


def _length_ratio() -> float:
    """E[length^2] / (65 E[length]) of the lengths above, from a million of them."""
    lengths = np.ceil(np.random.default_rng(0).lognormal(4, 0.6, 1_000_000))
    return float((lengths**2).mean() / lengths.mean() / 65)


_LENGTH_RATIO = _length_ratio()


def _mean_loss(rows: RowLosses) -> Interval:
    """The eval/loss itself, as an estimate for all rows like these: not paired."""
    return _ratio(np.array(rows.nll), np.array(rows.targets, dtype=np.float64), 1)


@pytest.mark.parametrize("num_rows", [64, 192])
def test_95_percent_intervals_cover_the_truth_in_95_percent_of_sweeps(num_rows: int) -> None:
    rng = np.random.default_rng(num_rows)
    covered = of_one = 0
    for _ in range(SWEEPS):
        rows, true = _sweep(rng, [0.0, 0.01, 0.03], num_rows)
        for a, b in ((0, 1), (1, 2), (2, 0)):
            found = paired_difference(rows[a], rows[b])
            covered += abs(found.estimate - (true[a] - true[b])) <= found.half_width
        level = _mean_loss(rows[0])
        of_one += abs(level.estimate - (true[0] + 1.5)) <= level.half_width
    assert 0.93 <= covered / (3 * SWEEPS) <= 0.97
    assert 0.93 <= of_one / SWEEPS <= 0.97


def test_all_comparisons_with_one_trial_hold_together_in_95_percent_of_sweeps() -> None:
    """Trial 0 is far ahead, so it is the best in every sweep."""
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(SWEEPS):
        rows, true = _sweep(rng, [0.0, 0.3, 0.31, 0.32], 192)
        found = compare(rows, 0)
        assert found is not None
        covered += all(
            abs(interval.estimate - (true[slot] - true[0])) <= interval.half_width
            for slot, interval in found.behind.items()
        )
    assert 0.93 <= covered / SWEEPS <= 0.97


@pytest.mark.parametrize("gap", [0.0, 0.004, 0.01])
def test_the_truly_best_of_twelve_is_the_best_or_tied_with_it(gap: float) -> None:
    rng = np.random.default_rng(12)
    kept = 0
    for _ in range(SWEEPS // 2):
        rows, _ = _sweep(rng, [0.0] + [gap - SLOPE * _LENGTH_RATIO, gap] * 5 + [gap], 192)
        best = min(rows, key=lambda slot: rows[slot].loss)
        found = compare(rows, best)
        assert found is not None
        kept += best == 0 or 0 in found.ties
    assert kept / (SWEEPS // 2) >= 0.95


def test_the_standard_error_by_hand() -> None:
    # d = (2, 1, 0), lengths (1, 2, 3): ratio 0.5, residuals (1.5, 0, -1.5), shares 1/6, 1/3, 1/2.
    one = RowLosses(step=1, nll=(3.0, 3.0, 3.0), targets=(1, 2, 3))
    other = RowLosses(step=1, nll=(1.0, 2.0, 3.0), targets=(1, 2, 3))
    found = paired_difference(one, other)
    assert found.estimate == pytest.approx(0.5)
    assert found.standard_error == pytest.approx((2.25 / (5 / 6) + 2.25 / (1 / 2)) ** 0.5 / 6)
    assert found.half_width == pytest.approx(4.302653 * found.standard_error)  # Student, 2 free
    assert found.holds_zero
    assert paired_difference(other, one).estimate == pytest.approx(-0.5)


def test_pairing_sees_what_two_separate_intervals_would_not() -> None:
    rng = np.random.default_rng(1)
    rows, _ = _sweep(rng, [0.0, 0.0, 0.05], 192)
    found = paired_difference(rows[2], rows[0])
    assert not found.holds_zero
    assert _mean_loss(rows[0]).half_width > 3 * found.half_width


def test_ties_come_closest_first_and_other_rows_are_left_out() -> None:
    rng = np.random.default_rng(2)
    rows, _ = _sweep(rng, [0.0, 0.0, 0.004, 0.0, 0.5], 192)
    rows[2] = rows[2].changed(
        nll=[nll + 0.002 * t for nll, t in zip(rows[0].nll, rows[0].targets, strict=True)]
    )
    rows[7] = RowLosses(step=1, nll=(1.0, 2.0), targets=(1, 1))
    found = compare(rows, 0)
    assert found is not None
    assert set(found.behind) == {1, 2, 3, 4}
    assert 4 not in found.ties
    assert found.ties == sorted(found.ties, key=lambda slot: found.behind[slot].estimate)


def test_nothing_is_compared_where_there_is_nothing_to_compare() -> None:
    one = RowLosses(step=1, nll=(1.0, 2.0), targets=(1, 1))
    single = RowLosses(step=1, nll=(1.0,), targets=(1,))
    assert compare({0: one}, 0) is None
    assert compare({1: one}, 0) is None, "the best has no rows: a version before kept none"
    assert compare({0: single, 1: single}, 0) is None


def test_equal_trials_are_tied_without_any_width() -> None:
    one = RowLosses(step=1, nll=(1.0, 2.0), targets=(1, 1))
    found = compare({0: one, 1: one}, 0)
    assert found is not None
    assert found.ties == [1]
    assert found.behind[1].half_width == 0


def test_a_share_stays_between_nothing_and_all() -> None:
    """Values of Wilson's interval: Brown, Cai, DasGupta (2001), by their formula."""
    none, some = share(0, 20), share(7, 20)
    assert none.estimate - none.half_width == pytest.approx(0, abs=1e-12)
    assert none.estimate + none.half_width == pytest.approx(0.16113, abs=1e-5)
    assert (some.estimate - some.half_width, some.estimate + some.half_width) == pytest.approx(
        (0.18119, 0.56715), abs=1e-4
    )
