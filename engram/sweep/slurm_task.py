"""What every task of a Slurm job does: run the training command as a child, from the point's last checkpoint.

Task 0 speaks for all: it chooses the checkpoint, writes `slurm/task.json`, and ends a run whose place another took.
submitit calls `checkpoint` in it when Slurm is about to preempt the job or its time is over, and requeues the job.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from submitit.helpers import DelayedSubmission

from engram.sweep.launch import resume_arguments
from engram.sweep.records import LOG, SETTINGS, SUBMITTED, TASK, read_record
from engram.training.atomic import write_json
from engram.training.environment import training_environment
from engram.training.recorder import RESULT

PREEMPTED = "preempted"  # how a run ended that will be requeued
EXIT_SUPERSEDED = 5
_POLL_SECONDS = 0.5
_STOP_SECONDS = 30.0  # to save a checkpoint, of the 90 that submitit asks for between Slurm's signal and its end
_SECONDS_BETWEEN_CHECKS = 10.0
_SHARED_SECONDS = 300.0  # in which every node must see a file that one of them wrote


@dataclass
class PointTask:
    """The callable that submitit pickles, and calls in each task of each start of the job.

    Args:
        folder: the point's, absolute.
        threads: cores of a task.
        attempt: number of the submission, 1 for the point's first; a later one takes the place of an earlier.
    """

    folder: Path
    threads: int
    attempt: int

    def __post_init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._arguments: list[str] | None = None

    def __call__(self) -> None:
        """Train; the process ends with the training command's exit code, for Slurm to know."""
        leads = os.environ["SLURM_PROCID"] == "0"
        self._arguments = self._lead() if leads else self._follow()
        if self._arguments is None:
            return
        code = self._train(leads)
        if leads:
            self._record(ended=code)
        elif code:
            # A task that fails ends all others. If this one fell because task 0 stopped its own to be requeued, that
            # must be done first.
            time.sleep(3 * _STOP_SECONDS)
        if code:
            raise SystemExit(code)

    def checkpoint(self) -> DelayedSubmission:
        """Stop training (only task 0 is asked); the requeued job goes on at what was saved by now."""
        self._stop()
        self._record(ended=PREEMPTED)
        return DelayedSubmission(replace(self))

    @property
    def _run(self) -> dict[str, Any]:
        """What tells this run of the point from all others; a requeued job keeps its id."""
        restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        return {"attempt": self.attempt, "job": os.environ["SLURM_JOB_ID"], "restart": restart}

    def _lead(self) -> list[str] | None:
        """Take the point and choose where training goes on; None if it is finished."""
        if read_record(self.folder / SUBMITTED).get("attempt", 0) > self.attempt:
            raise SystemExit(EXIT_SUPERSEDED)
        self._arguments = None if (self.folder / RESULT).exists() else resume_arguments(self.folder)
        self._record(ended=None)
        with (self.folder / LOG).open("a", encoding="utf-8") as log:
            run = ", ".join(f"{key} {value}" for key, value in self._run.items())
            how = "finished already" if self._arguments is None else " ".join(self._arguments) or "from the start"
            print(f"{run} on {os.environ['SLURM_JOB_NODELIST']}: {how}", file=log)
        return self._arguments

    def _follow(self) -> list[str] | None:
        """What task 0 chose: two nodes that look for themselves may see different files for a while."""
        deadline = time.monotonic() + _SHARED_SECONDS
        while not self._is_own(record := read_record(self.folder / TASK)):
            if time.monotonic() > deadline:
                raise SystemExit(f"{str(self.folder / TASK)!r} holds {record}, not {self._run}: is it shared?")
            time.sleep(_POLL_SECONDS)
        return record["arguments"]

    def _record(self, ended: int | str | None) -> None:
        own = {"node": os.environ["SLURM_JOB_NODELIST"], "arguments": self._arguments, "ended": ended}
        write_json(self.folder / TASK, {**self._run, **own})

    def _is_superseded(self) -> bool:
        """Whether another run has the point: a later submission, or this job requeued off a node that was cut off."""
        if read_record(self.folder / SUBMITTED).get("attempt", 0) > self.attempt:
            return True
        record = read_record(self.folder / TASK)
        return bool(record) and not self._is_own(record)

    def _is_own(self, record: dict[str, Any]) -> bool:
        return all(record.get(key) == value for key, value in self._run.items())

    def _train(self, leads: bool) -> int:
        """The training command's exit code. Task 0's prints to the point's log, the others' to submitit's, one each."""
        command = [sys.executable, "-m", "engram.training.main", "fit", "--config", str(self.folder / SETTINGS)]
        # Slurm may send its signals to all processes of a task, and the one for submitit would end the child.
        blocked = {signal.SIGUSR1, signal.SIGUSR2}
        with (self.folder / LOG).open("ab") if leads else nullcontext() as log:
            signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
            self._child = child = subprocess.Popen(
                [*command, *(self._arguments or ())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=training_environment(self.threads),
            )
            signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
        checked = time.monotonic()
        # Not child.wait(): it holds a lock that `checkpoint`, called by a signal in its midst, would wait for.
        while (code := child.poll()) is None:
            time.sleep(_POLL_SECONDS)
            if leads and time.monotonic() - checked > _SECONDS_BETWEEN_CHECKS:
                checked = time.monotonic()
                if self._is_superseded():
                    self._stop()
                    raise SystemExit(EXIT_SUPERSEDED)
        return code if code >= 0 else 128 - code

    def _stop(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._child is not None and self._child.poll() is None:
                self._child.send_signal(number)
                with suppress(subprocess.TimeoutExpired):
                    self._child.wait(_STOP_SECONDS)
