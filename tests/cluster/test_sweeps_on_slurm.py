"""Sweeps on a real Slurm: two nodes on this machine, jobs that are preempted, killed, cancelled and found again.

`make cluster-test` runs them, in about 4 minutes; skipped where Slurm and munge are not installed (Debian: `apt install
slurm-wlm munge`).
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import SlurmCluster, missing_programs
from small_sweep import plan_at

from engram.cli import main
from engram.sweep.launch import resume_arguments
from engram.sweep.plan import Point, SweepPlan

pytest.importorskip("submitit")
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())}"),
    pytest.mark.timeout(1200),
]
SETTINGS: dict[str, Any] = {"seeds": [0], "variants": {}, "tokens": 65536, "evaluations": 8}
FIRST_CHECKPOINT = 64  # each of 512 / 8 steps


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, SlurmCluster(Path(folder)) as running:
        yield running


class Launcher:
    """`engram sweep run --executor slurm` as a process, and what it printed."""

    def __init__(self, cluster: SlurmCluster, plan: Path, *options: str) -> None:
        self.log = plan.with_suffix(f".{time.monotonic_ns()}.log")
        command = [sys.executable, "-m", "engram.cli", "sweep", "run", str(plan), "--executor", "slurm", *options]
        with self.log.open("wb") as log:
            # The processes of a point meet at its first node, whose name means nothing outside of this cluster.
            environment = {**os.environ, **cluster.environment, "MASTER_ADDR": "127.0.0.1"}
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, cwd=plan.parent, start_new_session=True
            )

    @property
    def printed(self) -> str:
        return self.log.read_text()

    def end(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        return self.process.wait(60)


Launch = Callable[..., Launcher]


@pytest.fixture
def launch(cluster: SlurmCluster) -> Iterator[Launch]:
    """Starts launchers; those that a failed test leaves are killed."""
    started: list[Launcher] = []

    def start(plan: Path, *options: str) -> Launcher:
        started.append(Launcher(cluster, plan, *options))
        return started[-1]

    yield start
    for launcher in started:
        launcher.process.kill()
        launcher.process.wait()


def wait(until: Callable[[], object], launcher: Launcher, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, launcher.printed
        assert launcher.process.poll() is None, launcher.printed
        time.sleep(0.1)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def job_of(point: Point) -> str:
    return read(point.folder / "slurm" / "submitted.json")["job"]


def status(plan_path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    capsys.readouterr()
    assert main(["sweep", "status", str(plan_path), "--json"]) == 0
    return {entry["point"]: entry for entry in json.loads(capsys.readouterr().out)}


def training_process(point: Point) -> int:
    """The process id of a point's training command."""
    found = subprocess.run(["pgrep", "-f", f"engram.training.main .*{point.name}"], capture_output=True, check=True)
    return int(found.stdout.split()[0])


def assert_resumed(point: Point) -> None:
    """Its second and last start went on at a checkpoint."""
    starts = [line for line in (point.folder / "log.txt").read_text().splitlines() if line.startswith("attempt ")]
    assert len(starts) == 2, starts
    assert starts[0].endswith("from the start")
    assert "--ckpt_path" in starts[1]
    assert read(point.folder / "slurm" / "task.json")["ended"] == 0


class Steps:
    """The steps that each start of each point was seen at."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, int, int], set[int]] = {}

    def look(self, plan: SweepPlan) -> None:
        for point in plan.points():
            task, progress = point.folder / "slurm" / "task.json", point.folder / "progress.json"
            run, step = read(task), read(progress).get("step")
            if run.get("ended", "") is None and step and progress.stat().st_mtime > task.stat().st_mtime:
                self.seen.setdefault((point.name, run["attempt"], run["restart"]), set()).add(step)


def histories(plan: SweepPlan) -> list[Any]:
    return [read(point.folder / "result.json")["history"] for point in plan.points()]


def test_points_that_are_requeued_preempted_and_killed_end_as_if_nothing_had_been(
    cluster: SlurmCluster, launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, path = plan_at(tmp_path, **SETTINGS)
    requeued, preempted, killed = plan.points()
    launcher = launch(path)
    wait(lambda: all((p.folder / "slurm" / "task.json").exists() for p in plan.points()), launcher)
    jobs = [job_of(point) for point in plan.points()]

    # A launcher that dies leaves its jobs, and the next one takes them over.
    launcher.end(signal.SIGKILL)
    launcher = launch(path)
    found = [f"{p.name} is running already: Slurm job {j}, " for p, j in zip(plan.points(), jobs, strict=True)]
    wait(lambda: all(line in launcher.printed for line in found), launcher)

    disturbances: dict[Path, Callable[[], object]] = {
        requeued.folder: lambda: cluster.command("scontrol", "requeue", jobs[0]),
        preempted.folder: lambda: cluster.command("scancel", "--signal=USR2", jobs[1]),
        killed.folder: lambda: os.kill(training_process(killed), signal.SIGKILL),
    }
    while disturbances:
        wait(lambda: any(map(resume_arguments, disturbances)), launcher)
        for folder in [folder for folder in disturbances if resume_arguments(folder)]:
            disturbances.pop(folder)()
    steps = Steps()
    while launcher.process.poll() is None:
        steps.look(plan)
        time.sleep(0.1)
    assert launcher.process.returncode == 0, launcher.printed
    print(launcher.printed, steps.seen, *((p.folder / "log.txt").read_text() for p in plan.points()), sep="\n")

    for point in plan.points():
        assert_resumed(point)
    again = [seen for (_, attempt, restart), seen in steps.seen.items() if attempt + restart > 1]
    assert len(again) == len(plan.points())
    assert all(min(seen) > FIRST_CHECKPOINT for seen in again)
    for point, job in ((requeued, jobs[0]), (preempted, jobs[1])):
        assert "Restarts=1" in cluster.command("scontrol", "show", "job", job)
        assert job_of(point) == job
    assert re.search(rf"{killed.name} ended \(Slurm job {jobs[2]}, FAILED, code 137\): started again", launcher.printed)
    assert job_of(killed) != jobs[2]
    assert {entry["state"] for entry in status(path, capsys).values()} == {"finished"}
    assert [entry["requeues"] for entry in status(path, capsys).values()] == [1, 1, 0]

    local, local_path = plan_at(tmp_path, **SETTINGS, output=str(tmp_path / "local"))
    assert main(["sweep", "run", str(local_path)]) == 0
    assert histories(plan) == histories(local)


def test_a_point_on_two_nodes_is_preempted_as_a_whole_and_learns_what_it_learns_on_one(
    cluster: SlurmCluster, launch: Launch, tmp_path: Path
) -> None:
    settings = {**SETTINGS, "rho": [0.5], "tokens": 16384}
    plan, path = plan_at(tmp_path, **settings)
    (point,) = plan.points()
    launcher = launch(path, "--nodes-per-point", "2")
    wait(lambda: resume_arguments(point.folder), launcher)
    job = job_of(point)
    cluster.command("scancel", "--signal=USR2", job)
    assert launcher.process.wait(600) == 0, launcher.printed
    assert_resumed(point)
    told = cluster.command("scontrol", "show", "job", job)
    assert all(text in told for text in ("Restarts=1", "NodeList=node[1-2]", "NumTasks=2"))

    local, local_path = plan_at(tmp_path, **settings, output=str(tmp_path / "local"))
    assert main(["sweep", "run", str(local_path)]) == 0
    for spread, alone in zip(*histories(plan), *histories(local), strict=True):
        assert spread == pytest.approx(alone, rel=0.02)


def test_an_interrupted_launcher_cancels_its_jobs_and_the_next_starts_new_ones(
    cluster: SlurmCluster, launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, path = plan_at(tmp_path, **SETTINGS, rho=[0.5])
    (point,) = plan.points()
    launcher = launch(path)
    wait(lambda: resume_arguments(point.folder), launcher)
    assert status(path, capsys)[point.name]["state"] == "running"
    assert launcher.end(signal.SIGINT) == 130
    cancelled = job_of(point)
    assert status(path, capsys)[point.name]["state"] == "waiting"
    # It starts when the old job is over, without being told when that is.
    launcher = launch(path)
    assert launcher.process.wait(600) == 0, launcher.printed
    assert job_of(point) != cancelled
    assert cluster.command("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={cancelled}") == "CANCELLED"
    assert_resumed(point)


def test_what_slurm_refuses_is_one_line(launch: Launch, tmp_path: Path) -> None:
    _, path = plan_at(tmp_path, **SETTINGS)
    launcher = launch(path, "--slurm-partition", "nosuch")
    assert launcher.process.wait(200) == 2
    assert re.search(r"^error: Slurm refuses the job: .*invalid partition.*$", launcher.printed, re.MULTILINE)
