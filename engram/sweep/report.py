"""What a sweep found, for others: points.csv with every number, curve.png, and an HTML page needing no other file."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from engram.config import ConfigError
from engram.sweep.fit import CONFIDENCE, Interval
from engram.sweep.plan import SweepPlan, plan_table
from engram.sweep.plot import draw, draw_domains, inline_png, save_png
from engram.sweep.results import Measured, Row, collect, measure, write_csv
from engram.training.atomic import atomic_file

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;font-size:13px;margin:1rem 0}th,td{padding:.2rem .6rem;text-align:right;border-bottom:1px
solid #ddd}th:first-child,td:first-child{text-align:left}img{max-width:100%}pre{overflow-x:auto;font-size:12px;
background:#f6f6f6;padding:.8rem}.verdict{font-size:1.15rem;background:#fff4e8;padding:.8rem 1rem}"""

_MEANS = {
    "new pairs": "nats_new",
    "repeated pairs": "nats_repeated",
    "bits a byte": "bits_per_byte",
    "code": "bits_per_byte_code",
    "prose": "bits_per_byte_prose",
}


def write_report(plan: SweepPlan) -> list[Path]:
    """Write the report of a plan's finished points to its folder; returns the files.

    Raises `ConfigError` if too little is finished: three values of rho at one seed are needed.
    """
    rows = collect(plan)
    if not rows:
        raise ConfigError(f"no point of sweep {plan.name!r} is finished in {str(plan.folder)!r}: run the sweep first")
    try:
        measured = measure(rows)
    except ValueError as error:
        raise ConfigError(f"sweep {plan.name!r} cannot be reported yet: {error}") from error
    folder = plan.folder
    paths = [folder / name for name in ("points.csv", "curve.png", "report.html")]
    write_csv(rows, paths[0])
    title = f"{plan.name}: {rows[0].total / 1e6:.2f}M parameters, {rows[-1].tokens / 1e6:.1f}M tokens"
    save_png(draw(rows, measured, title), paths[1])
    with atomic_file(paths[2]) as draft:
        draft.write_text(_page(plan, rows, measured, title), encoding="utf-8")
    for m in _at_the_end(measured):
        print(f"verdict on {m.name}: {m.fitted.verdict}: {m.fitted.reason}")
    return paths


def _at_the_end(measured: Sequence[Measured]) -> list[Measured]:
    """Each measure after the most tokens."""
    return list({m.metric: m for m in measured}.values())


def _page(plan: SweepPlan, rows: Sequence[Row], measured: Sequence[Measured], title: str) -> str:
    last = [r for r in rows if r.final]
    done, wanted = len(last), len(plan.points())
    end = _at_the_end(measured)
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(title)}</h1>",
        *(f"<p class=verdict>On {m.name}: <b>{m.fitted.verdict}</b>: {html.escape(m.fitted.reason)}.</p>" for m in end),
        f"<img alt='loss against rho' src='{inline_png(draw(rows, measured, title))}'>",
        "<p>A pair is repeated where the same token was followed by the same one before, in the same document of the "
        "window: there a run that has learnt to copy from its context needs no other knowledge. When a small model "
        "learns that is a matter of chance, so the total loss can be noisier than the loss on new pairs.</p>",
        "<h2>The optimum and what it gains</h2>",
        *(part for m in end for part in _optimum(m)),
        "<p>Noise is the standard deviation of what rho and seed do not explain. Runs of one seed share data order and "
        "initial seed, so a seed's effect on all of them is taken out. Intervals come from 2000 draws of the means "
        "from that noise, its own uncertainty included (a handful of seeds is too few to resample). A gain is against "
        "the least point of the smooth curve, which is a Gaussian process, so it is biased upwards where all "
        "differences are noise; the verdict does not use it.</p>",
        f"<p>Rule of the verdict, each difference tested one-sided at {CONFIDENCE:.0%} by t with the pooled noise: "
        "<i>U-shaped</i> if a rho between the ends lies below both ends (level divided by the number of such rhos); "
        "<i>monotone</i> if one end has the least loss, below the other end and below its own neighbour; otherwise "
        "<i>not resolved</i>.</p>",
        "<h2>How the optimum moves with training</h2>",
        _table(
            ["on", "tokens", "rho*", "95 % interval", "gain over all experts", "over all memory", "verdict"],
            [_move(m) for m in measured],
        ),
        "<h2>By domain</h2>",
        f"<img alt='bits per byte by domain' src='{inline_png(draw_domains(rows))}'>",
        "<h2>Losses after the last token</h2>",
        _table(
            ["variant", "rho", "experts", "rows a head", "seeds", "nats", "s.d.", *_MEANS],
            _losses(last),
        ),
        "<h2>Budgets</h2>",
        f"<pre>{html.escape(plan_table(plan, max(1, plan.workers)))}</pre>",
        "<h2>How it was made</h2>",
        _table(
            ["", ""],
            [
                ["points finished", f"{done} of {wanted}"],
                ["corpus hash", ", ".join(sorted({r.corpus_hash for r in rows}))],
                ["hardware", html.escape(", ".join(sorted({r.device for r in rows})))],
                ["torch", ", ".join(sorted({r.torch for r in rows}))],
                ["tokens/s of one worker, median", f"{sorted(r.tokens_per_s for r in last)[done // 2]:,.0f}"],
            ],
        ),
        "</html>",
    ]
    return "\n".join(parts)


def _optimum(measured: Measured) -> list[str]:
    """Where the curve of a measure has its least loss, what that gains, and how noisy it is."""
    fitted, curve = measured.fitted, measured.curve
    return [
        f"<h3>On {measured.name}</h3>",
        _table(
            ["", "estimate", "95 % interval"],
            [
                _interval_row("rho*, smooth curve", fitted.best_smooth, 2),
                _interval_row("rho*, quadratic", fitted.best_quadratic, 2),
                _interval_row("gain over all experts, nats", fitted.gain_all_experts, 4),
                _interval_row("gain over all memory, nats", fitted.gain_all_memory, 4),
                [
                    f"noise of a run, nats ({curve.losses.shape[1]} seeds)",
                    f"{curve.noise:.4f}",
                    f"{curve.freedom} d.f.",
                ],
            ],
        ),
    ]


def _move(measured: Measured) -> list[str]:
    f = measured.fitted
    return [
        measured.name,
        f"{measured.tokens:,}",
        f"{f.best_smooth.value:.2f}",
        f"{f.best_smooth.low:.2f} to {f.best_smooth.high:.2f}",
        f"{f.gain_all_experts.value:.4f}",
        f"{f.gain_all_memory.value:.4f}",
        f.verdict,
    ]


def _losses(rows: Sequence[Row]) -> list[list[str]]:
    table = []
    for variant, rho in dict.fromkeys((r.variant, r.rho) for r in rows):
        own = [r for r in rows if (r.variant, r.rho) == (variant, rho)]
        mean = {key: sum(getattr(r, key) for r in own) / len(own) for key in ("nats", *_MEANS.values())}
        spread = (sum((r.nats - mean["nats"]) ** 2 for r in own) / max(1, len(own) - 1)) ** 0.5
        table.append(
            [
                html.escape(variant),
                f"{own[0].rho_actual:.3f}",
                str(own[0].experts),
                f"{own[0].rows_per_head:,}",
                str(len(own)),
                f"{mean['nats']:.4f}",
                f"{spread:.4f}" if len(own) > 1 else "",
                *(f"{mean[key]:.4f}" for key in _MEANS.values()),
            ]
        )
    return table


def _interval_row(name: str, interval: Interval, digits: int) -> list[str]:
    return [name, f"{interval.value:.{digits}f}", f"{interval.low:.{digits}f} to {interval.high:.{digits}f}"]


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = ["<table><tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in body]
    return "\n".join([*lines, "</table>"])
