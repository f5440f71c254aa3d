"""When a sweep ends early. `pytest tests/sweep/test_stopping.py`"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from job.sweep.observations import Observation
from job.sweep.stopping import End, find_end, gains_by_results


def _seen(slot: int, status: str = "completed") -> Observation:
    return Observation(slot, {}, status, None if status == "running" else 1.0)


def _by_count(gains: dict[int, float | None]):  # type: ignore[no-untyped-def]
    """An engine whose gain is given by how many slots have ended."""

    def gain_of(observations: Sequence[Observation]) -> float | None:
        return gains[sum(seen.status != "running" for seen in observations)]

    return gain_of


@pytest.mark.parametrize(
    ("gains", "ends"),
    [
        ({6: 1e-4, 5: 2e-4}, True),
        ({6: 1e-4, 5: 2e-3}, False),  # one look alone may be chance
        ({6: 2e-3, 5: 1e-4}, False),
        ({6: 1e-3, 5: 1e-4}, False),  # not below it
        ({6: None, 5: 1e-4}, False),
        ({6: 1e-4, 5: None}, False),
        ({6: 0.0, 5: 0.0}, True),
    ],
)
def test_two_looks_below_the_least_gain_end_a_sweep(
    gains: dict[int, float | None], ends: bool
) -> None:
    six = [_seen(slot) for slot in range(6)]
    found = find_end(_by_count(gains), six, min_gain=1e-3)
    assert found == (End(gains[6] or 0.0, gains[5] or 0.0, 6) if ends else None)


def test_no_sweep_ends_before_five_slots_have() -> None:
    never = _by_count(dict.fromkeys(range(9), 0.0))
    running = [_seen(slot, "running") for slot in range(5, 9)]
    assert find_end(never, [*map(_seen, range(4)), *running], min_gain=1e-3) is None
    assert find_end(never, [*map(_seen, range(5)), *running], min_gain=1e-3) is not None
    failed = [_seen(4, "diverged")]
    assert find_end(never, [*map(_seen, range(4)), *failed], min_gain=1e-3) is not None


def test_zero_switches_it_off() -> None:
    never = _by_count(dict.fromkeys(range(9), 0.0))
    assert find_end(never, [_seen(slot) for slot in range(8)], min_gain=0.0) is None


def test_the_last_result_is_that_of_the_highest_slot_whatever_the_order() -> None:
    looks = []

    def gain_of(observations: Sequence[Observation]) -> float | None:
        looks.append({seen.slot for seen in observations})
        return 0.0

    slots = [_seen(slot) for slot in (7, 1, 0, 5, 3)]
    assert find_end(gain_of, [*slots, _seen(9, "running")], min_gain=1e-3) is not None
    assert looks == [{0, 1, 3, 5, 7, 9}, {0, 1, 3, 5, 9}], "what runs is known at both looks"


def test_gains_are_told_from_five_results_on_and_in_the_order_of_slots() -> None:
    def gain_of(observations: Sequence[Observation]) -> float | None:
        return None if len(observations) == 6 else float(observations[-1].slot)

    slots = [_seen(slot) for slot in (6, 8, 2, 1, 0, 3, 4)] + [_seen(5, "running")]
    assert gains_by_results(gain_of, slots) == [(5, 4.0), (7, 8.0)]
    assert gains_by_results(gain_of, slots[:4]) == []
