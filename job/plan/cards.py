"""Kinds of card compared by the prices that a person gives: `job plan --price t4=0.15`.

A card's rate is measured where trials of the sweep ran on it. Elsewhere it is a T4's, times what
its maker's data sheets say of both cards' arithmetic and memory: between the two ratios, as the
work lies between the two limits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from job.errors import SettingsError
from job.ledger.accounts import dollars
from job.plan.forecast import (
    Span,
    Throughput,
    Workload,
    throughput_of_trials,
    trial_seconds,
)
from job.report.notation import span
from job.report.overview import Overview
from job.training.footprint import Recompute

# By NVIDIA's data sheets: TFLOPS of dense fp16 products in tensor cores with fp32 sums, GB/s.
# Looked up 2026-11-26 where others quote the sheets; not found so: the arithmetic of a10g and 3090.
# Of a card's kinds, these are v100 SXM2, a100 with 40 GB and h100 SXM.
CARDS = {
    "t4": (65, 320),
    "l4": (121, 300),
    "a10": (125, 600),
    "a10g": (70, 600),
    "v100": (125, 900),
    "3090": (71, 936),
    "4090": (165, 1008),
    "l40s": (362, 864),
    "a100": (312, 1555),
    "h100": (989, 3350),
}


@dataclass(frozen=True)
class Price:
    """What an hour of a kind of card costs."""

    card: str  # a key of `CARDS`, or a word of the card's name
    hourly_usd: float


@dataclass(frozen=True)
class Offer:
    """What the trials of a sweep would take and cost on a kind of card."""

    price: Price
    throughput: Throughput
    trial: Span

    def usd(self, num_trials: int) -> tuple[float, float]:
        """Dollars for so many trials, from the fast to the slow end."""
        hours = self.trial.times(num_trials / 3600)
        return hours.short * self.price.hourly_usd, hours.long * self.price.hourly_usd


def read_prices(texts: Sequence[str]) -> list[Price]:
    """The prices of `--price CARD=USD`. Raises `SettingsError`."""
    found = []
    for text in texts:
        match = re.fullmatch(r"([A-Za-z0-9]+)=(\d+(?:\.\d+)?|\.\d+)", text.strip())
        if match is None:
            raise SettingsError(
                f"plan: --price is {text!r:.80}; allowed: CARD=DOLLARS an hour, as in t4=0.15"
            )
        found.append(Price(match[1].lower(), float(match[2])))
    return found


def check_cards(prices: Sequence[Price], overview: Overview) -> None:
    """Refuse a price of a card whose rate nobody knows. Raises `SettingsError`."""
    for card in (price.card for price in prices):
        if card not in CARDS and _measured(card, overview) is None:
            raise SettingsError(
                f"plan: --price {card}=...: no rate of this card is known; allowed:"
                f" {', '.join(CARDS)}, and every card that trials of this sweep have run on"
            )


def offers(
    prices: Sequence[Price],
    overview: Overview,
    on_a_t4: Throughput | None,
    works: Sequence[Workload],
    recompute: Recompute,
) -> list[Offer]:
    """Each card whose rate is known, the cheapest first. Raises `SettingsError` for an unknown one.

    `on_a_t4` is a T4's rate by estimate. Without it those are the cards that trials of the sweep
    ran on and, if one of these is a T4, all others.
    """
    check_cards(prices, overview)
    found = []
    for price in prices:
        throughput = _throughput(price.card, overview, on_a_t4)
        if throughput is not None:
            found.append(Offer(price, throughput, trial_seconds(works, throughput, recompute)))
    return sorted(found, key=lambda offer: sum(offer.usd(1)))


def describe_offers(found: Sequence[Offer], num_trials: int) -> str:
    """A line for each card: its price, a trial's hours, the sweep's dollars, and the basis."""
    return "\n".join(_describe(offer, num_trials) for offer in found)


def _describe(offer: Offer, num_trials: int) -> str:
    low, high = (dollars(usd) for usd in offer.usd(num_trials))
    trial, price = offer.trial, offer.price
    return (
        f"{price.card} at {dollars(price.hourly_usd)} an hour: {span(trial.short, trial.long)} a"
        f" trial, {low if low == high else f'{low} to {high}'} for {num_trials}"
        f" ({offer.throughput.basis})"
    )


def _throughput(card: str, overview: Overview, on_a_t4: Throughput | None) -> Throughput | None:
    """The card's throughput, as trials of the sweep measured it or by published figures."""
    if (measured := _measured(card, overview)) is not None:
        return measured
    t4, whose = _measured("t4", overview), "what trials of this sweep did on a T4"
    if t4 is None:
        if on_a_t4 is None:
            return None
        t4, whose = on_a_t4, "a T4's estimate"
    if card == "t4":
        return t4
    arithmetic, memory = (own / of_t4 for own, of_t4 in zip(CARDS[card], CARDS["t4"], strict=True))
    basis = (
        f"{whose}, times {arithmetic:.2g} (arithmetic) or {memory:.2g} (memory) by data sheets;"
        " not measured"
    )
    low, high = sorted((arithmetic, memory))
    return Throughput(t4.slow * low, t4.fast * high, basis)


def _measured(card: str, overview: Overview) -> Throughput | None:
    """The throughput of the sweep's trials on this kind of card; None if there are none."""
    found = [
        view.tokens_per_second
        for view in overview.slots
        if view.judged and view.tokens_per_second and card in _words(view.gpu)
    ]
    return throughput_of_trials(found) if found else None


def _words(gpu: str | None) -> set[str]:
    """The words of a card's name: {tesla, t4}; {nvidia, a100, sxm4, 40gb}."""
    return set(re.findall(r"[a-z0-9]+", (gpu or "").lower()))
