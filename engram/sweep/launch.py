"""Runs the points of a sweep side by side, keeps what is finished, and tries again what died.

A point is finished when its `result.json` is there, which its run writes last and atomically; a point that was stopped
goes on at its last checkpoint. `Executor` is all that a cluster launcher has to offer in the place of local processes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import torch
import yaml
from filelock import FileLock, Timeout

from engram.config import ConfigError, require
from engram.sweep.plan import Point, SweepPlan
from engram.sweep.progress import Display, make_display
from engram.sweep.records import FAILURE, LOG, SETTINGS, check_result
from engram.training.atomic import atomic_file, write_json
from engram.training.checkpoint import resume_path
from engram.training.data import TokenData
from engram.training.environment import training_environment
from engram.training.recorder import EXIT_BAD_SETTING, EXIT_NON_FINITE, PROGRESS, RESULT

_STOP_SECONDS = 10.0


class Job(Protocol):
    """A started run."""

    def poll(self) -> int | None:
        """Exit code, or None while it runs."""

    def describe(self) -> str:
        """What it is and, when it ended, how: for people."""

    def stop(self) -> None:
        """End it; it can be started again later."""


class Executor(Protocol):
    """Where runs are started."""

    workers: int
    poll_seconds: float  # between two looks at all jobs

    def adopt(self, point: Point) -> Job | None:
        """The run of a point that an earlier launcher left running, if there is one."""

    def start(self, point: Point, slot: int) -> Job:
        """Start the run of a point in one of the slots 0 to workers - 1."""


@dataclass
class LocalJob:
    """A run as a process of this machine."""

    process: subprocess.Popen[bytes]
    log: IO[bytes]

    def poll(self) -> int | None:
        code = self.process.poll()
        if code is not None:
            self.log.close()
        return code

    def describe(self) -> str:
        return f"process {self.process.pid}, code {self.process.returncode}"

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log.close()


class LocalExecutor:
    """Processes on this machine: one for each GPU, or as many as its cores allow."""

    poll_seconds = 0.5

    def __init__(self, workers: int, threads: int) -> None:
        require(workers >= 0, "workers", workers, "1 or more (0: what this machine allows)")
        self.threads = threads
        self.gpus = torch.cuda.device_count()
        self.workers = workers or self.gpus or max(1, usable_cores() // threads)

    def adopt(self, point: Point) -> None:
        """None: local runs end with their launcher."""

    def start(self, point: Point, slot: int) -> LocalJob:
        environment = training_environment(self.threads)
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = str(slot % self.gpus)
        log = (point.folder / LOG).open("ab")
        command = [sys.executable, "-m", "engram.training.main", *training_arguments(point, self.threads)]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        return LocalJob(process, log)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def training_arguments(point: Point, threads: int) -> list[str]:
    """Write the point's settings to its folder; returns the training command's arguments, resuming where it can."""
    write_settings(point, threads)
    return ["fit", "--config", str(point.folder / SETTINGS), *resume_arguments(point.folder)]


def write_settings(point: Point, threads: int, devices: int = 1, nodes: int = 1, accelerator: str = "auto") -> None:
    """Write `run.yaml` for a run of a point: `devices` processes of `threads` cores on each of `nodes` machines."""
    settings = dict(point.run_settings)
    settings["trainer"] = {
        **settings["trainer"],
        "default_root_dir": str(point.folder.absolute()),
        "enable_progress_bar": False,
        "accelerator": accelerator,
        "devices": devices,
        "num_nodes": nodes,
    }
    settings |= {
        "threads": threads,
        "checkpoint_every": point.plan.steps // point.plan.evaluations,
        "save_weights": point.plan.save_weights,
    }
    if devices * nodes > 1:
        settings["parallel"] = dataclasses.asdict(point.plan.parallel)
    with atomic_file(point.folder / SETTINGS) as draft:
        draft.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def resume_arguments(folder: Path) -> list[str]:
    """The arguments with which the training command goes on at the last checkpoint in a point's folder, if any."""
    checkpoint = resume_path("auto", folder)
    return [] if checkpoint is None else ["--ckpt_path", checkpoint]


def is_finished(point: Point) -> bool:
    """Whether the point's result is there; the folder's name holds its settings' fingerprint."""
    return (point.folder / RESULT).exists()


def read_result(point: Point) -> dict[str, Any]:
    """What a finished point's run recorded. Raises `ConfigError` naming a file that lacks what a sweep needs."""
    path = point.folder / RESULT
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        check_result(result)
    except ValueError as error:
        raise ConfigError(
            f"result {str(path)!r} cannot be used ({error}): delete it, and `engram sweep run` writes it again from "
            "the last checkpoint; delete its folder, and the point is trained again"
        ) from error
    return result


def require_corpus(points: Sequence[Point], corpus_hash: str) -> None:
    """Raise `ConfigError` for a finished point of another corpus, whose losses cannot be compared."""
    for point in points:
        own = read_result(point)["data"]["corpus_hash"]
        if own != corpus_hash:
            raise ConfigError(
                f"finished point {str(point.folder)!r} was trained on corpus {own[:12]}, the others on "
                f"{corpus_hash[:12]}: give the plan another output, or delete the folders of the points to train again"
            )


@dataclass
class Failure:
    """A point that died more often than the plan retries, or of its settings: how, and the end of what it printed."""

    point: Point
    code: int
    how: str
    tail: str


def run_sweep(plan: SweepPlan, executor: Executor | None = None, display: Display | None = None) -> list[Failure]:
    """Train all points that are not finished; returns those that failed for good.

    An interrupt (Ctrl-C) stops the running points; finished ones stay, and the next call goes on where they were.
    Raises `ConfigError` if a finished result is damaged or of another corpus, or the sweep is being run already.
    """
    points = plan.points()
    plan.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(plan.folder / "running.lock", timeout=0):
            return _run_points(plan, points, executor, display)
    except Timeout as error:
        raise ConfigError(f"sweep {plan.name!r} is being run already in {str(plan.folder)!r}") from error


def _run_points(
    plan: SweepPlan, points: Sequence[Point], executor: Executor | None, display: Display | None
) -> list[Failure]:
    executor = executor or LocalExecutor(plan.workers, plan.threads)
    display = display or make_display()
    waiting = [p for p in points if not is_finished(p)]
    for point in points:
        if point not in waiting:
            read_result(point)
    if waiting:
        data = TokenData(plan.data)
        print(f"data: {data.folder}")  # made once here, so that the points find it in the cache
        require_corpus([p for p in points if is_finished(p)], data.corpus_hash)
    return _Supervisor(executor, display, plan.retries).run(points, waiting)


class _Supervisor:
    """Keeps the slots of an executor busy until nothing waits."""

    def __init__(self, executor: Executor, display: Display, retries: int) -> None:
        self.executor, self.display, self.retries = executor, display, retries
        self.running: dict[int, tuple[Point, Job]] = {}
        self.deaths: dict[str, int] = {}
        self.failures: list[Failure] = []

    def run(self, points: Sequence[Point], waiting: list[Point]) -> list[Failure]:
        with ExitStack() as stack:
            stack.callback(self._stop_all)
            stack.enter_context(self.display)
            self.display.expect(len(points))
            for point in points:
                if point not in waiting:
                    self.display.finished(point.name, skipped=True)
            self._adopt(waiting)
            while waiting or self.running:
                self._start(waiting)
                time.sleep(self.executor.poll_seconds)
                self._collect(waiting)
        return self.failures

    def _adopt(self, waiting: list[Point]) -> None:
        for point in list(waiting):
            if (job := self.executor.adopt(point)) is not None:
                waiting.remove(point)
                self.running[len(self.running)] = (point, job)
                self.display.note(f"{point.name} is running already: {job.describe()}")
                self.display.started(point.name, point.folder / PROGRESS)

    def _start(self, waiting: list[Point]) -> None:
        for slot in range(self.executor.workers):
            if waiting and slot not in self.running:
                point = waiting.pop(0)
                point.folder.mkdir(parents=True, exist_ok=True)
                (point.folder / FAILURE).unlink(missing_ok=True)
                self.running[slot] = (point, self.executor.start(point, slot))
                self.display.started(point.name, point.folder / PROGRESS)

    def _collect(self, waiting: list[Point]) -> None:
        self.display.refresh()
        for slot, (point, job) in list(self.running.items()):
            code = job.poll()
            if code is None:
                continue
            del self.running[slot]
            if is_finished(point):
                self.display.finished(point.name)
                continue
            self.deaths[point.name] = self.deaths.get(point.name, 0) + 1
            hopeless = code in (EXIT_BAD_SETTING, EXIT_NON_FINITE)  # it would end there again
            how = job.describe()
            if self.deaths[point.name] <= self.retries and not hopeless:
                self.display.note(f"{point.name} ended ({how}): started again")
                waiting.insert(0, point)
            else:
                self.failures.append(Failure(point, code, how, tail(point.folder / LOG)))
                write_json(point.folder / FAILURE, {"code": code, "how": how})
                self.display.note(f"{point.name} ended ({how}): given up")

    def _stop_all(self) -> None:
        for _, job in self.running.values():
            job.stop()


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a text file, empty if there is none."""
    if not path.exists():
        return ""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
