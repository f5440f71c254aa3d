"""What a sweep cost in dollars: in all, by place, and by what made GPU time come to nothing."""

from __future__ import annotations

from collections.abc import Callable

from job.ledger.accounts import dollars
from job.report.notation import duration
from job.report.overview import Charge, Overview

NUM_NAMED = 6  # places; an Indexed Job's pods have a name each


def by_place(overview: Overview, hourly_usd: float | None) -> dict[str, float]:
    """Dollars by the node that an attempt ran on, the dearest first."""
    return _sums(overview, lambda charge: (charge.place, charge.gpu_seconds), hourly_usd)


def wasted_by_cause(overview: Overview, hourly_usd: float | None) -> dict[str, float]:
    """Dollars for GPU time on which nothing rests, by cause, the dearest first."""
    return _sums(overview, lambda charge: (charge.cause, charge.wasted_seconds), hourly_usd)


def is_priced(overview: Overview, hourly_usd: float | None) -> bool:
    """Whether the sweep's cost in dollars is known, or a part of it."""
    return hourly_usd is not None or any(c.hourly_usd is not None for c in _charges(overview))


def spent(overview: Overview, hourly_usd: float | None) -> str:
    """The dollars of the whole sweep; `hourly_usd` is the price where an attempt tells none."""
    cost = overview.cost
    words = dollars(cost.dollars(hourly_usd))
    if hourly_usd is None and not cost.is_priced:
        words += f" and {duration(cost.unpriced_seconds)} of GPU without a price"
    return words


def cost_lines(overview: Overview, hourly_usd: float | None, budget_usd: float | None) -> list[str]:
    """Say what the sweep cost so far, where, and what of it was wasted; nothing without a price."""
    if not overview.cost.dollars(hourly_usd):  # free, or without a price
        return []
    of_budget = "" if budget_usd is None else f" of {dollars(budget_usd)} (JOB_SWEEP_BUDGET_USD)"
    places = _listing(by_place(overview, hourly_usd), "{amount} on {name}")
    lines = [f"spent: {spent(overview, hourly_usd)}{of_budget}{': ' * bool(places)}{places}"]
    if causes := wasted_by_cause(overview, hourly_usd):
        listing = _listing(causes, "{amount} {name}")
        lines.append(f"wasted: {dollars(sum(causes.values()))} of it: {listing}")
    return lines


def _charges(overview: Overview) -> list[Charge]:
    return [charge for view in overview.slots for charge in view.charges]


def _sums(
    overview: Overview, part: Callable[[Charge], tuple[str, float]], hourly_usd: float | None
) -> dict[str, float]:
    sums: dict[str, float] = {}
    for charge in _charges(overview):
        price = hourly_usd if charge.hourly_usd is None else charge.hourly_usd
        name, seconds = part(charge)
        if price is not None and seconds:
            sums[name] = sums.get(name, 0.0) + seconds / 3600 * price
    return dict(sorted(sums.items(), key=lambda item: (-item[1], item[0])))


def _listing(sums: dict[str, float], form: str) -> str:
    shown = [form.format(name=name, amount=dollars(amount)) for name, amount in sums.items()]
    rest = sum(list(sums.values())[NUM_NAMED:])
    others = f"{dollars(rest)} on {len(shown) - NUM_NAMED} others"
    return ", ".join([*shown[:NUM_NAMED], *([others] if len(shown) > NUM_NAMED else [])])
