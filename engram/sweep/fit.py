"""What the losses of a sweep say: curves through them, where the best split lies, and whether the curve is a U.

Everything rests on one model of a loss: loss(rho, seed) = mean(rho) + effect(seed) + noise, since runs of a seed share
data order and initial seed. The noise is what is left after both; intervals draw means from it (a parametric bootstrap,
as a handful of seeds is too few to resample), with a chi-square draw for not knowing its size exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
Verdict = Literal["U-shaped", "monotone", "not resolved"]

CONFIDENCE = 0.95
_DRAWS = 2000
_GRID = np.linspace(0.0, 1.0, 501)


@dataclass(frozen=True)
class Curve:
    """Losses of a curve: `rho` `[R]` ascending, `losses` `[R, S]` by seed, all there."""

    rho: Floats
    losses: Floats

    @property
    def means(self) -> Floats:
        """Mean over seeds, `[R]`."""
        return self.losses.mean(1)

    @property
    def noise(self) -> float:
        """Standard deviation of what rho and seed do not explain; not a number with fewer than two seeds."""
        rest = self.losses - self.losses.mean(1, keepdims=True) - self.losses.mean(0, keepdims=True)
        rest += self.losses.mean()
        return float(np.sqrt(np.square(rest).sum() / self.freedom)) if self.freedom else float("nan")

    @property
    def freedom(self) -> int:
        """Degrees of freedom of `noise`."""
        R, S = self.losses.shape
        return (R - 1) * (S - 1)

    @property
    def mean_error(self) -> float:
        """Standard error of one rho's mean, seed effects apart: they move all means together."""
        return self.noise / float(np.sqrt(self.losses.shape[1]))

    def margin(self, level: float, seeds: int | None = None) -> float:
        """What noise alone could give the difference of two means over `seeds` seeds (None: this curve's), by t at a
        one-sided confidence of `level`; not a number where the noise is unknown."""
        return self.quantile(level) * self.noise * float(np.sqrt(2 / (seeds or self.losses.shape[1])))

    def quantile(self, level: float) -> float:
        """That of t with the noise's degrees of freedom; not a number where the noise is unknown."""
        return float(stats.t.ppf(level, self.freedom)) if self.freedom else float("nan")

    @classmethod
    def from_points(cls, points: list[tuple[float, int, float]]) -> Curve:
        """From (rho, seed, loss); only seeds that every rho has are used. Raises ValueError if no seed has all."""
        rho = sorted({r for r, _, _ in points})
        table = {(r, s): loss for r, s, loss in points}
        seeds = [s for s in sorted({s for _, s, _ in points}) if all((r, s) in table for r in rho)]
        if not seeds:
            raise ValueError("no seed has a finished run at every rho")
        return cls(np.array(rho), np.array([[table[r, s] for s in seeds] for r in rho]))


def quadratic(rho: Floats, means: Floats, at: Floats) -> Floats:
    """The least-squares parabola through the means, at `at`; columns of means give columns. Needs three rhos."""
    return np.asarray(np.vander(at, 3) @ np.polyfit(rho, means, 2), dtype=np.float64)


class Smoother:
    """A free smooth curve through means: a Gaussian process with a squared-exponential kernel.

    How closely it follows the means is set by their standard `error`, as measured; length scale and height maximise the
    marginal likelihood (Rasmussen and Williams, 2006, section 5.4) over a grid. Unlike a parabola it can be steep at
    one end alone. For given scales it is a linear map of the means, so that many draws cost little more than one.
    """

    def __init__(self, rho: Floats, at: Floats, error: float, spread: float) -> None:
        spread = max(spread, 1e-12)
        noise = max(error, 1e-3 * spread) ** 2 * np.eye(len(rho))
        scales = [(a, b) for a in np.geomspace(0.15, 3.0, 14) for b in spread * np.geomspace(0.5, 8.0, 9)]
        covariances = np.array([_kernel(rho, rho, *scale) + noise for scale in scales])
        self._inverse = np.linalg.inv(covariances)
        self._half_log_det = 0.5 * np.linalg.slogdet(covariances)[1]
        self._weights = np.array([_kernel(at, rho, *scale) for scale in scales]) @ self._inverse

    def __call__(self, means: Floats) -> Floats:
        """Curves `[..., at]` for means `[..., R]`."""
        centre = means.mean(-1, keepdims=True)
        y = means - centre
        likelihood = -0.5 * np.einsum("...r,crs,...s->...c", y, self._inverse, y) - self._half_log_det
        return centre + np.einsum("...gr,...r->...g", self._weights[likelihood.argmax(-1)], y)


def _kernel(a: Floats, b: Floats, length: float, height: float) -> Floats:
    return height**2 * np.exp(-0.5 * np.square((a[:, None] - b[None, :]) / length))


@dataclass(frozen=True)
class Interval:
    """An estimate with a two-sided 95 % interval; the ends are not numbers where the noise is unknown."""

    value: float
    low: float
    high: float

    def span(self, digits: int) -> str:
        """The ends in words."""
        return "unknown: one seed" if np.isnan(self.low) else f"{self.low:.{digits}f} to {self.high:.{digits}f}"


def below(gain: Interval, digits: int = 4) -> tuple[str, str]:
    """How far a loss lies below another, of their difference, and the interval of that: "0.1200 below", "0.10 to 0.14".

    Of a difference under 0 it is how far the loss lies above, and so is the interval, whose ends turn their signs.
    """
    if gain.value >= 0:
        return f"{gain.value:.{digits}f} below", gain.span(digits)
    turned = Interval(-gain.value, -gain.high, -gain.low)
    return f"{turned.value:.{digits}f} above", turned.span(digits)


@dataclass(frozen=True)
class Fit:
    """What a curve of losses says.

    `best_quadratic`, `best_smooth`: rho with the least fitted loss, within the rhos that were run. `lack_of_fit`: how
    likely means as far from a parabola would be if the truth were one (an F test). `gain_over_highest`,
    `gain_over_lowest`: mean loss at the highest and the lowest rho less the least mean between them, with an interval
    that holds for every choice of a rho between them at once (Bonferroni).
    """

    grid: Floats
    quadratic: Floats
    smooth: Floats
    best_quadratic: Interval
    best_smooth: Interval
    lack_of_fit: float
    gain_over_highest: Interval
    gain_over_lowest: Interval
    verdict: Verdict
    reason: str

    @property
    def minima(self) -> list[float]:
        """Every rho at which the smooth curve is lower than beside it: of several, as where it swings between points
        that one steep end holds, none is told to be the best."""
        walled = np.concatenate([[np.inf], self.smooth, [np.inf]])
        return self.grid[(walled[1:-1] < walled[:-2]) & (walled[1:-1] <= walled[2:])].tolist()

    @property
    def is_no_parabola(self) -> bool:
        """Whether the means lie too far from any parabola for one to be the truth."""
        return self.lack_of_fit < 1 - CONFIDENCE


def fit(curve: Curve, seed: int = 0, draws: int = _DRAWS) -> Fit:
    """Fit both curves and bootstrap their minima. Needs three values of rho; intervals need two seeds."""
    if len(curve.rho) < 3:
        raise ValueError(f"a curve needs 3 values of rho or more, got {len(curve.rho)}")
    grid = _GRID[(curve.rho[0] <= _GRID) & (curve.rho[-1] >= _GRID)]
    error = 0.0 if np.isnan(curve.noise) else curve.mean_error
    smooth = Smoother(curve.rho, grid, error, float(np.ptp(curve.means)))

    def best(means: Floats) -> Floats:
        """rho of the least loss by the parabola and by the smooth curve, `[..., 2]`, for means `[..., R]`."""
        by_quadratic = quadratic(curve.rho, means.T, grid).T
        return np.stack([grid[by_quadratic.argmin(-1)], grid[smooth(means).argmin(-1)]], axis=-1)

    low = high = np.full(2, np.nan)
    if not np.isnan(curve.noise):
        drawn = best(_drawn_means(curve, seed, draws))
        low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    best_quadratic, best_smooth = (
        Interval(float(v), float(a), float(b)) for v, a, b in zip(best(curve.means), low, high, strict=True)
    )
    said, reason = verdict(curve)
    return Fit(
        grid,
        quadratic(curve.rho, curve.means, grid),
        smooth(curve.means),
        best_quadratic,
        best_smooth,
        lack_of_fit(curve),
        difference(curve, -1),
        difference(curve, 0),
        said,
        reason,
    )


def lack_of_fit(curve: Curve) -> float:
    """The p value of the F test that a parabola goes through the true means; not a number if it cannot be told."""
    R, S = curve.losses.shape
    if R < 4 or not curve.freedom:
        return float("nan")
    rest = S * np.square(curve.means - quadratic(curve.rho, curve.means, curve.rho)).sum() / (R - 3)
    return float(stats.f.sf(rest / curve.noise**2, R - 3, curve.freedom))


def difference(curve: Curve, end: int) -> Interval:
    """The mean at an end (0 or -1) less the least mean between the ends."""
    return between(curve, end, 1 + int(curve.means[1:-1].argmin()), comparisons=len(curve.rho) - 2)


def level_of(comparisons: int) -> float:
    """The one-sided level at which intervals to both sides hold for so many comparisons at once (Bonferroni)."""
    return 1 - (1 - CONFIDENCE) / 2 / comparisons


def between(curve: Curve, i: int, j: int, comparisons: int = 1) -> Interval:
    """The mean at the i-th rho less that at the j-th, with an interval that holds for so many `comparisons` at once
    (Bonferroni)."""
    value = float(curve.means[i] - curve.means[j])
    half = curve.margin(level_of(comparisons))
    return Interval(value, value - half, value + half)


def _drawn_means(curve: Curve, seed: int, draws: int) -> Floats:
    """Means as other seeds might have given them, `[draws, R]`."""
    generator = np.random.default_rng(seed)
    scale = curve.mean_error * np.sqrt(curve.freedom / generator.chisquare(curve.freedom, size=(draws, 1)))
    return curve.means + scale * generator.standard_normal((draws, len(curve.rho)))


def verdict(curve: Curve) -> tuple[Verdict, str]:
    """The shape of a curve, by this rule, with the reason in words.

    Differences of two means are tested one-sided at 95 % by t with the pooled noise.
    U-shaped: some rho between the ends has a loss below both ends, at a level divided by the number of such rhos, since
    the best of several is chosen. Monotone: one end has the least mean, is below the other end and below its nearest
    neighbour, and from there on no step to the next rho goes down. Otherwise not resolved, as with one seed, whose
    noise is unknown.
    """
    means, rho = curve.means, curve.rho
    last = len(means) - 1
    if np.isnan(curve.noise) or last < 2:
        return "not resolved", "the noise between seeds is unknown: two seeds or more and three rhos or more are needed"

    inner = range(1, last)
    strict, plain = curve.margin(1 - (1 - CONFIDENCE) / len(inner)), curve.margin(CONFIDENCE)
    at = min(inner, key=lambda i: means[i])
    (lower, _), (upper, _) = (below(difference(curve, end)) for end in (0, -1))
    told = f"the loss at rho {rho[at]:.2f} is {lower} that at rho {rho[0]:.2f} and {upper} that at rho {rho[-1]:.2f}"
    if min(means[0], means[-1]) - means[at] > strict:
        return "U-shaped", f"{told}, each more than the {strict:.4f} that noise could give"
    best = int(means.argmin())
    if best in (0, last):
        away = means if best == 0 else means[::-1]  # from the least loss to the other end
        steps = np.diff(away)
        if away[-1] - away[0] > plain and steps[0] > plain and steps.min() > -plain:
            return "monotone", (
                f"the loss is least at rho {rho[best]:.2f}, {away[-1] - away[0]:.4f} below the other end and "
                f"{steps[0]:.4f} below its neighbour, each more than the {plain:.4f} that noise could give"
            )
    return "not resolved", f"{told}; a U needs more than {strict:.4f} on both sides"
