"""Fits and verdicts on curves whose truth is known, with the noise drawn anew many times."""

import numpy as np
import pytest
from scipy import stats
from scipy.interpolate import CubicSpline

from engram.sweep.fit import Curve, Interval, Smoother, below, difference, fit, lack_of_fit, quadratic, verdict

RHO = np.array([0.0, 0.1, 0.25, 0.5, 0.75, 1.0])


def drawn(truth: np.ndarray, noise: float, seeds: int, generator: np.random.Generator) -> Curve:
    """Losses of `truth` plus an effect of each seed, larger than the noise, plus noise."""
    effect = generator.normal(0, 10 * noise, seeds)
    return Curve(RHO, truth[:, None] + effect + generator.normal(0, noise, (len(RHO), seeds)))


def smooth(means: np.ndarray, error: float, at: np.ndarray) -> np.ndarray:
    return Smoother(RHO, at, error, float(np.ptp(means)))(means)


def u_shaped(best: float, depth: float) -> np.ndarray:
    return 3.0 + depth * (RHO - best) ** 2


def test_a_parabola_is_found_exactly() -> None:
    at = np.linspace(0, 1, 11)
    np.testing.assert_allclose(quadratic(RHO, u_shaped(0.3, 0.5), at), 3.0 + 0.5 * (at - 0.3) ** 2)


def test_the_smooth_curve_follows_any_smooth_truth() -> None:
    """Steep at one end alone, as no parabola is; against a spline through the same points."""
    means = 3 - 0.2 * np.exp(-RHO) + 0.2 * RHO**6
    at = np.linspace(0, 1, 41)
    np.testing.assert_allclose(smooth(means, 1e-5, at), CubicSpline(RHO, means)(at), atol=0.01)
    np.testing.assert_allclose(smooth(means, 1e-5, RHO), means, atol=1e-3)


def test_the_smooth_curve_is_pulled_by_noise_less_than_its_points() -> None:
    generator = np.random.default_rng(0)
    truth, noise = u_shaped(0.4, 0.3), 0.03
    errors = []
    for _ in range(50):
        means = truth + generator.normal(0, noise, len(RHO))
        errors.append((np.abs(smooth(means, noise, RHO) - truth).mean(), np.abs(means - truth).mean()))
    by_curve, by_points = np.mean(errors, axis=0)
    assert by_curve < by_points


@pytest.mark.parametrize(
    ("means", "n_minima"),
    [([3.2, 3.05, 3.0, 3.05, 3.2], 1), ([3.5, 3.4, 3.3, 3.2, 3.1], 1), ([3.790, 3.785, 3.790, 3.803, 3.932], 2)],
)
def test_minima_of_a_curve_that_a_steep_end_makes_swing_are_all_told(means: list[float], n_minima: int) -> None:
    rest = np.array([[1, -1, 0], [-1, 0, 1], [0, 1, -1], [1, 0, -1], [-1, 1, 0]])  # which leaves means as they are
    fitted = fit(Curve(np.linspace(0, 1, 5), np.array(means)[:, None] + 0.008 * rest))
    assert len(fitted.minima) == n_minima
    assert fitted.best_smooth.value in fitted.minima
    at = [int(np.searchsorted(fitted.grid, rho)) for rho in fitted.minima]
    assert all(fitted.smooth[i] == fitted.smooth[max(i - 1, 0) : i + 2].min() for i in at)


def test_noise_is_what_a_two_way_analysis_leaves() -> None:
    generator = np.random.default_rng(0)
    sizes = [drawn(u_shaped(0.4, 1.0), 0.01, 3, generator).noise ** 2 for _ in range(400)]
    assert np.mean(sizes) == pytest.approx(0.01**2, rel=0.1)  # seed effects of 0.1 are taken out
    curve = drawn(u_shaped(0.4, 1.0), 0.01, 3, generator)
    assert curve.freedom == 10


def test_intervals_of_the_optimum_hold_it_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(1)
    inside = 0
    for i in range(60):
        result = fit(drawn(u_shaped(0.45, 0.2), 0.01, 3, generator), seed=i, draws=300)
        inside += result.best_quadratic.low <= 0.45 <= result.best_quadratic.high
    # 95 % of 60 is 57; fewer than 51 or an interval that always holds it would each be a mistake.
    assert inside >= 51


@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.parametrize(
    "truth",
    [u_shaped(0.45, 0.5), np.array([3.0, 3.0, 3.0, 3.0, 3.0, 3.3]), np.array([3.02, 3.0, 3.0, 3.0, 3.01, 3.3])],
    ids=["parabola", "plateau", "hinge"],
)
def test_intervals_of_the_gains_hold_the_gain_of_the_rho_that_was_least(truth: np.ndarray, seeds: int) -> None:
    generator = np.random.default_rng(2)
    inside = 0
    for _ in range(400):
        curve = drawn(truth, 0.01, seeds, generator)
        best = 1 + int(curve.means[1:-1].argmin())
        gain = difference(curve, 0)
        inside += gain.low <= truth[0] - truth[best] <= gain.high
    assert inside / 400 > 0.93


def test_a_parabola_that_does_not_fit_is_told() -> None:
    generator = np.random.default_rng(6)
    hinge = np.array([3.02, 3.0, 3.0, 3.0, 3.01, 3.3])
    told = [[lack_of_fit(drawn(t, 0.01, 3, generator)) < 0.05 for _ in range(200)] for t in (hinge, u_shaped(0.4, 0.3))]
    assert np.mean(told[0]) > 0.95
    assert np.mean(told[1]) < 0.1


def share_of_verdicts(truth: np.ndarray, noise: float, seeds: int, wanted: str, repeats: int = 300) -> float:
    generator = np.random.default_rng(3)
    return float(np.mean([verdict(drawn(truth, noise, seeds, generator))[0] == wanted for _ in range(repeats)]))


def test_a_clear_u_is_called_u_shaped() -> None:
    assert share_of_verdicts(u_shaped(0.4, 0.5), 0.005, 3, "U-shaped") > 0.95


def test_a_clear_slope_is_called_monotone() -> None:
    for truth in (3 - 0.3 * RHO, 3 + 0.3 * RHO):
        assert share_of_verdicts(truth, 0.005, 3, "monotone") > 0.95
        assert share_of_verdicts(truth, 0.005, 3, "U-shaped") < 0.01


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_flat_noise_is_hardly_ever_called_a_shape(seeds: int) -> None:
    assert share_of_verdicts(np.full(len(RHO), 3.0), 0.01, seeds, "not resolved") > 0.93


def test_a_slope_that_flattens_is_not_called_u_shaped() -> None:
    truth = np.array([3.0, 3.0, 3.01, 3.05, 3.1, 3.3])
    assert share_of_verdicts(truth, 0.005, 2, "U-shaped") < 0.05


def test_a_zigzag_is_not_called_monotone() -> None:
    for truth in (np.array([3.0, 3.1, 3.02, 3.1, 3.2, 3.3]), np.array([3.3, 3.2, 3.1, 3.02, 3.1, 3.0])):
        assert share_of_verdicts(truth, 0.01, 3, "monotone") < 0.05


def test_what_lies_above_is_called_above_with_the_interval_of_how_far() -> None:
    assert below(Interval(0.12, -0.01, 0.25), 2) == ("0.12 below", "-0.01 to 0.25")
    assert below(Interval(-0.166, -0.499, 0.166), 3) == ("0.166 above", "-0.166 to 0.499")
    assert below(Interval(-0.5, np.nan, np.nan), 1) == ("0.5 above", "unknown: one seed")


def test_one_seed_resolves_nothing() -> None:
    curve = Curve(RHO, u_shaped(0.4, 1.0)[:, None])
    said, reason = verdict(curve)
    assert said == "not resolved"
    assert "two seeds" in reason
    result = fit(curve)
    assert result.best_smooth.value == pytest.approx(0.4, abs=0.05)
    for interval in (result.best_smooth, result.best_quadratic, result.gain_over_highest, result.gain_over_lowest):
        assert np.isnan([interval.low, interval.high]).all()


def test_the_rule_is_the_t_test_it_says() -> None:
    """A difference just above and just below the threshold, computed here from scipy's t."""
    generator = np.random.default_rng(4)
    base = generator.normal(0, 0.01, (3, 3))
    rest = base - base.mean(1, keepdims=True) - base.mean(0, keepdims=True) + base.mean()
    noise = np.sqrt((rest**2).sum() / 4)
    threshold = stats.t.ppf(0.95, 4) * noise * np.sqrt(2 / 3)
    for factor, expected in ((1.02, "U-shaped"), (0.98, "not resolved")):
        means = np.array([factor * threshold, 0.0, 5.0])
        curve = Curve(np.array([0.0, 0.5, 1.0]), means[:, None] + rest)
        assert verdict(curve)[0] == expected


def test_seeds_that_miss_a_rho_are_left_out() -> None:
    points = [(0.0, 0, 1.0), (0.5, 0, 2.0), (1.0, 0, 3.0), (0.0, 1, 9.0), (1.0, 1, 9.0)]
    assert Curve.from_points(points).losses.tolist() == [[1.0], [2.0], [3.0]]
    with pytest.raises(ValueError, match="no seed"):
        Curve.from_points([(0.0, 0, 1.0), (1.0, 1, 1.0)])


def test_two_rhos_are_too_few() -> None:
    with pytest.raises(ValueError, match="3 values of rho"):
        fit(Curve(np.array([0.0, 1.0]), np.ones((2, 2))))


def test_many_draws_give_what_each_gives_alone() -> None:
    generator = np.random.default_rng(5)
    means = u_shaped(0.4, 0.3) + generator.normal(0, 0.01, (7, len(RHO)))
    curves = Smoother(RHO, np.linspace(0, 1, 11), 0.01, 0.1)
    np.testing.assert_allclose(curves(means), [curves(row) for row in means])
    at = np.linspace(0, 1, 11)
    np.testing.assert_allclose(quadratic(RHO, means.T, at).T, [quadratic(RHO, row, at) for row in means])
