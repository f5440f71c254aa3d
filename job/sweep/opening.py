"""The first trials of a Bayesian sweep: a ladder of learning rates, a probe of small adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from job.sweep.distributions import (
    Distribution,
    FloatRange,
    Params,
    ParamValue,
    nearest,
    num_points,
    point,
    rounded,
)
from job.sweep.observations import Observation, is_better

RATE = "learning_rate"
SIZES = ("lora_r", "lora_alpha")  # larger is hardly ever worse once the rate is right


class Opening:
    """The first trials of `bayes`, which tell a Gaussian process more than random points do.

    The ladder: a third, all and a ninth of the highest learning rate (those within the range), at
    the largest adapter, since a rank is hardly ever too high once the rate is right. Then a probe:
    the best of these rates at the smallest adapter, which shows early where that is not so. What
    else the sweep names stays at the settings' values.
    """

    def __init__(
        self,
        domains: Mapping[str, Distribution],
        defaults: Mapping[str, ParamValue],
        largest_rank: int | None,
        warm_start: Mapping[str, ParamValue] | None,
    ) -> None:
        self.domains = domains
        usual = {name: nearest(domain, defaults.get(name)) for name, domain in domains.items()}
        sizes = [name for name in SIZES if name in domains]
        limits = {"lora_r": largest_rank}
        self.small = usual | {name: _ends(domains[name])[0] for name in sizes}
        self.large = usual | {name: _ends(domains[name], limits.get(name))[1] for name in sizes}
        rate = domains.get(RATE)
        self.rates = _rates(rate) if isinstance(rate, FloatRange) and rate.log else []
        self.ladder = [self.large | {RATE: value} for value in self.rates] or [self.large]
        if warm_start is not None:
            known = {name: nearest(d, warm_start.get(name)) for name, d in domains.items()}
            self.ladder[1:2] = [known]

    def point(
        self, slot: int, others: Sequence[Observation], step0_loss: float | None
    ) -> Params | None:
        """What the opening wants of `slot`; None when it is over."""
        ended = [o for o in others if o.status != "running"]
        is_lost = bool(ended) and not any(is_better(o, step0_loss) for o in ended)
        if is_lost and (retreat := self._retreat(others)) is not None:
            return retreat
        if slot < len(self.ladder):
            return self.ladder[slot]
        if slot == len(self.ladder) and self.small != self.large:
            return self.small | self._rate_of([o for o in others if is_better(o, step0_loss)])
        return None

    def _retreat(self, others: Sequence[Observation]) -> Params | None:
        """Where to look while nothing was better than no training: a tenth of the lowest rate.

        Or the smallest adapter, where all that ended did not fit the GPU.
        """
        if all(o.status in {"infeasible", "running"} for o in others):
            return self.small | self._rate_of(others)
        rate = self.domains.get(RATE)
        tried = [v for o in others if isinstance(v := o.params.get(RATE), int | float) and v > 0]
        if not tried or not isinstance(rate, FloatRange) or min(tried) <= rate.min:
            return None
        return self.large | {RATE: rounded(rate, max(min(tried) / 10, rate.min))}

    def _rate_of(self, known: Sequence[Observation]) -> Params:
        """The learning rate of the best of `known`, or the ladder's first, if there is a ladder."""
        if not self.rates:
            return {}
        best = min(
            known, key=lambda o: math.inf if o.eval_loss is None else o.eval_loss, default=None
        )
        value = None if best is None else best.params.get(RATE)
        return {RATE: nearest(self.domains[RATE], self.rates[0] if value is None else value)}


def _rates(domain: FloatRange) -> list[float]:
    return [
        rounded(domain, domain.max / part) for part in (3, 1, 9) if domain.max / part >= domain.min
    ]


def _ends(domain: Distribution, limit: int | None = None) -> tuple[ParamValue, ParamValue]:
    """The domain's smallest value, and its largest that is not above `limit`, or the smallest."""
    count = num_points(domain)
    assert count is not None, "ranks and alphas are whole numbers"
    rising = sorted((point(domain, index) for index in range(count)), key=float)
    allowed = [value for value in rising if limit is None or float(value) <= limit]
    return rising[0], (allowed or rising)[-1 if allowed else 0]
