"""Numbers and names as people read them, in tables and charts alike."""

from __future__ import annotations


def number(value: float) -> str:
    """A number in short: 0.0002 as 2e-4, 1500 as 1500."""
    if value and (abs(value) < 1e-2 or abs(value) >= 1e5):
        digits, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:.4g}"


def amount(count: float) -> str:
    """A count of tokens or weights in short: 46.8 k, 1.97 M, 7.25 B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"


def trials(count: int) -> str:
    """A number of trials in words: 1 trial, 12 trials."""
    return f"{count} trial" if count == 1 else f"{count} trials"


def duration(seconds: float) -> str:
    """A time in the unit that fits it: 95 s, 12 min, 2.4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def span(short: float, long: float) -> str:
    """A forecast's range of times: 91 min to 2.5 h; below a minute it tells no seconds."""
    if long < 60:
        return "under a minute"
    if duration(short) == duration(long):
        return f"about {duration(long)}"
    return f"{'under a minute' if short < 60 else duration(short)} to {duration(long)}"


def short_name(parameter: str) -> str:
    """A parameter's name for narrow columns and axes: lr for learning_rate."""
    return {"gradient_accumulation_steps": "accumulation", "learning_rate": "lr"}.get(
        parameter, parameter
    )


def plain(value: object) -> str:
    """A hyper-parameter's value as text; empty for None."""
    if value is None:
        return ""
    return number(value) if isinstance(value, int | float) else str(value)
