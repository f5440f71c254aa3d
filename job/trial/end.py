"""The early end of a sweep: found from its results, kept in `ended.json`, told in a line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from job.errors import SlotError
from job.ledger.accounts import dollars, now
from job.ledger.ledger import Ledger
from job.ledger.records import Ended, Identity, Result
from job.ledger.slot import Slot
from job.settings import Settings
from job.sweep.builtin import expected_gain
from job.sweep.definition import parse_definition
from job.sweep.observations import Observation
from job.sweep.stopping import GainOf, find_end
from job.trial.draw import Observed, observe

_TRAINED = ("completed", "truncated", "stopped")


def worth_working_on(
    settings: Settings, ledger: Ledger, numbers: list[int]
) -> tuple[list[int], Ended | None]:
    """Those of the open slots that are to be worked on, and why others are not.

    All of them, unless the sweep has ended: then only those that are drawn, or that a person began
    again. Called before anything is loaded. Raises a damaged slot's `SlotError`.
    """
    new = []
    for number, is_new in ledger.read_slots(numbers, _is_new):
        if isinstance(is_new, SlotError):
            raise is_new
        if is_new:
            new.append(number)
    if not new or (ended := end_of(settings, ledger)) is None:
        return numbers, None
    return [number for number in numbers if number not in new], ended


def _is_new(slot: Slot) -> bool:
    return slot.generation == 0 and slot.spec() is None


def end_of(settings: Settings, ledger: Ledger, observed: Observed | None = None) -> Ended | None:
    """The end of the sweep, found before or now and then kept; None if it goes on.

    `observed` is what the slots were just seen to say; without it they are looked at here.
    It is judged by what the sweep froze, not by our settings, which may be another sweep's. A W&B
    sweep ends when W&B says so.
    """
    if not settings.min_gain or settings.wandb_sweep_id is not None:
        return None
    if (ended := ledger.ended()) is not None and ended.holds(settings.min_gain):
        return ended
    identity = ledger.identity()
    observations, step_0_loss = observed or observe(ledger, settings.num_trials)
    gain_of = gain_by(identity, sweep=ledger.sweep, step_0_loss=step_0_loss)
    if gain_of is None:
        return None
    end = find_end(gain_of, observations, min_gain=settings.min_gain)
    if end is None:
        return None
    ended = Ended(
        gain=end.gain,
        gain_before=end.gain_before,
        results=end.results,
        min_gain=settings.min_gain,
        trial_gpu_seconds=median_gpu_seconds(
            result for _, _, result in ledger.committed(settings.num_trials)
        ),
        ended_at=now(),
    )
    ledger.end(ended)
    return ended


def gain_by(identity: Identity | None, *, sweep: str, step_0_loss: float | None) -> GainOf | None:
    """The engine's expected gain for the sweep as its first trial froze it; None before that."""
    if identity is None or not identity.sweep_file:
        return None
    definition = parse_definition(identity.searched, where="sweep.json", free_name=True)

    def gain_of(observations: Sequence[Observation]) -> float | None:
        return expected_gain(
            definition, sweep=sweep, observations=observations, step0_loss=step_0_loss
        )

    return gain_of


def ended_line(settings: Settings, ended: Ended, *, name: str) -> str:
    """Say in a line why `name`, a slot or a sweep, is not begun, and how to go on."""
    return f"{name}: no new trial is begun, {why_ended(ended, settings.gpu_hourly_usd)}"


def why_ended(ended: Ended, usd_per_hour: float | None, *, paid_usd: float | None = None) -> str:
    """Say what another trial was expected to gain, its price as `price` says it, and the way on."""
    for_price = ""
    if ended.trial_gpu_seconds is not None:
        for_price = f", for {price(ended.trial_gpu_seconds, usd_per_hour, paid_usd=paid_usd)}"
    return (
        f"the sweep ended after {ended.results} results: another one was expected to gain"
        f" {nats(ended.gain)} of eval/loss ({nats(ended.gain_before)} before the last result, the"
        f" limit is {ended.min_gain:g}){for_price}; JOB_MIN_GAIN=0 goes on"
    )


def nats(gain: float) -> str:
    """An expected gain in words: 0.00031 nats."""
    return f"{gain:.2g} nats" if gain >= 1e-6 else "0 nats"


def price(gpu_seconds: float, usd_per_hour: float | None, *, paid_usd: float | None = None) -> str:
    """The price of a trial in words: 2.3 GPU-hours ($0.81).

    `paid_usd` is what was paid for it, as the accounts say. Where they do not, it is reckoned at
    `usd_per_hour`, the price of whoever asks, and the words say so.
    """
    hours = gpu_seconds / 3600
    words = f"{hours:.2g} GPU-hours" if hours >= 0.001 else "under 0.001 GPU-hours"
    if paid_usd is not None:
        return f"{words} ({_coarse(paid_usd)})"
    if usd_per_hour is None:
        return words
    return f"{words} ({_coarse(hours * usd_per_hour)} at {dollars(usd_per_hour)} an hour)"


def _coarse(usd: float) -> str:
    return "under a cent" if usd < 0.01 else dollars(usd)


def median_gpu_seconds(results: Iterable[Result]) -> float | None:
    """The median GPU-seconds of the trials that trained to an end; None if there are none."""
    seconds = [found.gpu_seconds for found in results if is_trained(found)]
    return median(seconds) if seconds else None


def is_trained(result: Result) -> bool:
    """Whether the trial trained to an end, so that its price says something of another one's."""
    return result.status in _TRAINED
