"""What one more trial of a sweep is expected to gain, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from job.ledger.accounts import Cost
from job.report.overview import COMMITTED, Overview, SlotView
from job.sweep.observations import Observation
from job.sweep.stopping import GainOf, gains_by_results
from job.trial.end import gain_by, is_trained, median_gpu_seconds, nats, price, why_ended


@dataclass(frozen=True)
class Outlook:
    """The expected gain of another trial, and the price of one; None where they are not known."""

    gain: float | None  # nats of eval/loss
    trial_gpu_seconds: float | None
    decided_by_wandb: bool  # when the sweep ends
    paid_usd: float | None = None  # for a trial; None: not every attempt's account tells a price

    def words(self, usd_per_hour: float | None) -> str | None:
        """Both in words: 0.00031 nats for 2.3 GPU-hours ($0.81); None without a gain."""
        if self.gain is None:
            return None
        told = self.price(usd_per_hour)
        return nats(self.gain) if told is None else f"{nats(self.gain)} for {told}"

    def price(self, usd_per_hour: float | None) -> str | None:
        """The price of a trial in words; None before the first one ended.

        What was paid, by the accounts; `usd_per_hour` counts where one of them tells no price.
        """
        if self.trial_gpu_seconds is None:
            return None
        return price(self.trial_gpu_seconds, usd_per_hour, paid_usd=self.paid_usd)

    def trial_usd(self, usd_per_hour: float | None) -> float | None:
        """The price of a trial in dollars, as `price`; None where no price is known."""
        if self.paid_usd is not None:
            return round(self.paid_usd, 4)
        if self.trial_gpu_seconds is None or usd_per_hour is None:
            return None
        return round(self.trial_gpu_seconds / 3600 * usd_per_hour, 4)

    def paid_for(self, gpu_seconds: float | None) -> float | None:
        """The dollars of so many GPU-seconds, at the price paid for a trial's; None without it."""
        if self.paid_usd is None or not self.trial_gpu_seconds or gpu_seconds is None:
            return None
        return self.paid_usd / self.trial_gpu_seconds * gpu_seconds


def outlook_of(overview: Overview) -> Outlook:
    """What the results so far let another trial gain and cost."""
    gain_of = _gain_of(overview)
    counted = [v for v in overview.slots if v.judged and v.result and is_trained(v.result)]
    return Outlook(
        gain=None if gain_of is None else gain_of(observations(overview)),
        trial_gpu_seconds=median_gpu_seconds(view.result for view in counted if view.result),
        decided_by_wandb=any(view.wandb_sweep for view in overview.slots),
        paid_usd=_paid([view.trial_cost for view in counted]),
    )


def _paid(costs: Sequence[Cost]) -> float | None:
    """The median dollars of the trials; None where an account tells no price, or there is none."""
    if not costs or not all(cost.gpu_seconds and cost.is_priced for cost in costs):
        return None
    return median(cost.dollars(None) for cost in costs)


def gains(overview: Overview) -> list[tuple[int, float]]:
    """The expected gain of the next trial after 5, 6, … of the sweep's results, by slot."""
    gain_of = _gain_of(overview)
    return [] if gain_of is None else gains_by_results(gain_of, observations(overview))


def gain_lines(
    overview: Overview, outlook: Outlook, *, min_gain: float, usd_per_hour: float | None
) -> list[str]:
    """Say whether another trial is worth its price, and whether the sweep has ended."""
    if has_ended(overview, min_gain):
        assert overview.ended is not None
        paid_usd = outlook.paid_for(overview.ended.trial_gpu_seconds)
        return [why_ended(overview.ended, usd_per_hour, paid_usd=paid_usd)]
    words = outlook.words(usd_per_hour)
    if words is None:
        return []
    if outlook.decided_by_wandb:
        return [f"another trial is expected to gain {words}; W&B decides when the sweep ends"]
    limit = f"ends the sweep below {min_gain:g} twice running" if min_gain else "ends no sweep"
    return [f"another trial is expected to gain {words} (JOB_MIN_GAIN {limit})"]


def has_ended(overview: Overview, min_gain: float) -> bool:
    """Whether no new slot is begun any more under this `JOB_MIN_GAIN`."""
    return overview.ended is not None and overview.ended.holds(min_gain)


def _gain_of(overview: Overview) -> GainOf | None:
    known = [o.untrained_loss for o in observations(overview) if o.untrained_loss is not None]
    step_0_loss = max(known, default=None)
    return gain_by(overview.identity, sweep=overview.sweep, step_0_loss=step_0_loss)


def observations(overview: Overview) -> list[Observation]:
    """What the engine is told of the slots, as `job.trial.draw.observe` tells it."""
    return [
        Observation(
            view.slot,
            view.params,
            "running" if view.result is None else view.result.status,
            None if view.result is None else view.result.eval_loss,
            next((loss for step, loss in view.curve[:1] if step == 0), None),
        )
        for view in overview.slots
        if _is_told(view)
    ]


def _is_told(view: SlotView) -> bool:
    return view.state in ("running", "waiting", *COMMITTED)
