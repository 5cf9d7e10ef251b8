"""Pictures of a sweep: the curve and its fits, how it moves with training and the clock, controls, domains, probes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import ScalarFormatter

from engram.pages import BLUE, GREEN, GREY, ORANGE, as_typed, in_short
from engram.sweep.abilities import Score, least_losses
from engram.sweep.fit import Curve, Interval, below, between
from engram.sweep.plan import MAIN_VARIANT
from engram.sweep.results import Measured, Row, curve_of
from engram.sweep.wall_clock import Speeds, Trajectories

_AXIS = "ρ: share of the inactive parameters given to experts"  # noqa: RUF001
_MARKERS = "sD^vPX*"


def draw(rows: Sequence[Row], measured: Sequence[Measured], title: str) -> Any:
    """The figure of a sweep, a row for each measure: curve and fits, how the curve moves with training, controls."""
    variants = sorted({r.variant for r in rows} - {MAIN_VARIANT})
    metrics = list(dict.fromkeys(m.metric for m in measured))
    figure = plt.figure(figsize=(17 if variants else 12, 5 * len(metrics) + 0.5), layout="constrained")
    widths = (1.5, 1, 1) if variants else (1.5, 1)
    axes = figure.subplots(len(metrics), len(widths), width_ratios=widths, squeeze=False)
    figure.suptitle(as_typed(title), fontsize=12, x=0.01, ha="left")
    for (left, middle, *right), metric in zip(axes, metrics, strict=True):
        own = [m for m in measured if m.metric == metric]
        _draw_curve(left, own[-1])
        _draw_tokens(middle, own)
        if variants:
            _draw_variants(right[0], rows, own[-1], variants)
    return figure


def _draw_curve(axes: Any, measured: Measured) -> None:
    curve, fitted = measured.curve, measured.fitted
    best = fitted.best_smooth
    if not math.isnan(best.low):
        axes.axvspan(best.low, best.high, color=ORANGE, alpha=0.12, lw=0, label="95 % interval of ρ*")  # noqa: RUF001
    axes.axvline(best.value, color=ORANGE, lw=1, ls=":")
    several = f" (one of {len(fitted.minima)} minima)" if len(fitted.minima) > 1 else ""
    label = f"smooth fit, ρ* = {best.value:.2f}{several}"  # noqa: RUF001
    axes.plot(fitted.grid, fitted.smooth, color=ORANGE, lw=2, label=label)
    axes.plot(
        fitted.grid,
        fitted.quadratic,
        color=GREY,
        lw=1.2,
        ls="--",
        label=f"quadratic fit, ρ* = {fitted.best_quadratic.value:.2f}"  # noqa: RUF001
        + (" (it does not fit)" if fitted.is_no_parabola else ""),
    )
    _draw_runs(axes, curve)
    axes.set_xlabel(_AXIS)
    axes.set_ylabel("validation loss, nats per token")
    for end, side in ((0, "left"), (-1, "right")):
        axes.annotate(
            end_name(curve.rho[end]),
            (curve.rho[end], 0),
            xycoords=("data", "axes fraction"),
            xytext=(2 if side == "left" else -2, 4),
            textcoords="offset points",
            ha=side,
            color=GREY,
            fontsize=9,
        )
    # Above the axes, as a U leaves no corner free.
    axes.legend(frameon=False, fontsize=9, ncol=2, loc="lower left", bbox_to_anchor=(0, 1))
    gains = []
    for end, gain in ((-1, fitted.gain_over_highest), (0, fitted.gain_over_lowest)):
        place, span = below(gain)
        gains.append(f"least mean between the ends {place} {end_name(curve.rho[end])} ({span})")
    axes.set_title(f"{measured.name}: {fitted.verdict}\n" + "\n".join(gains), fontsize=10, loc="left", pad=44)
    axes.grid(alpha=0.25)


def _draw_runs(axes: Any, curve: Curve, line: str = "") -> None:
    """Each run as a point, and the mean of a rho's runs with their standard deviation."""
    for losses in curve.losses.T:
        axes.plot(curve.rho, losses, "o", color=BLUE, ms=3.5, alpha=0.45)
    spread = curve.losses.std(1, ddof=1) if curve.losses.shape[1] > 1 else None
    label = "one seed" if spread is None else f"mean of {curve.losses.shape[1]} seeds ± s.d."
    axes.errorbar(curve.rho, curve.means, spread, fmt=f"o{line}", color=BLUE, ms=6, capsize=3, label=label, zorder=3)


def end_name(rho: float) -> str:
    """What the end of a curve is called."""
    return {0.0: "all memory", 1.0: "all experts"}.get(float(rho), f"rho {rho:.2f}")


def _draw_tokens(axes: Any, measured: Sequence[Measured]) -> None:
    """The same runs at each validation, less the loss at the highest rho, so that shapes can be compared."""
    for i, m in enumerate(measured):
        relative = m.curve.means - m.curve.means[-1]
        colour = plt.get_cmap("viridis")(0.9 - 0.8 * i / max(1, len(measured) - 1))
        axes.plot(m.curve.rho, relative, "o-", ms=3, lw=1.2, color=colour, label=in_short(m.tokens))
        at = int(relative.argmin())
        axes.plot(m.curve.rho[at], relative[at], "o", ms=8, mfc="none", color=colour)
    axes.set_ylabel(f"loss − loss at ρ = {measured[-1].curve.rho[-1]:.2g}", fontsize=9)  # noqa: RUF001
    axes.set_xlabel("ρ, least loss circled, after this many tokens:", fontsize=9)  # noqa: RUF001
    axes.legend(frameon=False, fontsize=8, ncol=2)
    axes.grid(alpha=0.25)


def _draw_variants(axes: Any, rows: Sequence[Row], measured: Measured, variants: Sequence[str]) -> None:
    curve = measured.curve
    axes.plot(curve.rho, curve.means, "o-", ms=3, lw=1.2, color=BLUE, label=MAIN_VARIANT)
    _draw_rivals(axes, [r for r in rows if r.tokens == measured.tokens], measured.metric, variants)
    axes.set_ylabel("nats per token", fontsize=9)
    axes.set_xlabel("ρ", fontsize=9)  # noqa: RUF001
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "alignment": "left"}
    axes.legend(frameon=False, fontsize=8, ncol=2, title="rivals and controls", title_fontsize=10, **place)
    axes.grid(alpha=0.25)


def _draw_rivals(axes: Any, rows: Sequence[Row], metric: str, variants: Sequence[str], apart: float = 0.0) -> None:
    """The mean of each variant at each of its rhos, with the standard deviation of its runs; `apart` by so much rho."""
    for i, variant in enumerate(variants):
        own = [r for r in rows if r.variant == variant]
        for rho in sorted({r.rho_actual for r in own}):
            losses = np.array([r.value(metric) for r in own if r.rho_actual == rho])
            axes.errorbar(
                rho + apart * (i + 1),
                losses.mean(),
                losses.std(ddof=1) if len(losses) > 1 else None,
                fmt=_MARKERS[i % len(_MARKERS)],
                color=plt.get_cmap("tab10")(i + 1),
                ms=6,
                capsize=2,
                label=as_typed(variant) if rho == min(r.rho_actual for r in own) else None,
            )


def draw_domains(rows: Sequence[Row], names: Sequence[str]) -> Any:
    """Bits per byte of each named domain over rho, each less its value at the highest rho."""
    last = max(r.tokens for r in rows if r.final)
    figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    for i, name in enumerate(names):
        curve = curve_of(rows, last, f"bits_per_byte_{name}")
        axes.plot(
            curve.rho,
            curve.means - curve.means[-1],
            "o-",
            color=(BLUE, GREEN)[i] if len(names) == 2 else plt.get_cmap("tab10")(i % 10),
            label=f"{as_typed(name)} ({curve.means[-1]:.3f} at ρ = {curve.rho[-1]:.2g})",  # noqa: RUF001
        )
    axes.set_xlabel(_AXIS)
    axes.set_ylabel("bits per byte − those at the highest ρ")  # noqa: RUF001
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    return figure


def draw_abilities(rows: Sequence[Row], scores: Sequence[Score], measured: Sequence[Measured]) -> Any:
    """A panel for each loss and each probe's share of right answers, over rho; where between the ends each loss has its
    least mean is marked.

    Other variants stand to the right of their rho, so that what is equal there does not cover each other.
    """
    shown = [s for s in scores if s.higher_is_better or not s.task]
    variants = sorted({r.variant for r in rows} - {MAIN_VARIANT})
    last = [r for r in rows if r.final]
    gaps = np.diff(measured[0].curve.rho)
    apart = min(0.018, 0.4 * gaps.min() / max(1, len(variants)))  # nearer to their own rho than to the next
    columns = min(4, len(shown))
    figure = plt.figure(figsize=(3.9 * columns, 3.4 * math.ceil(len(shown) / columns) + 0.4), layout="constrained")
    axes = figure.subplots(math.ceil(len(shown) / columns), columns, squeeze=False).flatten()
    for panel, score in zip(axes, shown, strict=False):
        for at, found in least_losses(measured).items():
            panel.axvline(found[0].curve.rho[at], color=ORANGE, lw=1, ls=":")
        _draw_runs(panel, score.curve, line="-")
        _draw_rivals(panel, last, score.metric, variants, apart)
        better = "higher" if score.higher_is_better else "lower"
        panel.set_title(f"{as_typed(score.name)}\n{score.arrow} {better} is better", fontsize=9, loc="left")
        panel.grid(alpha=0.25)
    for panel in axes[len(shown) :]:
        panel.axis("off")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", frameon=False, fontsize=8, ncol=6)
    beside = "; rivals and controls have the ρ of the mean to their left" if variants else ""  # noqa: RUF001
    figure.supxlabel(_AXIS + "; dotted: least mean loss between the ends" + beside, fontsize=9)
    return figure


def draw_speeds(speeds: Speeds) -> Any:
    """Tokens a second of every run, and what is typical of each rho."""
    figure, axes = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
    for i, measured in enumerate(speeds.measured.T):
        axes.plot(speeds.rho, measured, "o:", ms=4, lw=0.8, color=plt.get_cmap("Blues")(0.45 + 0.5 * i / speeds.seeds))
    axes.plot(speeds.rho, speeds.typical, "s-", color=ORANGE, ms=6, label="typical: median, seeds' effects taken out")
    axes.set_xlabel(_AXIS + "; blue: the runs of a seed")
    axes.set_ylabel("tokens a second, training")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    axes.grid(alpha=0.25)
    return figure


def draw_wall_clock(timed: Sequence[tuple[str, Trajectories]]) -> Any:
    """For each named measure its mean loss against seconds of training, and over rho at equal tokens and seconds."""
    figure = plt.figure(figsize=(12, 4.4 * len(timed)), layout="constrained")
    for (left, right), (name, runs) in zip(figure.subplots(len(timed), 2, squeeze=False), timed, strict=True):
        _draw_trajectories(left, name, runs)
        _draw_equal_time(right, name, runs)
    return figure


def _draw_trajectories(axes: Any, name: str, runs: Trajectories) -> None:
    rho = runs.speeds.rho
    for i, (times, means) in enumerate(zip(runs.seconds, runs.losses.mean(1), strict=True)):
        colour = plt.get_cmap("viridis")(0.9 * i / (len(rho) - 1))
        axes.plot(times, means, "o-", ms=4, lw=1.3, color=colour, label=f"{rho[i]:.2f}")
    axes.axvline(runs.common, color=GREY, lw=1, ls="--", label="the first ends")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(ScalarFormatter())
    axes.tick_params(axis="x", which="both", labelsize=8)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel(f"loss on {name}, nats", fontsize=9)
    axes.legend(frameon=False, fontsize=8, ncol=2, title="ρ", title_fontsize=9)  # noqa: RUF001
    axes.grid(alpha=0.25, which="both")


def _draw_equal_time(axes: Any, name: str, runs: Trajectories) -> None:
    """Both comparisons as differences from the highest rho, with their intervals."""
    rho, at_time, at_tokens = runs.speeds.rho, runs.at(runs.common), runs.at_the_end
    others = range(len(rho) - 1)
    for shift, colour, label, found in (
        (-0.006, BLUE, "equal tokens", [between(at_tokens, i, -1, len(others)) for i in others]),
        (0.006, ORANGE, f"equal seconds ({runs.common:,.0f})", [at_time.against(i, -1) for i in others]),
    ):
        _draw_intervals(axes, rho[:-1] + shift, found, colour, label)
    axes.axhline(0, color=GREY, lw=1)
    axes.plot(rho[-1], 0, "o", color=GREY)
    axes.set_xlabel(_AXIS)
    axes.set_ylabel(f"loss on {name} − that at ρ = {rho[-1]:.2g}", fontsize=9)  # noqa: RUF001
    bars = "" if math.isnan(at_tokens.noise) else "; bars: 95 % for all ρ at once"  # noqa: RUF001
    axes.set_title(f"↓ lower is better{bars}", fontsize=9, loc="left")
    axes.legend(frameon=False, fontsize=9)
    axes.grid(alpha=0.25)


def _draw_intervals(axes: Any, at: Any, found: Sequence[Interval], colour: str, label: str) -> None:
    values = [i.value for i in found]
    errors = None if any(math.isnan(i.low) for i in found) else [[i.value - i.low for i in found]] * 2
    axes.errorbar(at, values, errors, fmt="o-", color=colour, ms=5, capsize=3, lw=1.2, label=label)
