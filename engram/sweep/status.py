"""How far each point of a sweep is, from the files in its folder alone: on any node, whoever runs the sweep.

They say what was last heard of a run, not whether it lives: one that was silent for `STALE_SECONDS` is called stale.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from engram.config import ConfigError
from engram.sweep.launch import is_finished, read_result
from engram.sweep.plan import Point
from engram.sweep.records import FAILURE, SETTINGS, SUBMITTED, TASK, read_record
from engram.training.recorder import PROGRESS

State = Literal["finished", "damaged", "failed", "waiting", "running", "stale"]
STALE_SECONDS = 600.0  # longer than validations, checkpoints and the first step's compilation take


@dataclass(frozen=True)
class PointStatus:
    """What is known of a point. `step` of `steps`, `loss` (nats a token, of the last logged step) and `tokens_per_s`
    are what its run last said, `seconds_ago` before now. `job`, `node` and `requeues` are those of its last Slurm job;
    `how` says how it failed, or what is wrong with its result."""

    point: str
    state: State
    step: int
    steps: int
    loss: float | None
    tokens_per_s: float | None
    seconds_ago: float | None
    job: str | None
    node: str | None
    requeues: int
    how: str | None


def status_of(point: Point, now: float | None = None) -> PointStatus:
    """The status of a point at a time (seconds since 1970; None: now)."""
    now = time.time() if now is None else now
    folder = point.folder
    progress, failure = read_record(folder / PROGRESS), read_record(folder / FAILURE)
    submitted, task = read_record(folder / SUBMITTED), read_record(folder / TASK)
    if task.get("attempt") != submitted.get("attempt"):
        task = {}  # of an earlier job
    heard = _seconds_ago(folder / PROGRESS, now)
    signs = [
        age
        for age in (heard, _seconds_ago(folder / SETTINGS, now), _seconds_ago(folder / TASK, now))
        if age is not None
    ]
    damage = _damage(point)
    return PointStatus(
        point=point.name,
        state="damaged" if damage else _state(is_finished(point), failure, submitted, task, signs),
        step=progress.get("step", 0),
        steps=point.plan.steps,
        loss=progress.get("loss"),
        tokens_per_s=progress.get("tokens_per_s"),
        seconds_ago=heard,
        job=submitted.get("job") or task.get("job"),
        node=task.get("node"),
        requeues=task.get("restart", 0),
        how=damage or failure.get("how"),
    )


def _damage(point: Point) -> str | None:
    """What is wrong with a finished point's result."""
    try:
        if is_finished(point):
            read_result(point)
    except ConfigError as error:
        return str(error)
    return None


def _state(finished: bool, failure: dict, submitted: dict, task: dict, signs: list[float]) -> State:
    if finished:
        return "finished"
    if failure:
        return "failed"
    in_queue = bool(submitted) and (not task or task["ended"] is not None)
    if not signs or in_queue or submitted.get("cancelled"):
        return "waiting"
    return "running" if min(signs) <= STALE_SECONDS else "stale"


def _seconds_ago(path: Path, now: float) -> float | None:
    try:
        return max(0.0, now - path.stat().st_mtime)  # the file server's clock may be ahead
    except OSError:
        return None


def status_json(statuses: Sequence[PointStatus]) -> str:
    """A JSON list of objects with the fields of `PointStatus`."""
    return json.dumps([asdict(status) for status in statuses], indent=1)


def status_table(statuses: Sequence[PointStatus]) -> str:
    """The statuses as a text table, and below it how many points are in which state."""
    width = max((len(s.point) for s in statuses), default=0)
    lines = [
        f"{'point':<{width}}  {'state':<9}{'step':>15}{'loss':>8}{'tokens/s':>12}{'last heard':>12}  {'job':<10}node"
    ]
    for s in statuses:
        loss = "" if s.loss is None else f"{s.loss:.3f}"
        speed = "" if s.tokens_per_s is None else f"{s.tokens_per_s:,.0f}"
        job = (s.job or "") + (f" (+{s.requeues})" if s.requeues else "")
        lines.append(
            f"{s.point:<{width}}  {s.state:<9}{f'{s.step}/{s.steps}':>15}{loss:>8}{speed:>12}{_age(s.seconds_ago):>12}"
            f"  {job:<10}{s.node or ''}".rstrip()
        )
    counts = {state: sum(s.state == state for s in statuses) for state in dict.fromkeys(s.state for s in statuses)}
    lines += [s.how for s in statuses if s.state == "damaged" and s.how]
    lines.append(f"{len(statuses)} points: " + ", ".join(f"{n} {state}" for state, n in counts.items()))
    return "\n".join(lines)


def _age(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
