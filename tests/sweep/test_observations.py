"""What the engine is told of slots that have ended: pytest tests/sweep/test_observations.py"""

import math

from job.sweep.observations import Observation, Told, is_better, tell


def ended(loss: float | None, status: str = "completed", slot: int = 0) -> Observation:
    return Observation(slot, {}, status, loss)


SEEN = [
    ended(1.2),
    ended(3.0, "truncated"),
    ended(1.1, "diverged"),
    ended(None, "infeasible"),
    ended(None, "running"),
    ended(math.nan),
    ended(1.3, "stopped"),
]


def test_told_loss_is_never_above_the_untrained_one() -> None:
    assert [trial.loss for trial in tell(SEEN, 1.4)] == [1.2, 1.4, 1.4, 1.4, 1.4, 1.3]


def test_only_a_trial_that_ran_its_course_is_sure() -> None:
    # One that used up its time has the loss that its adapter has: it is what the sweep can give.
    assert [trial.is_sure for trial in tell(SEEN, 1.4)] == [True, True, False, False, False, False]


def test_failed_trials_count_as_the_worst_loss_while_the_untrained_one_is_unknown() -> None:
    seen = [ended(1.2), ended(3.0), ended(None, "diverged")]
    assert tell(seen, None) == [Told({}, 1.2, True), Told({}, 3.0, True), Told({}, 3.0, False)]
    assert tell(seen[2:], None) == []


def test_a_trial_is_better_if_it_ended_below_the_untrained_loss() -> None:
    assert [is_better(trial, 1.4) for trial in SEEN] == [True, *[False] * 5, True]
    assert is_better(ended(3.0), None), "the untrained loss is not known"
    assert not is_better(ended(1.4), 1.4)
