"""When a sweep ends early: once another trial is expected to gain too little, twice running.

The expected gain overstates what another trial brings by far, so a sweep ends late rather than
early. One look may be chance, so two decide: with all results, and without the last one. Waiting
for trials that bring nothing better is not used: a good engine may look elsewhere for a while.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from job.sweep.observations import Observation

MIN_ENDED = 5  # fewer results say too little, whatever the engine expects

# Nats that one more trial is expected to gain, from what is known of a sweep's slots; None where
# the engine does not say. `builtin.expected_gain` with its other arguments given.
GainOf: TypeAlias = Callable[[Sequence[Observation]], float | None]


@dataclass(frozen=True)
class End:
    """Why a sweep ends: the gain that another trial was expected to bring at both looks."""

    gain: float  # nats of eval/loss
    gain_before: float  # without the last result
    results: int  # how many slots had ended


def find_end(
    gain_of: GainOf, observations: Sequence[Observation], *, min_gain: float
) -> End | None:
    """The end of the sweep; None while another trial is worth beginning, or `min_gain` is 0.

    The last result is that of the ended slot with the highest number: the same for all workers,
    whichever slot was committed last.
    """
    ended = _ended(observations)
    if min_gain <= 0 or len(ended) < MIN_ENDED:
        return None
    gain = gain_of(observations)
    if gain is None or gain >= min_gain:
        return None
    before = gain_of([seen for seen in observations if seen.slot != ended[-1].slot])
    if before is None or before >= min_gain:
        return None
    return End(gain, before, len(ended))


def gains_by_results(
    gain_of: GainOf, observations: Sequence[Observation]
) -> list[tuple[int, float]]:
    """The expected gain after the first 5, 6, … slots that have ended, in their order."""
    ended = _ended(observations)
    counts = range(MIN_ENDED, len(ended) + 1)
    gains = ((count, gain_of(ended[:count])) for count in counts)
    return [(count, gain) for count, gain in gains if gain is not None]


def _ended(observations: Sequence[Observation]) -> list[Observation]:
    """The slots that have ended, by number."""
    ended = (seen for seen in observations if seen.status != "running")
    return sorted(ended, key=lambda seen: seen.slot)
