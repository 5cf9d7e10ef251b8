"""The finished points of a sweep as plain rows: one for each validation of each point, written to and read from CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from engram.sweep.fit import Curve
from engram.sweep.launch import is_finished, read_result, require_corpus
from engram.sweep.plan import MAIN_VARIANT, SweepPlan
from engram.training.atomic import atomic_file

_EMPTY = float("nan")


@dataclass(frozen=True)
class Row:
    """One validation of one point. `rho` is what was asked, `rho_actual` what the whole experts allow; losses are nats
    a token and bits a byte on held-out text, in total and by domain."""

    variant: str
    rho: float
    rho_actual: float
    seed: int
    tokens: int
    final: bool
    nats: float
    bits_per_byte: float
    nats_code: float
    nats_prose: float
    bits_per_byte_code: float
    bits_per_byte_prose: float
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


def collect(plan: SweepPlan) -> list[Row]:
    """Rows of all finished points of a plan. Raises `ConfigError` if they were trained on more than one corpus."""
    points = [point for point in plan.points() if is_finished(point)]
    rows = [row for p in points for row in _rows_of(p.variant, p.rho, p.seed, p.name, read_result(p))]
    if rows:
        require_corpus(points, rows[0].corpus_hash)
    return rows


def _rows_of(variant: str, rho: float, seed: int, name: str, result: dict[str, Any]) -> list[Row]:
    experts, memory, budget = result["model"]["experts"], result["model"]["memory"], result["budget"]
    measured = ("nats", "bits_per_byte", "nats_code", "nats_prose", "bits_per_byte_code", "bits_per_byte_prose")
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
        )
        for entry in result["history"]
    ]


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """Write rows, atomically."""
    with atomic_file(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_csv(path: Path) -> list[Row]:
    """The rows that `write_csv` wrote."""
    parse: dict[Any, Any] = {"str": str, "int": int, "float": float, "bool": lambda text: text == "True"}
    with path.open(newline="", encoding="utf-8") as file:
        return [Row(**{f.name: parse[f.type](line[f.name]) for f in fields(Row)}) for line in csv.DictReader(file)]


def curve_of(rows: Iterable[Row], tokens: int, metric: str = "nats", variant: str = MAIN_VARIANT) -> Curve:
    """The curve of a variant after a number of tokens. Raises ValueError if no seed is finished at every rho."""
    return Curve.from_points(
        [(r.rho_actual, r.seed, getattr(r, metric)) for r in rows if r.variant == variant and r.tokens == tokens]
    )
