"""What a sweep found, for others: points.csv with every number, curve.png, and an HTML page needing no other file."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from engram.config import ConfigError
from engram.pages import in_short, page, picture, saved_picture, table
from engram.sweep.abilities import scores
from engram.sweep.fit import CONFIDENCE, Interval, below
from engram.sweep.plan import MAIN_VARIANT, SweepPlan, plan_table
from engram.sweep.plot import draw, draw_abilities, draw_domains, draw_wall_clock, end_name
from engram.sweep.results import Measured, Row, at_the_end, collect, domain_names, measure, write_csv
from engram.sweep.sections import abilities_section, wall_clock_section
from engram.sweep.wall_clock import timed_measures
from engram.training.atomic import atomic_file
from engram.training.recorder import RESULT

_MEANS = {
    "new pairs": "nats_new",
    "repeated pairs": "nats_repeated",
    "bits a byte": "bits_per_byte",
}


def write_report(plan: SweepPlan) -> list[Path]:
    """Write the report of a plan's finished points to its folder; returns the files.

    Without three values of rho that one seed has all of, it has their losses and no curve. Raises `ConfigError` if no
    point is finished.
    """
    rows = collect(plan)
    if not rows:
        others = sum(1 for _ in plan.folder.glob(f"points/*/{RESULT}"))
        told = f" ({others} finished points there have other settings)" if others else ""
        raise ConfigError(
            f"no point of sweep {plan.name!r} is finished in {str(plan.folder)!r}{told}: run the sweep first"
        )
    said = finished_points(plan, rows)
    title = f"{plan.name}: {in_short(rows[0].total)} parameters, {in_short(rows[-1].tokens)} tokens"
    paths = [plan.folder / "points.csv"]
    write_csv(rows, paths[0])
    measured: list[Measured] = []
    found: list[str] = []
    sections: list[str] = []
    try:
        measured = measure(rows)
    except ValueError as error:
        said.append(f"no verdict: {error}")
    else:
        found, sections, pictures = _findings(plan, rows, measured, title)
        paths += pictures
    paths.append(plan.folder / "report.html")
    with atomic_file(paths[-1]) as draft:
        parts = [
            *(f"<p class=verdict>{html.escape(line)}.</p>" for line in said),
            *found,
            *_losses(rows),
            *sections,
            *_making(plan, rows),
        ]
        draft.write_text(page(title, parts), encoding="utf-8")
    print("\n".join(said))
    for m in at_the_end(measured):
        print(f"verdict on {m.name}: {m.fitted.verdict}: {m.fitted.reason}")
    return paths


def finished_points(plan: SweepPlan, rows: Sequence[Row]) -> list[str]:
    """How many points are finished, and what the main curve leaves out for want of the others, in words."""
    points, done = plan.points(), {row.point for row in rows}
    own = [point for point in points if point.variant == MAIN_VARIANT]
    absent = [point for point in own if point.name not in done]
    lines = [f"{len(done)} of {len(points)} points are finished"]
    unseen = [rho for rho in plan.rho if all(point in absent for point in own if point.rho == rho)]
    lines += [f"rho {rho:g} is left out of the curve: it is finished at no seed" for rho in unseen]
    for seed in plan.seeds:
        if missing := [f"{p.rho:g}" for p in absent if p.seed == seed and p.rho not in unseen]:
            lines.append(f"seed {seed} is left out of the curve: it is not finished at rho {', '.join(missing)}")
    return lines


def _findings(
    plan: SweepPlan, rows: Sequence[Row], measured: Sequence[Measured], title: str
) -> tuple[list[str], list[str], list[Path]]:
    """What the curve says, as HTML before and after the table of losses, and the pictures written of it."""
    paths = [plan.folder / "curve.png"]
    main = saved_picture(draw(rows, measured, title), paths[0], "loss against rho")
    end = at_the_end(measured)
    abilities = clock = ""
    if probed := scores(rows):
        paths.append(plan.folder / "probes.png")
        abilities = saved_picture(draw_abilities(rows, probed, end), paths[-1], "losses and probes against rho")
    timed, reason = timed_measures(rows)
    if timed:
        paths.append(plan.folder / "wall_clock.png")
        about = "loss against seconds, and over rho at equal seconds"
        clock = saved_picture(draw_wall_clock(timed), paths[-1], about)
    differences = [line for m in end for line in _versus(rows, m)]
    head = ["variant", "rho", "on", "seeds", "nats less those of engram", "95 % interval"]
    versus = ["<h2>Rivals and controls against engram at the same rho</h2>", table(head, differences)]
    after = [
        *(versus if differences else []),
        *abilities_section(rows, probed, end, abilities),
        *wall_clock_section(plan, rows, timed, reason, clock),
    ]
    return _curve(rows, measured, main), after, paths


def _curve(rows: Sequence[Row], measured: Sequence[Measured], shown: str) -> list[str]:
    """Verdict, picture, optimum and domains of the main curve, as HTML."""
    end, names = at_the_end(measured), domain_names(rows)
    parts = [
        *(f"<p class=verdict>On {m.name}: <b>{m.fitted.verdict}</b>: {html.escape(m.fitted.reason)}.</p>" for m in end),
        shown,
        "<p>A pair is repeated where the same token was followed by the same one before, in the same document of the "
        "window: there a run that has learnt to copy from its context needs no other knowledge. When a small model "
        "learns that is a matter of chance, so the total loss can be noisier than the loss on new pairs.</p>",
        "<h2>The optimum and what it gains</h2>",
        *(part for m in end for part in _optimum(m)),
        "<p>Noise is the standard deviation of what rho and seed do not explain, taken to be the same at every rho. "
        "Runs of one seed share data order and initial seed, so a seed's effect on all of them is taken out. Intervals "
        "of rho* come from 2000 draws of the means from that noise, its own uncertainty included (a handful of seeds "
        "is too few to resample); the smooth curve is a Gaussian process. Intervals of the least mean against the ends "
        "are those of t, for all rhos between the ends at once.</p>",
        f"<p>Rule of the verdict, each difference tested one-sided at {CONFIDENCE:.0%} by t with the pooled noise: "
        "<i>U-shaped</i> if a rho between the ends lies below both ends (level divided by the number of such rhos); "
        "<i>monotone</i> if one end has the least loss, below the other end and below its own neighbour, and no step "
        "from there goes down; otherwise <i>not resolved</i>.</p>",
        "<h2>How the optimum moves with training</h2>",
        table(
            ["on", "tokens", "rho*, smooth curve", "against the highest rho", "against the lowest rho", "verdict"],
            [_move(m) for m in measured],
        ),
        "<p>Validations before the last are of the same runs on their way, at learning rates not yet decayed to the "
        "end: they show how a run's curve moves, not what a shorter run would have ended at.</p>",
    ]
    if len(names) > 1:
        parts += ["<h2>By domain</h2>", picture(draw_domains(rows, names), "bits per byte by domain")]
    return parts


def _making(plan: SweepPlan, rows: Sequence[Row]) -> list[str]:
    """The budgets, and how the points were made, as HTML."""
    last = [r for r in rows if r.final]
    finished = {r.point for r in last}
    missing = [p.name for p in plan.points() if p.name not in finished]
    return [
        "<h2>Budgets</h2>",
        "<p>P_tot: all parameters but embedding and head. P_act: those a token uses. rho: the share of the others that "
        "experts hold.</p>",
        f"<pre>{html.escape(plan_table(plan))}</pre>",
        "<h2>How it was made</h2>",
        table(
            ["", ""],
            [
                ["points finished", f"{len(last)} of {len(plan.points())}"],
                ["not finished", html.escape(", ".join(missing)) or "none"],
                ["corpus hash", ", ".join(sorted({r.corpus_hash for r in rows}))],
                ["hardware", html.escape(", ".join(sorted({r.device for r in rows})))],
                ["torch", ", ".join(sorted({r.torch for r in rows}))],
                ["tokens/s of one worker, median", f"{sorted(r.tokens_per_s for r in last)[len(last) // 2]:,.0f}"],
            ],
        ),
    ]


def _optimum(measured: Measured) -> list[str]:
    """Where the curve of a measure has its least loss, what that gains, and how noisy it is."""
    f, curve = measured.fitted, measured.curve
    lowest, highest = (end_name(curve.rho[end]) for end in (0, -1))
    misfit = f"; a parabola does not fit (p = {f.lack_of_fit:.2g})" if f.is_no_parabola else ""
    several = "; it has minima at " + " and ".join(f"{rho:.2f}" for rho in f.minima) if len(f.minima) > 1 else ""
    return [
        f"<h3>On {measured.name}</h3>",
        table(
            ["", "estimate", "95 % interval"],
            [
                ["rho*, smooth curve" + several, f"{f.best_smooth.value:.2f}", f.best_smooth.span(2)],
                [
                    "rho*, quadratic" + misfit,
                    f"{f.best_quadratic.value:.2f}",
                    "" if misfit else f.best_quadratic.span(2),
                ],
                [f"least mean between the ends, against {highest}, nats", *below(f.gain_over_highest)],
                [f"least mean between the ends, against {lowest}, nats", *below(f.gain_over_lowest)],
                [f"noise of a run, nats ({curve.losses.shape[1]} seeds)", _number(curve.noise), ""],
            ],
        ),
    ]


def _move(measured: Measured) -> list[str]:
    f = measured.fitted
    gains = ["{} ({})".format(*below(gain)) for gain in (f.gain_over_highest, f.gain_over_lowest)]
    rho = f"{f.best_smooth.value:.2f} ({f.best_smooth.span(2)})"
    return [measured.name, f"{measured.tokens:,}", rho, *gains, f.verdict]


def _versus(rows: Sequence[Row], measured: Measured) -> list[list[str]]:
    """Each variant's loss less the main curve's at the same rho, over the seeds that both have."""
    at_end = [r for r in rows if r.tokens == measured.tokens]
    main = {(r.rho, r.seed): r.value(measured.metric) for r in at_end if r.variant == MAIN_VARIANT}
    lines = []
    for variant, rho in dict.fromkeys((r.variant, r.rho) for r in at_end if r.variant != MAIN_VARIANT):
        own = [r for r in at_end if (r.variant, r.rho) == (variant, rho) and (rho, r.seed) in main]
        if own:
            differences = [r.value(measured.metric) - main[rho, r.seed] for r in own]
            mean = sum(differences) / len(own)
            # The two runs of a seed share its effect, and each has the noise of a run of the main curve.
            half = measured.curve.margin((1 + CONFIDENCE) / 2, len(own))
            interval = Interval(mean, mean - half, mean + half).span(4)
            lines.append([html.escape(variant), f"{rho:.2f}", measured.name, str(len(own)), f"{mean:+.4f}", interval])
    return lines


def _losses(rows: Sequence[Row]) -> list[str]:
    """Losses after the last token, as HTML: those of domains only where there are several."""
    last, names = [r for r in rows if r.final], domain_names(rows)
    keys = _MEANS | ({name: f"bits_per_byte_{name}" for name in names} if len(names) > 1 else {})
    lines = []
    for variant, rho in dict.fromkeys((r.variant, r.rho) for r in last):
        own = [r for r in last if (r.variant, r.rho) == (variant, rho)]
        lines.append(
            [
                html.escape(variant),
                f"{own[0].rho_actual:.3f}",
                str(own[0].experts),
                f"{own[0].rows_per_head:,}",
                str(len(own)),
                f"{statistics.fmean(r.nats for r in own):.4f}",
                f"{statistics.stdev(r.nats for r in own):.4f}" if len(own) > 1 else "",
                *(f"{statistics.fmean(r.value(key) for r in own):.4f}" for key in keys.values()),
            ]
        )
    head = ["variant", "rho", "experts", "rows a head", "seeds", "nats", "s.d.", *map(html.escape, keys)]
    return ["<h2>Losses after the last token</h2>", table(head, lines)]


def _number(value: float) -> str:
    return "unknown: one seed" if math.isnan(value) else f"{value:.4f}"
