"""Scales and marks of the report's charts. `pytest tests/report/test_svg.py`"""

from __future__ import annotations

import pytest

from job.report.notation import amount, duration, number
from job.report.svg import LEFT, RIGHT, WIDTH, Scale, dot, scale, text, x_scale


def test_a_scale_maps_its_ends_to_its_pixels() -> None:
    linear = Scale(2, 4, 100, 300)
    assert [linear(2), linear(3), linear(4)] == [100, 200, 300]
    log = Scale(1e-5, 1e-3, 0, 100, log=True)
    assert log(1e-4) == pytest.approx(50)


def test_a_scale_leaves_room_around_its_values() -> None:
    around = x_scale([1, 2])
    assert LEFT < around(1) < around(2) < WIDTH - RIGHT


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_a_single_value_has_a_scale_too(value: float) -> None:
    assert scale([value], 0, 100)(value) == pytest.approx(50)
    assert scale([abs(value) + 1], 0, 100, log=True)(abs(value) + 1) == pytest.approx(50)


def test_infinite_losses_do_not_stretch_a_scale() -> None:
    assert scale([1.0, float("inf"), 2.0], 0, 100, pad=0).high == 2.0


def test_ticks_are_round_and_inside() -> None:
    assert Scale(1.03, 1.97, 0, 1).ticks() == [1.2, 1.4, 1.6, 1.8]
    assert Scale(5e-6, 2e-4, 0, 1, log=True).ticks() == pytest.approx([1e-5, 1e-4])
    assert Scale(2e-4, 2e-3, 0, 1, log=True).ticks() == pytest.approx([2e-4, 5e-4, 1e-3, 2e-3])


def test_trials_and_steps_have_whole_ticks() -> None:
    assert Scale(0.9, 3.1, 0, 1, whole=True).ticks() == [1, 2, 3]


def test_what_the_bucket_holds_cannot_break_out_of_a_drawing() -> None:
    assert "<script>" not in text(0, 0, "<script>", "tick")
    assert "&lt;script&gt;" in dot(0, 0, "point", "<script>")


@pytest.mark.parametrize(
    ("value", "words"),
    [(2e-4, "2e-4"), (1.5e-6, "1.5e-6"), (0.05, "0.05"), (1500, "1500"), (0, "0"), (8, "8"),
     (1.02753, "1.028"), (-3e-5, "-3e-5"), (2.5e6, "2.5e6")],
)  # fmt: skip
def test_numbers_are_short(value: float, words: str) -> None:
    assert number(value) == words


@pytest.mark.parametrize(
    ("count", "words"), [(7.25e9, "7.25 B"), (1.97e6, "1.97 M"), (46_800, "46.8 k"), (90, "90")]
)
def test_amounts_have_a_fitting_unit(count: float, words: str) -> None:
    assert amount(count) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(119, "119 s"), (120, "2 min"), (720, "12 min"), (7199, "120 min"), (7200, "2.0 h")],
)
def test_durations_have_a_fitting_unit(seconds: float, words: str) -> None:
    assert duration(seconds) == words
