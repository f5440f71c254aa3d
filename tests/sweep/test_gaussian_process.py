"""The Gaussian process, against closed forms: pytest tests/sweep/test_gaussian_process.py"""

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import gamma, kv
from scipy.stats import multivariate_normal, norm

from job.sweep import gaussian_process as gp
from job.sweep.gaussian_process import Draws, LengthPrior

RATE = LengthPrior((0.6, 0.6), 0.5)
OTHER = LengthPrior((5.0, 1.0), 0.8)


def one_draw(*, lengths: tuple[float, ...] = (1.0,), scale: float = 1.0, noise: float) -> Draws:
    return Draws(np.array([lengths]), np.array([scale]), np.array([noise]))


def apart(*left: float, to: tuple[float, ...]) -> gp.Array:
    """The gaps between points on one axis."""
    return np.abs(np.array(left)[:, None] - np.array(to)[None, :])[..., None]


@pytest.mark.parametrize("distance", [1e-6, 0.3, 1.0, 4.0])
def test_matern_is_the_general_one_with_bessel_functions_at_five_halves(distance: float) -> None:
    nu = 2.5  # Rasmussen and Williams, equation 4.14
    at = math.sqrt(2 * nu) * distance
    general = 2 ** (1 - nu) / gamma(nu) * at**nu * kv(nu, at)
    assert gp.matern52(np.array(distance)) == pytest.approx(general, rel=1e-6)


def test_posterior_of_two_points_is_the_one_worked_out_by_hand() -> None:
    noise, gap = 0.5, 0.7
    process = gp.told(
        one_draw(noise=noise), apart(0, gap, to=(0, gap)), np.array([1.0, -2.0]), np.zeros(2)
    )
    level = gp.CONSTANT_SD**2
    near = (1 + math.sqrt(5) * gap + 5 * gap**2 / 3) * math.exp(-math.sqrt(5) * gap) + level
    own, total = 1 + level + noise**2 + gp.JITTER, 1 + level
    # [own near; near own]^-1 = [own -near; -near own] / (own^2 - near^2)
    determinant = own**2 - near**2
    first = (own * 1.0 - near * -2.0) / determinant
    second = (own * -2.0 - near * 1.0) / determinant
    mean, sd = process.predict(apart(0, gap, to=(0,)))
    assert mean[0, 0] == pytest.approx(total * first + near * second)
    explained = (own * total**2 - 2 * near * total * near + own * near**2) / determinant
    assert sd[0, 0] == pytest.approx(math.sqrt(total - explained))


def test_far_from_every_point_only_the_level_is_known() -> None:
    process = gp.told(one_draw(noise=0.1), apart(0, to=(0,)), np.array([1.0]), np.zeros(1))
    level = gp.CONSTANT_SD**2
    mean, sd = process.predict(apart(0, to=(1e6,)))
    variance = 1 + level + 0.01 + gp.JITTER
    assert mean[0, 0] == pytest.approx(level / variance)
    assert sd[0, 0] == pytest.approx(math.sqrt(1 + level - level**2 / variance))


def test_an_unsure_loss_moves_the_mean_less() -> None:
    def mean(unsure: float) -> float:
        draws, losses = one_draw(noise=0.1), np.array([1.0])
        process = gp.told(draws, apart(0, to=(0,)), losses, np.array([unsure]))
        return float(process.predict(apart(0, to=(0,)))[0][0, 0])

    assert mean(0.0) == pytest.approx(1.25 / (1.26 + gp.JITTER))
    assert mean(2.0) == pytest.approx(1.25 / (5.26 + gp.JITTER))


def test_marginal_likelihood_is_scipys_multivariate_normal_density() -> None:
    draws = gp.prior_draws([RATE, OTHER], seed=3, num_draws=8)
    random = np.random.default_rng(0)
    places, losses = random.random((6, 2)), random.normal(size=6)
    gaps = np.abs(places[:, None] - places[None, :])
    covariance = gp.covariance(draws, gaps)
    covariance += draws.noise[:, None, None] ** 2 * np.eye(6)
    found = gp.log_marginal_likelihood(np.linalg.cholesky(covariance), losses)
    expected = [multivariate_normal(np.zeros(6), each).logpdf(losses) for each in covariance]
    assert found == pytest.approx(np.array(expected))


@pytest.mark.parametrize(
    ("mean", "sd", "best"), [(0.0, 1.0, 0.0), (1.0, 0.5, 0.2), (-1.0, 2.0, 0.5)]
)
def test_expected_improvement_is_the_integral(mean: float, sd: float, best: float) -> None:
    def gained(loss: float) -> float:
        return (best - loss) * float(norm.pdf(loss, mean, sd))

    expected, _ = quad(gained, mean - 12 * sd, best)
    found = gp.expected_improvement(np.array(mean), np.array(sd), np.array(best))
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_expected_improvement_without_doubt_is_the_difference_or_nothing() -> None:
    found = gp.expected_improvement(np.array([0.2, 0.9]), np.zeros(2), np.array(0.5))
    assert found == pytest.approx(np.array([0.3, 0.0]))


def test_weights_are_the_heaviest_marginal_likelihoods() -> None:
    draws = gp.prior_draws([RATE], seed=1)
    gaps, losses = apart(0, 0.3, 0.9, to=(0, 0.3, 0.9)), np.array([1.2, -0.7, -0.5])
    process = gp.told(draws, gaps, losses, np.zeros(3))
    covariance = gp.covariance(draws, gaps)
    covariance += (draws.noise[:, None, None] ** 2 + gp.JITTER) * np.eye(3)
    evidence = np.exp(
        [multivariate_normal(np.zeros(3), each).logpdf(losses) for each in covariance]
    )
    heaviest = np.sort(evidence)[-gp.NUM_KEPT :]
    assert np.sort(process.weights) == pytest.approx(heaviest / heaviest.sum())
    assert process.weights.sum() == pytest.approx(1.0)


def test_prior_draws_have_the_medians_and_spreads_of_their_priors() -> None:
    draws = gp.prior_draws([RATE, OTHER], seed=7, num_draws=4096)
    halves = draws.lengths[:2048, 1], draws.lengths[2048:, 1]
    assert [float(np.median(half)) for half in halves] == pytest.approx([5.0, 1.0], rel=0.05)
    assert np.median(draws.lengths[:, 0]) == pytest.approx(0.6, rel=0.05)
    assert np.log(draws.lengths[:, 0]).std() == pytest.approx(0.5, rel=0.05)
    assert np.median(draws.scale) == pytest.approx(1.2, rel=0.05)
    assert np.log(draws.noise).std() == pytest.approx(0.8, rel=0.05)


def test_a_latin_hypercube_has_one_point_in_each_slice_of_every_axis() -> None:
    points = gp.latin_hypercube(128, 6, np.random.default_rng(0))
    for axis in points.T:
        assert sorted((axis * 128).astype(int)) == list(range(128))
    assert not np.array_equal(np.argsort(points[:, 0]), np.argsort(points[:, 1]))


def test_a_running_point_is_believed_to_end_as_expected_and_makes_its_place_sure() -> None:
    draws = one_draw(noise=0.1)
    both = apart(0, 1, to=(0, 1))
    before = gp.told(draws, both[:1, :1], np.array([1.0]), np.zeros(1))
    mean, sd = before.predict(both[:1, 1:])
    after = gp.believing(before, both, np.zeros(2), mean)
    mean_after, sd_after = after.predict(both[:, 1:])
    assert mean_after[0, 0] == pytest.approx(mean[0, 0]), "what is believed teaches nothing"
    assert sd_after[0, 0] < 0.11 < sd[0, 0]
