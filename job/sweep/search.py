"""Which untried point of a sweep is expected to improve most on its best trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from job.sweep import gaussian_process as gp
from job.sweep.distributions import Distribution, Params, ParamValue
from job.sweep.gaussian_process import Array
from job.sweep.observations import Told
from job.sweep.search_space import axes, candidates, gaps, places

UNSURE_SD = 2.0  # of a failed or stopped trial's loss, in standard deviations of the told losses
LOOKED_AROUND = 4  # the best points, whose neighbours are candidates in a space too large to list


def most_promising(
    domains: Mapping[str, Distribution],
    told: Sequence[Told],
    *,
    running: Sequence[Mapping[str, ParamValue]],
    tried: Sequence[Mapping[str, ParamValue]],
    infeasible: Sequence[Mapping[str, ParamValue]],
    seed: int,
) -> tuple[Params, float] | None:
    """The point, none of `tried`, that is expected to gain most, and its gain in nats.

    `told` are two or more trials that have ended; those that are `running` are believed to end as
    the process expects. The improvement is measured against the lowest loss that the process
    believes of a tried point, since the lowest that was seen is the luckiest. Points that need as
    much memory as an `infeasible` one are left out, unless nothing else is left. None where no
    point is left.
    """
    best_first = sorted(told, key=lambda trial: trial.loss)
    around = [trial.params for trial in best_first[:LOOKED_AROUND]]
    points = candidates(domains, tried=tried, around=around, seed=seed)
    points = [point for point in points if not _needs_as_much(point, infeasible)] or points
    if not points:
        return None
    along = axes(domains)
    losses = np.array([trial.loss for trial in told])
    spread = float(losses.std())
    at = places(along, [*(trial.params for trial in told), *running])
    draws = gp.prior_draws([axis.length for axis in along], seed)
    unsure = np.array([0.0 if trial.is_sure else UNSURE_SD for trial in told])
    process = _process(
        draws, gaps(along, at, at), (losses - losses.mean()) / (spread or 1.0), unsure
    )
    believed, _ = process.predict(gaps(along, at, at))
    gain = process.expected_improvement(
        gaps(along, at, places(along, points)), believed.min(axis=1)
    )
    # Compared by 6 digits: the last ones depend on the machine's BLAS.
    chosen = int(np.argmax(np.round(gain / (gain.max() or 1.0), 6)))
    return points[chosen], float(f"{gain[chosen] * spread:.6g}")


def _needs_as_much(
    point: Mapping[str, ParamValue], infeasible: Sequence[Mapping[str, ParamValue]]
) -> bool:
    """Whether memory or the adapter's limit cannot hold the point: both grow with the rank."""
    return any(
        point.get("quantization") == known.get("quantization")
        and float(point.get("lora_r", 0)) >= float(known.get("lora_r", 0))
        for known in infeasible
    )


def _process(draws: gp.Draws, apart: Array, losses: Array, unsure: Array) -> gp.Process:
    """The process told the losses of the first points, and what it believes of the rest."""
    num_told, num_points = len(losses), len(apart)
    process = gp.told(draws, apart[:num_told, :num_told], losses, unsure)
    if num_points == num_told:
        return process
    mean, _ = process.predict(apart[:num_told, num_told:])
    return gp.believing(process, apart, np.append(unsure, np.zeros(num_points - num_told)), mean)
