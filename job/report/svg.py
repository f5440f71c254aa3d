"""Scales, axes and marks of small SVG charts, coloured by the page's style sheet.

Drawn here and not by matplotlib: its colours are fixed in the file, while these follow the reader's
light or dark theme; it needs 0.47 s of CPU for six plain charts (0.02 here) and seven packages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from job.report.notation import number

WIDTH, HEIGHT = 440, 270  # of a chart, in its own units; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 42  # margins that hold the labels


@dataclass(frozen=True)
class Scale:
    """Maps values from `low` to `high` onto pixels, linearly or by their logarithm."""

    low: float
    high: float
    start: float  # pixel of `low`
    end: float
    log: bool = False
    whole: bool = False  # only whole numbers are labelled: trials, slots, steps

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(value)
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values to label: about five, or those of 1, 2 and 5 in each decade."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            digits = (1, 2, 5) if len(decades) <= 3 else (1,)
            values = [digit * 10.0**decade for decade in decades for digit in digits]
            return [v for v in values if self.low * 0.999 <= v <= self.high * 1.001]
        step = _round_step((self.high - self.low) / 5)
        if self.whole:
            step = max(1.0, step)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(k * step, 12) for k in range(first, last + 1)]


def scale(
    values: Iterable[float],
    start: float,
    end: float,
    *,
    log: bool = False,
    pad: float = 0.06,
    whole: bool = False,
) -> Scale:
    """A scale over `values` with a little room on both sides."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite), max(finite)
    if log:
        room = (high / low) ** pad if high > low else 2.0
        return Scale(low / room, high * room, start, end, log=True)
    room = (high - low) * pad if high > low else abs(high) * 0.1 or 1.0
    return Scale(low - room, high + room, start, end, whole=whole)


def x_scale(
    values: Iterable[float], *, log: bool = False, pad: float = 0.06, whole: bool = False
) -> Scale:
    """A scale over a chart's width."""
    return scale(values, LEFT, WIDTH - RIGHT, log=log, pad=pad, whole=whole)


def y_scale(values: Iterable[float], *, log: bool = False) -> Scale:
    """A scale over a chart's height, upwards."""
    return scale(values, HEIGHT - BOTTOM, TOP, log=log)


def chart(label: str, marks: Iterable[str], *, height: float = HEIGHT) -> str:
    """An SVG that a screen reader calls `label`."""
    body = "".join(marks)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}"'
        f' xmlns="http://www.w3.org/2000/svg">{body}</svg>'
    )


def axes(x: Scale, y: Scale, x_label: str, y_label: str) -> Iterable[str]:
    """Both axes with ticks, grid lines and names."""
    bottom = HEIGHT - BOTTOM
    for value in y.ticks():
        yield line([(LEFT, y(value)), (WIDTH - RIGHT, y(value))], "grid")
        yield text(LEFT - 6, y(value) + 4, number(value), "tick", anchor="end")
    for value in x.ticks():
        yield line([(x(value), bottom), (x(value), bottom + 4)], "axis")
        yield text(x(value), bottom + 16, number(value), "tick")
    yield line([(LEFT, bottom), (WIDTH - RIGHT, bottom)], "axis")
    yield text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "name")
    middle = (TOP + bottom) / 2
    yield (
        f'<text class="name" text-anchor="middle" transform="translate(14 {middle:.1f})'
        f' rotate(-90)">{escape(y_label)}</text>'
    )


def line(
    points: Sequence[tuple[float, float]], css: str, tip: str = "", *, slot: int | None = None
) -> str:
    """A line through points in pixels; a reader sees `tip` when pointing at it.

    The line of a slot can be pointed at from a few pixels away.
    """
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    drawn = f'<polyline class="{css}"{_of(slot)} points="{path}">{_tip(tip)}</polyline>'
    if slot is None:
        return drawn
    return f'<polyline class="near"{_of(slot)} points="{path}"/>{drawn}'


def dot(x: float, y: float, css: str, tip: str = "", *, slot: int | None = None) -> str:
    """A point."""
    at = f'cx="{x:.1f}" cy="{y:.1f}" r="4.5"'
    return f'<circle class="{css}"{_of(slot)} {at}>{_tip(tip)}</circle>'


def bar(
    x: float,
    y: float,
    *,
    width: float,
    height: float,
    css: str,
    tip: str = "",
    slot: int | None = None,
) -> str:
    """A rectangle from its upper left corner."""
    return (
        f'<rect class="{css}"{_of(slot)} x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}"'
        f' height="{max(0.0, height):.1f}">{_tip(tip)}</rect>'
    )


def text(x: float, y: float, words: str, css: str, *, anchor: str = "middle") -> str:
    """Words at a point."""
    return (
        f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
    )


def _round_step(raw: float) -> float:
    magnitude = 10.0 ** math.floor(math.log10(raw))
    return next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw * 0.999)


def _of(slot: int | None) -> str:
    """Whose mark it is: the page lights up all marks of the slot that a reader points at."""
    return "" if slot is None else f' data-slot="{slot}"'


def _tip(tip: str) -> str:
    return f"<title>{escape(tip)}</title>" if tip else ""
