"""The finished points of a sweep as plain rows: one for each validation of each point, written to and read from CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from engram.sweep.fit import Curve, Fit, fit
from engram.sweep.launch import is_finished, read_result, require_corpus
from engram.sweep.plan import MAIN_VARIANT, SweepPlan
from engram.training.atomic import atomic_file

_EMPTY = float("nan")
_PROBE, _BITS = "probe_", "bits_per_byte_"
_PAIRS = ("new", "repeated")  # what else a history has losses of, beside domains
# What a curve is drawn of, and how a report calls it. Whether a run has learnt to copy from its context yet decides its
# loss on repeated pairs, and comes by chance: the other tokens show what the split does to knowledge.
MEASURES = {"nats": "all tokens", "nats_new": "tokens whose pair is new in its window"}


@dataclass(frozen=True)
class Row:
    """One validation of one point. `rho` is what was asked, `rho_actual` what the whole experts allow; losses are nats
    a token and bits a byte on held-out text, in total, and for pairs of tokens that are new to their document's part of
    the window or repeated in it. `domains` holds those of each domain of the text, by the names of the run's history:
    `nats_DOMAIN` and `bits_per_byte_DOMAIN`. So `probes` holds what a run on a mixture scored: `probe_TASK`, the share
    of right answers, and `probe_nats_TASK`, nats an answer."""

    variant: str
    rho: float
    rho_actual: float
    seed: int
    tokens: int
    final: bool
    nats: float
    bits_per_byte: float
    nats_new: float
    nats_repeated: float
    experts: int
    rows_per_head: int
    shared_width: int
    total: int
    active: int
    flops_per_token: int
    tokens_per_s: float
    corpus_hash: str
    device: str
    torch: str
    point: str
    threads: int = 0  # 0: not recorded
    domains: dict[str, float] = field(default_factory=dict)
    probes: dict[str, float] = field(default_factory=dict)

    def value(self, metric: str) -> float:
        """A loss or a probe by its name; not a number if this validation has none."""
        if metric in _COLUMNS:
            return float(getattr(self, metric))
        return (self.probes if metric.startswith(_PROBE) else self.domains).get(metric, _EMPTY)


_COLUMNS = tuple(f.name for f in fields(Row) if f.name not in ("domains", "probes"))


def _is_of_domain(name: str) -> bool:
    kind = name.removeprefix(_BITS).removeprefix("nats_")
    return kind not in (name, *_PAIRS)


def collect(plan: SweepPlan) -> list[Row]:
    """Rows of all finished points of a plan. Raises `ConfigError` if they were trained on more than one corpus."""
    points = [point for point in plan.points() if is_finished(point)]
    rows = [row for p in points for row in _rows_of(p.variant, p.rho, p.seed, p.name, read_result(p))]
    if rows:
        require_corpus(points, rows[0].corpus_hash)
    return rows


def _rows_of(variant: str, rho: float, seed: int, name: str, result: dict[str, Any]) -> list[Row]:
    experts, memory, budget = result["model"]["experts"], result["model"]["memory"], result["budget"]
    measured = ["nats", "bits_per_byte", *(f"nats_{kind}" for kind in _PAIRS)]
    return [
        Row(
            variant=variant,
            rho=rho,
            rho_actual=budget["rho"],
            seed=seed,
            tokens=entry["tokens"],
            final=entry["tokens"] == result["tokens"],
            **{key: entry.get(key, _EMPTY) for key in measured},
            experts=experts["n_experts"],
            rows_per_head=memory["rows"][0],
            shared_width=experts["shared_width"],
            total=budget["total"],
            active=budget["active"],
            flops_per_token=budget["flops_per_token"],
            tokens_per_s=result["tokens_per_s"],
            corpus_hash=result["data"]["corpus_hash"],
            device=result["device"],
            torch=result["versions"]["torch"],
            point=name,
            threads=result.get("threads", 0),
            domains={key: entry[key] for key in sorted(entry) if _is_of_domain(key)},
            probes={key: entry[key] for key in sorted(entry) if key.startswith(_PROBE)},
        )
        for entry in result["history"]
    ]


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write rows, atomically; each domain's loss and each probe has a column."""
    domains = sorted({name for row in rows for name in row.domains})
    probes = sorted({name for row in rows for name in row.probes})
    with atomic_file(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*_COLUMNS, *domains, *probes])
        writer.writeheader()
        for row in rows:
            writer.writerow({name: getattr(row, name) for name in _COLUMNS} | row.domains | row.probes)


def read_csv(path: Path) -> list[Row]:
    """The rows that `write_csv` wrote, or an earlier one that knew fewer columns."""
    parse: dict[Any, Any] = {"str": str, "int": int, "float": float, "bool": lambda text: text == "True"}
    types = {f.name: f.type for f in fields(Row)}
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(
                **{name: parse[types[name]](text) for name, text in line.items() if name in _COLUMNS},
                domains={name: float(text) for name, text in line.items() if _is_of_domain(name) and text},
                probes={name: float(text) for name, text in line.items() if name.startswith(_PROBE) and text},
            )
            for line in csv.DictReader(file)
        ]


def probe_tasks(rows: Iterable[Row]) -> list[str]:
    """Names of the tasks that every last validation of the main curve was probed on."""
    names = [set(row.probes) for row in rows if row.final and row.variant == MAIN_VARIANT]
    shared = set.intersection(*names) if names else set()
    nats = {name.replace(_PROBE, f"{_PROBE}nats_", 1) for name in shared}
    return sorted(name.removeprefix(_PROBE) for name in shared - nats)


def domain_names(rows: Iterable[Row]) -> list[str]:
    """Names of the domains that every last validation of the main curve has a loss of."""
    last = [row for row in rows if row.final and row.variant == MAIN_VARIANT]
    names = {name for row in last for name in row.domains if name.startswith(_BITS)}
    return sorted(n.removeprefix(_BITS) for n in names if not any(math.isnan(row.value(n)) for row in last))


def curve_of(rows: Iterable[Row], tokens: int, metric: str = "nats", variant: str = MAIN_VARIANT) -> Curve:
    """The curve of a variant after a number of tokens. Raises ValueError if no seed is finished at every rho."""
    return Curve.from_points(
        [(r.rho_actual, r.seed, r.value(metric)) for r in rows if r.variant == variant and r.tokens == tokens]
    )


@dataclass(frozen=True)
class Measured:
    """The main curve of a sweep by one of `MEASURES`, after a number of tokens, with what it says."""

    metric: str
    tokens: int
    curve: Curve
    fitted: Fit

    @property
    def name(self) -> str:
        """What was measured, in words."""
        return MEASURES[self.metric]


def measure(rows: Sequence[Row]) -> list[Measured]:
    """Every measure at every number of tokens at which it was taken, fewest tokens first.

    Raises ValueError if no seed is finished at every rho, or there are fewer than three rhos.
    """
    main = [row for row in rows if row.variant == MAIN_VARIANT]
    taken = [(m, t) for m in MEASURES for t in sorted({r.tokens for r in main if not math.isnan(r.value(m))})]
    if not taken:
        raise ValueError("no point of the main curve is finished")
    curves = [(metric, tokens, curve_of(rows, tokens, metric)) for metric, tokens in taken]
    return [Measured(metric, tokens, curve, fit(curve)) for metric, tokens, curve in curves]


def at_the_end(measured: Sequence[Measured]) -> list[Measured]:
    """Each measure after the most tokens."""
    return list({m.metric: m for m in measured}.values())
