"""How much of eval/loss each searched hyper-parameter explains, from the committed trials."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from job.report.overview import Overview
from job.sweep.distributions import Choice, Constant, Distribution

WEAK_BELOW_TRIALS = 20  # fewer trials say little about more than one parameter
MIN_TRIALS = 4  # a parabola through three points explains everything


@dataclass(frozen=True)
class Importance:
    """`share` of the variance of eval/loss's ranks that the parameter alone explains, 0 to 1."""

    name: str
    share: float


def importances(overview: Overview) -> list[Importance]:
    """The searched parameters, the most important first; none before `MIN_TRIALS` trials.

    A range is judged by a parabola, since a learning rate is best somewhere in between and a
    correlation would call that unimportant; a list of values by its groups' means. Adjusted R^2
    on ranks, so that one bad trial does not decide, and at least 0.
    """
    definition = overview.definition
    judged = overview.comparable
    if definition is None or len(judged) < MIN_TRIALS:
        return []
    losses = [view.eval_loss or 0.0 for view in judged]
    shares = explained_shares(definition.parameters, [view.params for view in judged], losses)
    found = [Importance(name, share) for name, share in shares.items()]
    return sorted(found, key=lambda importance: -importance.share)


def explained_shares(
    domains: Mapping[str, Distribution],
    points: Sequence[Mapping[str, Any]],
    losses: Sequence[float],
) -> dict[str, float]:
    """The share of the variance of the losses' ranks that each searched parameter explains."""
    ranks = _ranks(losses)
    return {
        name: _explained(domain, [params.get(name) for params in points], ranks)
        for name, domain in searched(domains).items()
    }


def searched(parameters: Mapping[str, Distribution]) -> dict[str, Distribution]:
    """The parameters that can take more than one value."""
    return {
        name: domain
        for name, domain in parameters.items()
        if not isinstance(domain, Constant)
        and not (isinstance(domain, Choice) and len(domain.values) == 1)
    }


def _explained(domain: Distribution, values: Sequence[Any], losses: np.ndarray[Any, Any]) -> float:
    if isinstance(domain, Choice):
        groups = [domain.values.index(v) if v in domain.values else -1 for v in values]
        columns = [[float(group == known) for group in groups] for known in sorted(set(groups))[1:]]
    else:
        plain = [float(value) for value in values]
        at = [math.log(v) for v in plain] if getattr(domain, "log", False) else plain
        columns = [at, [value**2 for value in at]]
    design = np.column_stack([np.ones(len(losses)), *(np.array(c) for c in columns)])
    rank = int(np.linalg.matrix_rank(design))
    free = len(losses) - rank
    total = float(np.sum((losses - losses.mean()) ** 2))
    if free < 1 or total == 0:
        return 0.0
    solution = np.linalg.lstsq(design, losses, rcond=None)[0]
    rest = float(np.sum((losses - design @ solution) ** 2))
    return max(0.0, 1 - (rest / free) / (total / (len(losses) - 1)))


def _ranks(values: Sequence[float]) -> np.ndarray[Any, Any]:
    """The rank of each value, 0 for the lowest; equal values share the mean of their ranks."""
    array = np.array(values)
    order = (array[:, None] > array[None, :]).sum(axis=1)
    ties = (array[:, None] == array[None, :]).sum(axis=1)
    return np.asarray(order + (ties - 1) / 2, dtype=float)
