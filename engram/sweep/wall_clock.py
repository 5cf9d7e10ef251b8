"""Loss at equal seconds of training, in the place of equal tokens: runs at different rho have different speeds.

A run's seconds are its tokens over its speed, so validation, start and everything around training are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from engram.sweep.fit import Curve, Floats, Interval, level_of
from engram.sweep.plan import MAIN_VARIANT
from engram.sweep.results import MEASURES, Row, curve_of

_MEDIAN_ERROR = float(np.sqrt(np.pi / 2))  # of a normal sample's median over its mean's, at most: with many seeds


@dataclass(frozen=True)
class Speeds:
    """How fast the runs of a curve were: `rho` `[R]` ascending, tokens a second `measured` `[R, S]` by seed."""

    rho: Floats
    measured: Floats

    @property
    def seeds(self) -> int:
        """Runs of each rho."""
        return int(self.measured.shape[1])

    @cached_property
    def logs(self) -> Curve:
        """Logarithms as a curve: log speed(rho, seed) = mean(rho) + effect(seed) + noise, since runs of one seed are
        close in time and share what else the machine does."""
        return Curve(self.rho, np.log(self.measured))

    @cached_property
    def typical(self) -> Floats:
        """Median over seeds of each rho's speed, seed effects taken out, `[R]`: one disturbed run does not move it."""
        logs = self.logs.losses
        effects = np.median(logs - np.median(logs, axis=1, keepdims=True), axis=0)
        return np.exp(np.median(logs - effects, axis=1) + np.median(effects))

    @property
    def error(self) -> float:
        """Standard error of the logarithm of a typical speed; not a number with fewer than two seeds."""
        return self.logs.mean_error * (_MEDIAN_ERROR if self.seeds > 2 else 1.0)

    def ratio(self, i: int, j: int) -> Interval:
        """Typical speed at the i-th rho over that at the j-th, with an interval for all rhos at once."""
        half = self.logs.quantile(level_of(len(self.rho) - 1)) * np.sqrt(2) * self.error
        log = float(np.log(self.typical[i] / self.typical[j]))
        return Interval(*(float(np.exp(log + d)) for d in (0.0, -half, half)))


@dataclass(frozen=True)
class Trajectories:
    """The losses of a curve's runs on their way: `tokens` `[E]` ascending, `losses` `[R, S, E]`."""

    speeds: Speeds
    tokens: Floats
    losses: Floats

    @cached_property
    def seconds(self) -> Floats:
        """When each rho is validated, by its typical speed, `[R, E]`; validations themselves take none of it."""
        return self.tokens / self.speeds.typical[:, None]

    @property
    def common(self) -> float:
        """The seconds at which the fastest rho ends: the longest time that no run's losses must be guessed for."""
        return float(self.seconds[:, -1].min())

    @property
    def at_the_end(self) -> Curve:
        """The losses after equal tokens, when all are done."""
        return Curve(self.speeds.rho, self.losses[:, :, -1])

    def at(self, seconds: float) -> EqualTime:
        """Each run's loss at a time, straight in the logarithm of time between two validations.

        Raises ValueError if some rho has no validation yet by then, or has ended.
        """
        first, last = float(self.seconds[:, 0].max()), self.common
        if not first <= seconds <= last:
            raise ValueError(
                f"the slowest rho is first validated after {first:.4g} s, the fastest ends after {last:.4g} s: no loss "
                f"at {seconds:.4g} s is known of both"
            )
        losses, slopes = np.empty(self.losses.shape[:2]), np.empty(len(self.speeds.rho))
        for i, times in enumerate(np.log(self.seconds)):
            right = int(np.clip(np.searchsorted(times, np.log(seconds)), 1, len(times) - 1))
            slope = (self.losses[i, :, right] - self.losses[i, :, right - 1]) / (times[right] - times[right - 1])
            losses[i] = self.losses[i, :, right] + slope * (np.log(seconds) - times[right])
            slopes[i] = slope.mean()
        done = seconds * self.speeds.typical / self.tokens[-1]
        return EqualTime(seconds, Curve(self.speeds.rho, losses), slopes, np.minimum(done, 1.0), self.speeds.error)


@dataclass(frozen=True)
class EqualTime:
    """A curve of losses after equal `seconds`.

    `slopes` `[R]`: change of the loss with the logarithm of time; `done` `[R]`: share of its tokens that a run has had
    by then; `speed_error`: standard error of the logarithm of a speed.
    """

    seconds: float
    curve: Curve
    slopes: Floats
    done: Floats
    speed_error: float

    def against(self, i: int, j: int) -> Interval:
        """Loss at the i-th rho less that at the j-th, with an interval for all rhos at once.

        It holds the noise of the losses and what errors of both speeds do to them.
        """
        value = float(self.curve.means[i] - self.curve.means[j])
        noise = 2 * self.curve.mean_error**2 + (self.slopes[i] ** 2 + self.slopes[j] ** 2) * self.speed_error**2
        half = self.curve.quantile(level_of(len(self.curve.rho) - 1)) * float(np.sqrt(noise))
        return Interval(value, value - half, value + half)


def levelling_fall(difference: float, speed_ratio: float) -> float:
    """How much the loss must fall with each doubling of tokens, in nats, for the faster of two runs to draw level at
    equal seconds: of their losses' `difference` at equal tokens and their `speed_ratio`, both in the same order.

    Below 0 where the faster one has the lower loss already; infinite where both are equally fast.
    """
    return difference / math.log2(speed_ratio) if speed_ratio != 1 else math.inf


def trajectories(rows: Sequence[Row], metric: str) -> Trajectories:
    """The trajectories of the main curve by a loss, over the seeds that have every rho.

    Raises ValueError with a reason for readers of a report where the runs cannot be compared by the clock.
    """
    main = [row for row in rows if row.variant == MAIN_VARIANT]
    last = [row for row in main if row.final]
    for what, names in (("devices", {r.device for r in last}), ("numbers of threads", {str(r.threads) for r in last})):
        if len(names) > 1:
            raise ValueError(f"the runs were timed on different {what} ({', '.join(sorted(names))})")
    if any(row.tokens_per_s <= 0 for row in last):
        raise ValueError("some runs were too short for their speed to be measured")
    taken = {t: [r.value(metric) for r in main if r.tokens == t] for t in sorted({r.tokens for r in main})}
    tokens = [t for t, losses in taken.items() if len(losses) == len(last) and not np.isnan(losses).any()]
    if len(tokens) < 2 or tokens[-1] != last[0].tokens:
        raise ValueError("a loss at a time between needs two validations of every run, or more")
    speeds = Curve.from_points([(r.rho_actual, r.seed, r.tokens_per_s) for r in last])
    found = Trajectories(
        Speeds(speeds.rho, speeds.losses),
        np.array(tokens, dtype=np.float64),
        np.stack([curve_of(main, t, metric).losses for t in tokens], axis=-1),
    )
    found.at(found.common)  # raises where the slowest rho has no validation by then
    return found


def timed_measures(rows: Sequence[Row]) -> tuple[list[tuple[str, Trajectories]], str]:
    """The trajectories of each of `MEASURES` that has some, by its name, and if none has, the reason why."""
    found, reason = [], ""
    for metric, name in MEASURES.items():
        try:
            found.append((name, trajectories(rows, metric)))
        except ValueError as error:
            reason = reason or str(error)
    return found, reason
