"""Runs the points of a sweep as Slurm jobs, one for each, through submitit (github.com/facebookincubator/submitit).

submitit writes the batch script and requeues jobs that are preempted or out of time. This file says what a job asks
for, follows the jobs by `squeue`, and finds those again that an earlier launcher left running.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engram.config import ConfigError, require
from engram.sweep.launch import is_finished, write_settings
from engram.sweep.plan import Point, SweepPlan
from engram.sweep.records import SLURM, SUBMITTED, TASK, read_record
from engram.training.atomic import write_json

try:
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.slurm.slurm import SlurmInfoWatcher
except ImportError as error:
    raise ConfigError("executor is 'slurm', which needs submitit: pip install 'engram-moe[slurm]'") from error

from engram.sweep.slurm_task import PointTask

_OVER = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
}
_FORGOTTEN = "over for so long that Slurm has forgotten how"
# A job may run out of time as often as it has to. submitit wants a bound.
_TIMEOUTS = 1000
_SECONDS_BETWEEN_QUESTIONS = 30
# How long another node's file may stay unseen here: network file systems cache what is not there for up to a minute.
_UNSEEN_SECONDS = 90.0


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """What each point asks Slurm for.

    gpus: of a point, over all its `nodes`; one task each. 0: one task on CPUs on each node. cpus_per_task: 0 takes the
    plan's `threads`. time: minutes after which a job is requeued. The strings are the partition's default if empty.
    other: more of sbatch's options, by their names, as `{"mem": "64G", "constraint": "a100"}`.
    """

    gpus: int = 0
    nodes: int = 1
    cpus_per_task: int = 0
    time: int = 240
    partition: str = ""
    account: str = ""
    qos: str = ""
    other: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.nodes >= 1, "nodes-per-point", self.nodes, "1 or more")
        allowed = f"0, or a multiple of nodes-per-point ({self.nodes})"
        require(self.gpus >= 0 and self.gpus % self.nodes == 0, "gpus-per-point", self.gpus, allowed)
        require(self.cpus_per_task >= 0, "cpus-per-task", self.cpus_per_task, "1 or more (0: the plan's threads)")
        # The signal to requeue comes up to 150 seconds ahead, and ends a task that has not come to listen for it.
        require(self.time >= 5, "slurm-time", self.time, "5 minutes or more")

    @property
    def tasks_per_node(self) -> int:
        """Processes on each node: one for each GPU, or one."""
        return self.gpus // self.nodes or 1

    def parameters(self, name: str, threads: int, after: str = "") -> dict[str, Any]:
        """Parameters of `submitit.SlurmExecutor` for a job called `name` of tasks of `threads` cores.

        `after` is the id of a job that must have ended before this one starts.
        """
        asked = {
            "job_name": name,
            "time": self.time,
            "nodes": self.nodes,
            "ntasks_per_node": self.tasks_per_node,
            "cpus_per_task": threads,
            "gpus_per_node": self.gpus // self.nodes,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "dependency": f"afterany:{after}" if after else "",
        }
        return {
            **{key: value for key, value in asked.items() if value},
            # A task that dies would leave the others waiting for it; and since Slurm 22.05 a step does not take the
            # cores of a task from its job.
            "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={threads}"],
            "additional_parameters": {"requeue": True, **self.other},
        }


class SqueueWatcher(SlurmInfoWatcher):
    """States of jobs from `squeue`: submitit asks `sacct`, which knows nothing on clusters without accounting.

    `squeue` knows ended jobs for `MinJobAge` (5 minutes by default). A job that it does not know is over; if it cannot
    be asked, the last answer stands.
    """

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        """Whether a job has ended and will not be requeued."""
        return self.get_state(job_id, mode) in (*_OVER, _FORGOTTEN)

    def update(self) -> None:
        """Ask for all jobs that have not ended."""
        if asked := self._registered - self._finished:
            self._num_calls += 1
            if (states := job_states(asked)) is not None:
                self._info_dict |= {job: {"State": states.get(job, _FORGOTTEN)} for job in asked}
            self._finished |= {job for job in asked if self.is_done(job, mode="cache")}
        self._last_status_check = time.time()


def job_states(jobs: Iterable[str]) -> dict[str, str] | None:
    """States of those jobs that the controller knows, by id; None if it does not answer."""
    command = ["squeue", "--noheader", "--states=all", "--format=%i|%T", f"--jobs={','.join(sorted(jobs))}"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    if said.returncode:
        return {} if "Invalid job id" in said.stderr else None
    return dict(line.strip().split("|") for line in said.stdout.splitlines() if line.strip())


WATCHER = SqueueWatcher(delay_s=_SECONDS_BETWEEN_QUESTIONS)  # one for all jobs, as it asks for all at once


class SlurmJob:
    """The Slurm job of a point."""

    def __init__(self, point: Point, job_id: str) -> None:
        self.point, self.job_id = point, job_id
        self._ended: float | None = None

    def poll(self) -> int | None:
        """0 once the result is there; the training command's exit code, or 1, if the job ended without."""
        if is_finished(self.point):
            return 0
        if not WATCHER.is_done(self.job_id):
            return None
        self._ended = self._ended or time.monotonic()
        if WATCHER.get_state(self.job_id) == "COMPLETED" and time.monotonic() < self._ended + _UNSEEN_SECONDS:
            os.listdir(self.point.folder)  # makes a network file system look again
            return None
        return self._code() or 1

    def describe(self) -> str:
        """Its id, state, and the training command's exit code if that is known."""
        known = f"Slurm job {self.job_id}, {WATCHER.get_state(self.job_id)}"
        return known if (code := self._code()) is None else f"{known}, code {code}"

    def _code(self) -> int | None:
        record = read_record(self.point.folder / TASK)
        code = record.get("ended") if record.get("job") == self.job_id else None
        return code if isinstance(code, int) else None

    def stop(self) -> None:
        """Cancel it, and record that, so that no launcher adopts it while Slurm is at it."""
        if subprocess.run(["scancel", self.job_id], check=False).returncode == 0:
            path = self.point.folder / SUBMITTED
            write_json(path, {**read_record(path), "cancelled": True})


@dataclass
class Refused:
    """A job that Slurm did not take."""

    reason: str

    def poll(self) -> int:
        """A death."""
        return 1

    def describe(self) -> str:
        """Why."""
        return f"not submitted: {self.reason}"

    def stop(self) -> None:
        """Nothing: it never was."""


class SlurmExecutor:
    """Slurm jobs, submitted from here. They outlive the launcher, and the next one finds them by what it recorded in
    each point's folder before and after it submitted.

    Args:
        plan: whose points they are.
        options: what each asks for.
        workers: jobs at once, waiting ones included; 0: all points.
    """

    poll_seconds = 2.0

    def __init__(self, plan: SweepPlan, options: SlurmOptions, workers: int = 0) -> None:
        require(workers >= 0, "workers", workers, "1 or more (0: all points)")
        require(submitit.SlurmExecutor.affinity() > 0, "executor", "slurm", "local where the command srun is not there")
        if (world := options.nodes * options.tasks_per_node) > 1:
            plan.parallel.sizes(world)
        self.options = options
        self.threads = options.cpus_per_task or plan.threads
        self.workers = workers or len(plan.points())
        self._has_submitted = False

    def adopt(self, point: Point) -> SlurmJob | None:
        """The job of a point that an earlier launcher left waiting or running, unless it was told to cancel it."""
        submitted = read_record(point.folder / SUBMITTED)
        job_id = recorded_job(point.folder)
        if job_id is None or submitted.get("cancelled"):
            return None
        if WATCHER.is_done(job_id):
            return None
        self._has_submitted = True
        return SlurmJob(point, job_id)

    def start(self, point: Point, slot: int) -> SlurmJob | Refused:
        """Submit the point's job, to start when its last one is over, whatever state that seems to be in.

        Raises `ConfigError` if Slurm refuses the first job: it would refuse all.
        """
        folder = point.folder.absolute()
        attempt = read_record(folder / SUBMITTED).get("attempt", 0) + 1
        after = recorded_job(folder) or ""
        accelerator = "gpu" if self.options.gpus else "cpu"
        write_settings(point, self.threads, self.options.tasks_per_node, self.options.nodes, accelerator)
        # Told before, too: a launcher that dies in between leaves a job that knows that it is superseded.
        write_json(folder / SUBMITTED, {"attempt": attempt, "job": None})
        executor = submitit.SlurmExecutor(folder / SLURM, max_num_timeout=_TIMEOUTS)
        executor.update_parameters(**self.options.parameters(point.name, self.threads, after))
        try:
            with _as_outside_of_jobs():
                job = executor.submit(PointTask(folder, self.threads, attempt))
        except (FailedJobError, FailedSubmissionError) as error:
            reason = " ".join(str(error).split())
            if not self._has_submitted:
                raise ConfigError(f"Slurm refuses the job: {reason}") from error
            return Refused(reason)
        write_json(folder / SUBMITTED, {"attempt": attempt, "job": job.job_id})
        self._has_submitted = True
        return SlurmJob(point, job.job_id)


def recorded_job(folder: Path) -> str | None:
    """The id of the last job that was submitted for the point of a folder, as far as is known: the launcher's record
    lacks it if it died while it submitted, and the job's own if it has not started."""
    submitted, task = read_record(folder / SUBMITTED), read_record(folder / TASK)
    if submitted.get("job") is None and task.get("attempt") == submitted.get("attempt"):
        return task.get("job")
    return submitted.get("job")


@contextmanager
def _as_outside_of_jobs() -> Iterator[None]:
    """If the launcher is a job itself, hide what Slurm told it: sbatch would take that for wishes."""
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    kept = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with submitit.helpers.clean_env(), submitit.helpers.environment_variables(**kept):
        yield
