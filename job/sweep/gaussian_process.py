"""A Gaussian process over a sweep's points, its length scales averaged over rather than fitted.

A dozen losses cannot tell which length scales are true: the likeliest ones are often far off, and
sure of themselves. So 256 sets of them are drawn from priors, each is weighted by how likely it
makes the losses (its marginal likelihood), and what is asked of the process is the weighted mean of
what the heaviest twelve say. Rasmussen and Williams, Gaussian Processes for Machine Learning
(2006): posterior by Cholesky factors, algorithm 2.1; Matérn 5/2, equation 4.17; marginalisation,
section 5.2. Expected improvement: Jones, Schonlau and Welch (1998), equation 15.

Losses are standardised by the caller: mean 0, standard deviation 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

NUM_DRAWS = 256
NUM_KEPT = 12
CONSTANT_SD = 0.5  # of the level that the losses have far from every told point
SCALE = (1.2, 0.4)  # median and log-sd of the process's standard deviation
NOISE_SD = (0.06, 0.8)  # median and log-sd of what two trials at one point differ by
JITTER = 1e-8  # keeps equal points apart for the Cholesky factor


@dataclass(frozen=True)
class LengthPrior:
    """How far one goes along an axis before losses say little of each other: a lognormal.

    `medians` are those of the first and of the second half of the draws.
    """

    medians: tuple[float, float]
    log_sd: float


@dataclass(frozen=True)
class Draws:
    """Hyper-parameters of the process, one set a row."""

    lengths: Array  # (draws, axes), in the units of the axes
    scale: Array  # (draws,), standard deviation of the process
    noise: Array  # (draws,), standard deviation of one told loss

    def __getitem__(self, kept: Any) -> Draws:
        return Draws(self.lengths[kept], self.scale[kept], self.noise[kept])


def prior_draws(priors: Sequence[LengthPrior], seed: int, num_draws: int = NUM_DRAWS) -> Draws:
    """Draw hyper-parameters evenly from their priors: the same ones for the same seed."""
    from scipy.special import ndtri  # 0.1 s

    random, half = np.random.default_rng(seed), num_draws // 2
    cubes = [latin_hypercube(half, len(priors) + 2, random) for _ in range(2)]
    normal = ndtri(np.concatenate(cubes))
    medians = np.array([prior.medians for prior in priors]).reshape(-1, 2).T
    log_sds = np.array([prior.log_sd for prior in priors])
    return Draws(
        lengths=np.repeat(medians, half, axis=0) * np.exp(normal[:, 2:] * log_sds),
        scale=SCALE[0] * np.exp(normal[:, 0] * SCALE[1]),
        noise=NOISE_SD[0] * np.exp(normal[:, 1] * NOISE_SD[1]),
    )


def latin_hypercube(num_points: int, num_axes: int, random: np.random.Generator) -> Array:
    """Points (num_points, num_axes) inside the unit cube, one in each slice of every axis.

    McKay, Beckman and Conover (1979).
    """
    cells = random.permuted(np.tile(np.arange(num_points), (num_axes, 1)), axis=1).T
    inside = random.uniform(1e-6, 1 - 1e-6, size=cells.shape)
    return np.asarray((cells + inside) / num_points)


def matern52(distance: Array) -> Array:
    """The Matérn 5/2 correlation of two points that lie `distance` lengths apart."""
    near = np.sqrt(5.0) * distance
    return np.asarray((1 + near + near**2 / 3) * np.exp(-near))


def covariance(draws: Draws, gaps: Array) -> Array:
    """The prior covariance (draws, n, m) of points that lie `gaps` (n, m, axes) apart."""
    squares = np.einsum("nma,da->dnm", gaps**2, draws.lengths**-2.0)
    return draws.scale[:, None, None] ** 2 * matern52(np.sqrt(squares)) + CONSTANT_SD**2


def log_marginal_likelihood(factor: Array, losses: Array) -> Array:
    """The log density of `losses` (n,) or (draws, n), given the covariance's Cholesky factors."""
    white = _solve(factor, losses)
    log_determinant = np.log(np.einsum("dnn->dn", factor)).sum(axis=1)
    n = factor.shape[1]
    return np.asarray(-0.5 * (white**2).sum(axis=1) - log_determinant - n / 2 * np.log(2 * np.pi))


def expected_improvement(mean: Array, sd: Array, best: Array) -> Array:
    """By how much a normal with this mean and sd falls below `best`, on average, at least 0."""
    from scipy.special import ndtr

    sd = np.maximum(sd, 1e-12)
    z = (best - mean) / sd
    density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    return np.asarray(np.maximum((best - mean) * ndtr(z) + sd * density, 0.0))


@dataclass(frozen=True)
class Process:
    """The process after it was told losses: some sets of hyper-parameters and their weights."""

    draws: Draws
    weights: Array  # (draws,), sum 1
    factor: Array  # (draws, n, n), Cholesky factor of the told losses' covariance
    losses: Array  # (draws, n), standardised

    def predict(self, gaps: Array) -> tuple[Array, Array]:
        """Mean and sd (draws, m) of the loss at points `gaps` (n, m, axes) from the told ones."""
        across = covariance(self.draws, gaps)
        half = np.linalg.solve(self.factor, across)
        white = _solve(self.factor, self.losses)
        mean = np.einsum("dnm,dn->dm", half, white)
        total = self.draws.scale[:, None] ** 2 + CONSTANT_SD**2
        variance = total - np.einsum("dnm,dnm->dm", half, half)
        return mean, np.sqrt(np.maximum(variance, 0.0))

    def expected_improvement(self, gaps: Array, best: Array) -> Array:
        """The improvement on `best` (draws,) expected at points (m,), averaged over the draws."""
        mean, sd = self.predict(gaps)
        gain = expected_improvement(mean, sd, best[:, None])
        return np.asarray(np.einsum("dm,d->m", gain, self.weights))


def told(draws: Draws, gaps: Array, losses: Array, extra_noise: Array) -> Process:
    """Tell the process standardised `losses` (n,); keep the draws that explain them best.

    `gaps` are (n, n, axes); `extra_noise` (n,) is the sd by which a loss is less sure than others.
    """
    factor = _factor(draws, gaps, extra_noise)
    evidence = log_marginal_likelihood(factor, losses)
    kept = np.sort(np.argsort(-evidence, kind="stable")[:NUM_KEPT])
    weights = np.exp(evidence[kept] - evidence[kept].max())
    return Process(
        draws=draws[kept],
        weights=weights / weights.sum(),
        factor=factor[kept],
        losses=np.broadcast_to(losses, (len(kept), len(losses))),
    )


def believing(process: Process, gaps: Array, extra_noise: Array, mean: Array) -> Process:
    """The process told, besides, its own `mean` (draws, m) at m points that are being tried.

    So that the next point keeps away from them: their loss is taken for what it is expected to be
    (Ginsbourger et al. 2010, "kriging believer"). `gaps` (n + m, n + m, axes) and `extra_noise`
    (n + m,) are those of all points, these m last.
    """
    return Process(
        draws=process.draws,
        weights=process.weights,
        factor=_factor(process.draws, gaps, extra_noise),
        losses=np.concatenate([process.losses, mean], axis=1),
    )


def _factor(draws: Draws, gaps: Array, extra_noise: Array) -> Array:
    among = covariance(draws, gaps)
    noise = draws.noise[:, None] ** 2 + extra_noise**2 + JITTER
    return np.asarray(np.linalg.cholesky(among + noise[:, :, None] * np.eye(len(gaps))))


def _solve(factor: Array, losses: Array) -> Array:
    """Solve factor @ x = losses for each draw: (draws, n)."""
    right = np.broadcast_to(losses, factor.shape[:2])[..., None]
    return np.asarray(np.linalg.solve(factor, right)[..., 0])
