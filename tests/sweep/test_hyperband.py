"""`early_terminate: hyperband` by W&B's rule: pytest tests/sweep/test_hyperband.py"""

import math

from job.sweep.hyperband import Hyperband, brackets, is_hopeless
from tests.sweep.test_definition import definition


def test_brackets_are_wandbs() -> None:
    assert brackets(Hyperband(min_iter=3), up_to=80) == [3, 9, 27]
    assert brackets(Hyperband(max_iter=27, s=2), up_to=80) == [3, 9]
    assert brackets(Hyperband(max_iter=27, s=9), up_to=80) == [1, 3, 9]
    assert brackets(Hyperband(min_iter=1, eta=1.5), up_to=6) == [1, 1, 2, 3, 5]


def test_bottom_of_a_bracket_is_stopped_and_the_best_third_goes_on() -> None:
    rule = Hyperband(min_iter=2, eta=3)
    histories = [[2.0, 1.0 + i / 10] for i in range(6)]
    stopped = [
        is_hopeless(rule, own, [other for other in histories if other is not own])
        for own in histories
    ]
    assert stopped == [False, False, False, True, True, True]  # W&B lets the threshold itself pass


def test_nothing_is_stopped_before_the_first_bracket_alone_or_without_a_rule() -> None:
    rule = Hyperband(min_iter=2)
    assert not is_hopeless(rule, [9.0], [[1.0, 1.0]] * 5)
    assert not is_hopeless(rule, [9.0, 9.0], [])
    assert not is_hopeless(None, [9.0, 9.0], [[1.0, 1.0]] * 5)
    assert is_hopeless(rule, [9.0, math.nan, 9.0], [[1.0, 1.0]] * 5)


def test_without_strict_a_trial_is_judged_by_its_best_loss() -> None:
    others = [[1.5, 1.5]] * 5
    assert is_hopeless(Hyperband(min_iter=2), [1.0, 2.0], others)
    assert not is_hopeless(Hyperband(min_iter=2, strict=False), [1.0, 2.0], others)


def test_hyperband_is_read_with_wandbs_defaults() -> None:
    read = definition(early_terminate={"type": "hyperband", "max_iter": 27, "s": 2})
    assert read.early_terminate == Hyperband(max_iter=27, s=2, eta=3.0, strict=True)
