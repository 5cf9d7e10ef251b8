"""Sections of a sweep's page that ask more of its curve: does lower loss bring abilities, does it hold by the clock?"""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Sequence

from engram.pages import picture, table
from engram.sweep.abilities import Score, least_losses
from engram.sweep.fit import Interval, between
from engram.sweep.plan import SweepPlan
from engram.sweep.plot import draw_speeds, end_name
from engram.sweep.results import Measured, Row
from engram.sweep.wall_clock import Trajectories, levelling_fall
from engram.training.schedule import multiplier

_ENDS = (-1, 0)


def abilities_section(
    rows: Sequence[Row], scores: Sequence[Score], measured: Sequence[Measured], shown: str
) -> list[str]:
    """What the probes scored over rho, as HTML; nothing where nothing was probed. `measured`: after the last token.
    `shown`: the picture of it."""
    if not scores:
        return []
    parts = [
        "<h2>Lower loss, same ability?</h2>",
        shown,
        "<p>A probe asks for answers that its task makes certain. Documents of the task are mixed into the corpus of "
        "all runs: facts are asked in the sentences that told them, all else in texts drawn anew. The share of right "
        "answers counts what a model puts first. Nats an answer say how far it is from the right one, and move before "
        "the share does.</p>",
    ]
    for at, found in least_losses(measured).items():
        rho = found[0].curve.rho
        names = " and on ".join(m.name for m in found)
        head = ["", f"rho {rho[at]:.2f}"]
        for name in (end_name(rho[end]) for end in _ENDS):
            head += [name, f"rho {rho[at]:.2f} less {name} (95 % interval)", "so it is"]
        parts += [
            f"<h3>Rho {rho[at]:.2f}, which has the least mean loss between the ends on {html.escape(names)}</h3>",
            table(head, [_ability(score, at) for score in scores]),
        ]
    return [
        *parts,
        "<p>Differences are of means over seeds; the noise is what rho and seed do not explain, since runs of one "
        "seed share data order and initial seed. Intervals are those of t, for all rhos between the ends at once; "
        "<i>better</i> and <i>worse</i> say that one leaves zero out. <i>Not resolved</i> does not mean equal: the "
        "interval says how large a difference may have stayed unseen. Noise is taken to be the same at every rho, so "
        "where a probe is all right or all wrong at some, look at the points in the picture. All runs are asked the "
        "same questions, and other questions of a task would bring luck of their own. Each row has two intervals of "
        "its own: of many intervals one in twenty, or fewer, miss the truth by chance.</p>",
        "<h3>Share of right answers after the last token, mean ± s.d. over seeds (↑ higher is better)</h3>",
        _all_scores(rows, [s for s in scores if s.task and s.higher_is_better]),
        "<h3>Nats an answer after the last token, mean ± s.d. over seeds (↓ lower is better)</h3>",
        _all_scores(rows, [s for s in scores if s.task and not s.higher_is_better]),
    ]


def _ability(score: Score, at: int) -> list[str]:
    means = score.curve.means
    line = [f"{html.escape(score.name)} {score.arrow}", f"{means[at]:.3f}"]
    for end in _ENDS:
        difference = score.against(at, end)
        line += [f"{means[end]:.3f}", f"{difference.value:+.3f} ({difference.span(3)})", score.said(difference)]
    return line


def _all_scores(rows: Sequence[Row], scores: Sequence[Score]) -> str:
    lines = []
    last = [row for row in rows if row.final]
    for variant, rho in dict.fromkeys((r.variant, r.rho) for r in last):
        own = [r for r in last if (r.variant, r.rho) == (variant, rho)]
        values = [[r.value(score.metric) for r in own] for score in scores]
        cells = [_mean_and_spread(v) for v in values]
        lines.append([html.escape(variant), f"{own[0].rho_actual:.3f}", str(len(own)), *cells])
    return table(["variant", "rho", "seeds", *(html.escape(s.task) for s in scores)], lines)


def _mean_and_spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def wall_clock_section(
    plan: SweepPlan, rows: Sequence[Row], timed: Sequence[tuple[str, Trajectories]], reason: str, shown: str
) -> list[str]:
    """The main curve at equal seconds of training, as HTML, or the `reason` why there is none. `shown`: the picture of
    it."""
    title = "<h2>Loss at equal wall-clock</h2>"
    if not timed:
        return [title, f"<p>No comparison at equal seconds: {html.escape(reason)}.</p>"]
    first = timed[0][1]
    device = html.escape(", ".join(sorted({row.device for row in rows})))
    return [
        title,
        "<p>So far runs were compared after equal tokens, at nearly equal FLOPs, but a token takes longer at some "
        "rhos. Here tokens become seconds of training by the speed of their rho, as measured in these runs, "
        f"validation and start left out, on {device}. {_sharing(plan)} Another machine, or other code, has other "
        "speeds.</p>",
        picture(draw_speeds(first.speeds), "training speed against rho"),
        table(
            [
                "rho",
                "tokens/s, median",
                "least to most of the seeds",
                f"typical, over {end_name(first.speeds.rho[-1])}",
                "95 % interval",
                "seconds for all tokens",
                f"share of them by {first.common:,.0f} s",
                "learning rate there, of its peak",
            ],
            _speeds(plan, first),
        ),
        "<p>The timing of one run is noisy, so a rho's typical speed is the median over its seeds, after what slowed "
        "all runs of a seed is taken out (they train at about the same time).</p>",
        shown,
        f"<p><b>Equal seconds</b> compares the losses at {first.common:,.0f} s, when the fastest rho ends. The others "
        "are on their way then, at learning rates not yet decayed to the end (between two validations, their loss is "
        "taken to be straight in the logarithm of time). As a rule runs planned to end by then would have had lower "
        "losses, so this is <b>unfair to the slower rho</b>. <b>Equal tokens</b> is <b>unfair to the faster rho</b>, "
        "which could have trained on more. What runs planned for equal seconds would give lies between the two. So "
        "<i>ahead</i> or <i>behind</i> needs both intervals on one side of zero, and all else is <i>not settled</i> "
        "by this sweep. <i>Levelled by</i> says how much the loss would have to fall with each doubling of tokens for "
        "the faster rho to draw level at equal seconds, where the difference at equal tokens is told from zero "
        "(<i>nothing</i>: the faster has the lower loss already).</p>",
        *(part for name, runs in timed for part in _compared(name, runs)),
        "<p>Intervals are for all rhos of a column at once. Those at equal seconds hold the noise of the losses and "
        "what errors of the two speeds do to them.</p>",
    ]


def _sharing(plan: SweepPlan) -> str:
    """How many runs the plan lets share a machine, in words."""
    threads = f"{plan.threads} thread{'s' if plan.threads > 1 else ''}"
    if plan.workers == 1:
        return f"The plan trains one run at a time, on {threads}."
    many = f"{plan.workers} runs" if plan.workers else "one run for each GPU, or as many as a machine's cores allow,"
    return (
        f"The plan trains {many} side by side, on {threads} each: runs on one machine slow each other, as they share "
        "memory, caches and perhaps cores."
    )


def _speeds(plan: SweepPlan, runs: Trajectories) -> list[list[str]]:
    speeds, at = runs.speeds, runs.at(runs.common)
    lines = []
    for i, rho in enumerate(speeds.rho):
        own = sorted(speeds.measured[i])
        ratio = speeds.ratio(i, -1)
        is_last = i == len(speeds.rho) - 1
        rate = multiplier(plan.optim.schedule, min(round(at.done[i] * plan.steps), plan.steps - 1), plan.steps)
        lines.append(
            [
                f"{rho:.3f}",
                f"{statistics.median(own):,.0f}",
                f"{own[0]:,.0f} to {own[-1]:,.0f}",
                "" if is_last else f"{ratio.value:.3f}",
                "" if is_last else ratio.span(3),
                f"{runs.seconds[i, -1]:,.0f}",
                f"{at.done[i]:.1%}",
                f"{rate:.1%}",
            ]
        )
    return lines


def _compared(name: str, runs: Trajectories) -> list[str]:
    """Every rho against both ends, at equal tokens and at equal seconds."""
    rho, at_time = runs.speeds.rho, runs.at(runs.common)
    parts = [f"<h3>On {html.escape(name)}</h3>"]
    for end in _ENDS:
        j = end % len(rho)
        lines = []
        for i in (i for i in range(len(rho)) if i != j):
            at_tokens = between(runs.at_the_end, i, j, len(rho) - 1)
            at_seconds = at_time.against(i, j)
            lines.append(
                [
                    f"{rho[i]:.3f}",
                    f"{at_tokens.value:+.4f} ({at_tokens.span(4)})",
                    f"{at_seconds.value:+.4f} ({at_seconds.span(4)})",
                    _settled(at_tokens, at_seconds),
                    _levelled(at_tokens, runs.speeds.ratio(i, j).value),
                ]
            )
        columns = ["equal tokens (95 % interval)", "equal seconds (95 % interval)", "so it is", "levelled by"]
        parts.append(table([f"rho, nats less those of {end_name(rho[j])}", *columns], lines))
    return parts


def _settled(*differences: Interval) -> str:
    if all(d.high < 0 for d in differences):
        return "ahead"
    return "behind" if all(d.low > 0 for d in differences) else "not settled"


def _levelled(at_tokens: Interval, speed_ratio: float) -> str:
    if not (at_tokens.low > 0 or at_tokens.high < 0):
        return ""
    fall = levelling_fall(at_tokens.value, speed_ratio)
    return f"{fall:.3f} nats a doubling" if 0 < fall < math.inf else "nothing"
