"""Pictures of a sweep: the curve with its fits, how it moves with training, the controls, and the domains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from engram.pages import BLUE, GREEN, GREY, ORANGE
from engram.sweep.plan import MAIN_VARIANT
from engram.sweep.results import Measured, Row, curve_of

_AXIS = "ρ: share of the inactive parameters given to experts"  # noqa: RUF001
_MARKERS = "sD^vPX*"


def draw(rows: Sequence[Row], measured: Sequence[Measured], title: str) -> Any:
    """The figure of a sweep, a row for each measure: curve and fits, how the curve moves with training, controls."""
    variants = sorted({r.variant for r in rows} - {MAIN_VARIANT})
    metrics = list(dict.fromkeys(m.metric for m in measured))
    figure = plt.figure(figsize=(17 if variants else 12, 5 * len(metrics) + 0.5), layout="constrained")
    widths = (1.5, 1, 1) if variants else (1.5, 1)
    axes = figure.subplots(len(metrics), len(widths), width_ratios=widths, squeeze=False)
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
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
    axes.plot(fitted.grid, fitted.smooth, color=ORANGE, lw=2, label=f"smooth fit, ρ* = {best.value:.2f}")  # noqa: RUF001
    axes.plot(
        fitted.grid,
        fitted.quadratic,
        color=GREY,
        lw=1.2,
        ls="--",
        label=f"quadratic fit, ρ* = {fitted.best_quadratic.value:.2f}"  # noqa: RUF001
        + (" (it does not fit)" if fitted.is_no_parabola else ""),
    )
    for losses in curve.losses.T:
        axes.plot(curve.rho, losses, "o", color=BLUE, ms=3.5, alpha=0.45)
    spread = curve.losses.std(1, ddof=1) if curve.losses.shape[1] > 1 else None
    label = f"mean of {curve.losses.shape[1]} seeds" + ("" if spread is None else " ± s.d.")
    axes.errorbar(curve.rho, curve.means, spread, fmt="o", color=BLUE, ms=6, capsize=3, label=label, zorder=3)
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
    gains = (
        f"least mean {gain.value:.4f} below {end_name(curve.rho[end])} ({gain.span(4)})"
        for end, gain in ((-1, fitted.gain_over_highest), (0, fitted.gain_over_lowest))
    )
    axes.set_title(f"{measured.name}: {fitted.verdict}\n" + "\n".join(gains), fontsize=10, loc="left", pad=44)
    axes.grid(alpha=0.25)


def end_name(rho: float) -> str:
    """What the end of a curve is called."""
    return {0.0: "all memory", 1.0: "all experts"}.get(float(rho), f"rho {rho:.2f}")


def _draw_tokens(axes: Any, measured: Sequence[Measured]) -> None:
    """The same runs at each validation, less the loss at the highest rho, so that shapes can be compared."""
    for i, m in enumerate(measured):
        relative = m.curve.means - m.curve.means[-1]
        colour = plt.get_cmap("viridis")(0.9 - 0.8 * i / max(1, len(measured) - 1))
        axes.plot(m.curve.rho, relative, "o-", ms=3, lw=1.2, color=colour, label=f"{m.tokens / 1e6:.2g}M")
        at = int(relative.argmin())
        axes.plot(m.curve.rho[at], relative[at], "o", ms=8, mfc="none", color=colour)
    axes.set_ylabel(f"loss − loss at ρ = {measured[-1].curve.rho[-1]:.2g}", fontsize=9)  # noqa: RUF001
    axes.set_xlabel("ρ, least loss circled, after this many tokens:", fontsize=9)  # noqa: RUF001
    axes.legend(frameon=False, fontsize=8, ncol=2)
    axes.grid(alpha=0.25)


def _draw_variants(axes: Any, rows: Sequence[Row], measured: Measured, variants: Sequence[str]) -> None:
    curve = measured.curve
    axes.plot(curve.rho, curve.means, "o-", ms=3, lw=1.2, color=BLUE, label=MAIN_VARIANT)
    for i, variant in enumerate(variants):
        own = [r for r in rows if r.variant == variant and r.tokens == measured.tokens]
        for rho in sorted({r.rho_actual for r in own}):
            losses = np.array([getattr(r, measured.metric) for r in own if r.rho_actual == rho])
            axes.errorbar(
                rho,
                losses.mean(),
                losses.std(ddof=1) if len(losses) > 1 else None,
                fmt=_MARKERS[i % len(_MARKERS)],
                color=plt.get_cmap("tab10")(i + 1),
                ms=6,
                capsize=2,
                label=variant if rho == min(r.rho_actual for r in own) else None,
            )
    axes.set_ylabel("nats per token", fontsize=9)
    axes.set_xlabel("ρ, rivals and controls", fontsize=9)  # noqa: RUF001
    axes.legend(frameon=False, fontsize=8, ncol=2, loc="lower left", bbox_to_anchor=(0, 1))
    axes.grid(alpha=0.25)


def draw_domains(rows: Sequence[Row]) -> Any:
    """Bits per byte by domain over rho, each less its value at the highest rho."""
    last = max(r.tokens for r in rows if r.final)
    figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    for name, colour in (("code", BLUE), ("prose", GREEN)):
        curve = curve_of(rows, last, f"bits_per_byte_{name}")
        axes.plot(
            curve.rho,
            curve.means - curve.means[-1],
            "o-",
            color=colour,
            label=f"{name} ({curve.means[-1]:.3f} at ρ = {curve.rho[-1]:.2g})",  # noqa: RUF001
        )
    axes.set_xlabel(_AXIS)
    axes.set_ylabel("bits per byte − those at the highest ρ")  # noqa: RUF001
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    return figure
