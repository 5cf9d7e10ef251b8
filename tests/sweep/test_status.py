"""The status of a point follows from the files in its folder, and the command needs nothing else."""

import json
import os
import time
from pathlib import Path

import pytest
from small_sweep import finished, plan_at

from engram.cli import main
from engram.sweep.plan import Point
from engram.sweep.status import STALE_SECONDS, status_of

SUBMITTED = {"attempt": 2, "job": "12"}
STARTED = {"attempt": 2, "job": "12", "restart": 1, "node": "node1", "ended": None}
PROGRESS = {"step": 4, "steps": 8, "tokens": 512, "loss": 3.25, "tokens_per_s": 2100.0}
NOW = 1_000_000_000.0


def write(point: Point, age: float = 0.0, **files: object) -> None:
    names = {"submitted": "slurm/submitted.json", "task": "slurm/task.json", "run": "run.yaml"}
    for name, content in files.items():
        path = point.folder / names.get(name, f"{name}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        os.utime(path, (NOW - age, NOW - age))


@pytest.mark.parametrize(
    ("files", "age", "state"),
    [
        ({}, 0, "waiting"),
        ({"run": {}}, 0, "running"),
        ({"run": {}, "progress": PROGRESS}, STALE_SECONDS, "running"),
        ({"run": {}, "progress": PROGRESS}, STALE_SECONDS + 1, "stale"),
        ({"run": {}, "progress": PROGRESS, "failure": {"code": 7, "how": "code 7"}}, 0, "failed"),
        ({"run": {}, "progress": PROGRESS, "result": ...}, STALE_SECONDS + 1, "finished"),
        ({"run": {}, "submitted": SUBMITTED}, 0, "waiting"),
        ({"run": {}, "submitted": SUBMITTED, "task": STARTED}, 0, "running"),
        ({"run": {}, "submitted": SUBMITTED, "task": {**STARTED, "attempt": 1}, "progress": PROGRESS}, 0, "waiting"),
        ({"run": {}, "submitted": SUBMITTED, "task": {**STARTED, "ended": "preempted"}}, 0, "waiting"),
        ({"run": {}, "submitted": {**SUBMITTED, "cancelled": True}, "task": STARTED}, 0, "waiting"),
    ],
)
def test_the_state_follows_from_the_files(tmp_path: Path, files: dict[str, object], age: float, state: str) -> None:
    point = plan_at(tmp_path)[0].points()[0]
    write(point, age, **{**files, **({"result": finished(point)} if "result" in files else {})})
    assert status_of(point, NOW).state == state


def test_the_newest_sign_of_life_counts(tmp_path: Path) -> None:
    point = plan_at(tmp_path)[0].points()[0]
    write(point, age=2 * STALE_SECONDS, progress=PROGRESS, submitted=SUBMITTED, run={})
    write(point, age=5, task=STARTED)
    status = status_of(point, NOW)
    assert status.state == "running"
    assert status.seconds_ago == 2 * STALE_SECONDS


def test_the_command_prints_every_point_with_its_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, path = plan_at(tmp_path)
    first, second, *others = plan.points()
    write(first, age=NOW - time.time() + 90, progress=PROGRESS, submitted=SUBMITTED, task=STARTED)
    write(second, result=finished(second))
    assert main(["sweep", "status", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == f"{first.name} running 4/8 3.250 2,100 2 min ago 12 (+1) node1".split()
    assert lines[-1] == f"{len(plan.points())} points: 1 running, 1 finished, {len(others)} waiting"
    assert main(["sweep", "status", str(path), "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [entry["point"] for entry in entries] == [point.name for point in plan.points()]
    shown = {key: entries[0][key] for key in ("step", "loss", "tokens_per_s", "job", "node", "requeues")}
    expected = {"step": 4, "loss": 3.25, "tokens_per_s": 2100.0, "job": "12", "node": "node1", "requeues": 1}
    assert shown == expected
