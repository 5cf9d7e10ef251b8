"""Results of runs that were never trained, with losses, probes and speeds as a test wants them."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from engram.sweep.plan import MAIN_VARIANT, Point, SweepPlan
from engram.sweep.results import Row

DOMAINS = ["nats_code", "nats_prose", "bits_per_byte_code", "bits_per_byte_prose"]
LOSSES = ["nats", "bits_per_byte", "nats_new", "nats_repeated", *DOMAINS]


def run_of(rho: float, seed: int, losses: dict[int, float], speed: float, **changes: Any) -> list[Row]:
    """Rows of one run: `losses` by the tokens after which it was validated, which stand for all its losses."""
    about: dict[str, Any] = {
        "variant": MAIN_VARIANT,
        "rho": rho,
        "rho_actual": rho,
        "seed": seed,
        "experts": 8,
        "rows_per_head": 10,
        "shared_width": 8,
        "total": 1000,
        "active": 100,
        "flops_per_token": 100,
        "tokens_per_s": speed,
        "corpus_hash": "corpus",
        "device": "device",
        "torch": "2",
        "point": f"rho{rho}-seed{seed}",
        "threads": 1,
    }
    rows = []
    for tokens, nats in losses.items():
        own = {**dict.fromkeys(set(LOSSES) - set(DOMAINS), nats), "domains": dict.fromkeys(DOMAINS, nats)}
        rows.append(Row(**{**about, **own, "tokens": tokens, "final": tokens == max(losses), **changes}))
    return rows


def result_of(point: Point, values: Callable[[int], dict[str, float]], **changes: Any) -> dict[str, Any]:
    """What the run of a point records, with `values` as its validation after each number of tokens."""
    plan, budget = point.plan, point.budget
    steps = [plan.steps * (i + 1) // plan.evaluations for i in range(plan.evaluations)]
    history = [{"step": s, "tokens": s * plan.tokens_per_step} for s in steps]
    return {
        "history": [entry | values(entry["tokens"]) for entry in history],
        "tokens": history[-1]["tokens"],
        "tokens_per_s": 1000.0,
        "budget": {
            "total": budget.total,
            "active": budget.active,
            "rho": budget.rho,
            "flops_per_token": budget.flops,
        },
        "model": point.config.to_dict(),
        "data": {"corpus_hash": "corpus"},
        "device": "a machine",
        "threads": 1,
        "versions": {"torch": "2"},
        **changes,
    }


def write_results(plan: SweepPlan, values: Callable[[Point, int], dict[str, float]], **changes: Any) -> None:
    """Leave every point of a plan finished, with `values` of it as the history after each number of tokens."""
    for point in plan.points():
        result = result_of(point, partial(values, point), **changes)
        point.folder.mkdir(parents=True, exist_ok=True)
        (point.folder / "result.json").write_text(json.dumps(result))
