"""A process of a job is killed, hangs or is asked to stop: the job ends, says why, and goes on as if nothing happened.

Each test is a real training run of two processes, with one of the launchers that docs/distributed.md shows.
"""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_model import MODEL

from engram.training.recorder import EXIT_LOST_RANK, EXIT_STOPPED

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 12, 4
TIMEOUT_S = 30.0
LIGHTNING: list[str] = []
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
# On a machine without GPUs accelerate starts several processes only if it is told that there are some.
ACCELERATE = ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes=2"]
ACCELERATE += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]

# `train.py` with a rank that once sends itself a signal in a step: from outside it would as often fall between steps.
FAULTY = """
import os, sys
from pathlib import Path
from engram.training.main import main
from engram.training.module import LitEngramLM

number, rank, at, done = os.environ["FAULT"].split(":")
step = LitEngramLM.training_step

def faulty_step(self, batch, batch_idx):
    if self.global_step == int(at) and self.global_rank == int(rank) and not Path(done).exists():
        Path(done).touch()
        os.kill(os.getpid(), int(number))
    return step(self, batch, batch_idx)

LitEngramLM.training_step = faulty_step
sys.exit(main())
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of 12 steps that saves every 4."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"document {i} tells of {' and '.join(str(i * j) for j in range(1, 3 + i % 9))}\n" for i in range(200)]
    (folder / "all.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    model = {**MODEL, "max_seq_len": 32, "memory": {**MODEL["memory"], "eos_id": 1}}
    return {
        "seed_everything": 3,
        "threads": 1,
        "checkpoint_every": EVERY,
        "timeout_s": TIMEOUT_S,
        "save_weights": False,
        "trainer": {
            "max_steps": STEPS,
            "accelerator": "cpu",
            "devices": 2,
            "limit_val_batches": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
        },
        "model": {"model": model, "optim": {"lr": 0.003, "matrix_optimizer": "adamw"}},
        "data": {
            "config": {
                "source": "files",
                "files": [str(folder / "all.jsonl")],
                "vocab_size": 300,
                "seq_len": 16,
                "batch_size": 4,
                "val_tokens": 320,
                "cache_dir": str(folder / "cache"),
            }
        },
    }


@dataclass
class Job:
    """What is left of one: its exit code, how long it took to end after the fault, all that it said, its folder."""

    code: int
    seconds: float
    said: str
    folder: Path

    @property
    def losses(self) -> dict[int, str]:
        """By step, as they are written."""
        with (self.folder / "metrics.csv").open() as file:
            return {int(row["step"]): row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]}


Start = Callable[..., Job]


@pytest.fixture(scope="module")
def start(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Runs a job to its end in a folder of its own, or one given, and sends a rank a signal in a step; no process of it
    may be left."""

    def run(launcher: list[str], fault: tuple[signal.Signals, int, int] | None, folder: Path | None = None) -> Job:
        folder = folder or tmp_path_factory.mktemp("job")
        script, done = folder / "train.py", folder / "done"
        done.unlink(missing_ok=True)
        script.write_text(FAULTY)
        run_settings = {**settings, "trainer": {**settings["trainer"], "default_root_dir": str(folder)}}
        (folder / "run.yaml").write_text(yaml.safe_dump(run_settings))
        number, rank, step = fault or (signal.SIGKILL, -1, 0)
        own = {"PYTHONPATH": str(ROOT), "FAULT": f"{int(number)}:{rank}:{step}:{done}"}
        flags = ["fit", "--config", str(folder / "run.yaml"), "--ckpt_path", "auto"]
        with (folder / "said").open("w") as said:
            process = subprocess.Popen(
                [sys.executable, *launcher, str(script), *flags], env={**os.environ, **own}, stdout=said, stderr=said
            )
            try:
                code = process.wait(timeout=120)
                ended = time.time()
                until = time.monotonic() + 30
                while processes_of(folder) and time.monotonic() < until:
                    time.sleep(0.1)
                left = processes_of(folder)
            finally:
                for pid in processes_of(folder):
                    os.kill(pid, signal.SIGKILL)
        assert not left, (folder / "said").read_text()
        seconds = ended - done.stat().st_mtime if fault else 0.0
        return Job(code, seconds, (folder / "said").read_text(), folder)

    return run


def processes_of(folder: Path) -> list[int]:
    """The processes that were started with a job's folder in their command."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if f"{folder}/".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


@pytest.fixture(scope="module")
def whole(start: Start) -> Job:
    """A run that nothing happens to."""
    job = start(LIGHTNING, None)
    assert job.code == 0, job.said
    assert list(job.losses) == list(range(STEPS))
    return job


def assert_names(job: Job, rank: int, happened: str) -> None:
    """In one line, and in time."""
    said = rf"^error: rank {rank} \(\S+, pid \d+\) {happened}, last at step \d+; go on with --ckpt_path last$"
    assert re.search(said, job.said, re.M), job.said
    assert job.seconds < TIMEOUT_S


def test_a_killed_rank_ends_the_job_which_names_it_and_goes_on_with_the_same_losses(start: Start, whole: Job) -> None:
    """Twice: the second rank is killed in a job that has gone on after the first."""
    folder = None
    for rank, step in ((1, 6), (0, 10)):
        job = start(LIGHTNING, (signal.SIGKILL, rank, step), folder)
        # Rank 0 is the process that was started: if it is killed, that is how it ends.
        assert job.code == (-signal.SIGKILL if rank == 0 else EXIT_LOST_RANK)
        assert_names(job, rank, "has died")
        assert "Traceback" not in job.said
        folder = job.folder
    resumed = start(LIGHTNING, None, folder)
    assert resumed.code == 0, resumed.said
    assert resumed.losses == whole.losses


def test_a_rank_that_hangs_is_killed_and_named_even_if_it_keeps_the_store(start: Start) -> None:
    job = start(LIGHTNING, (signal.SIGSTOP, 0, 6))
    assert job.code == -signal.SIGKILL
    assert_names(job, 0, r"has not been heard of for \d+ s")


def test_torchrun_starts_again_by_itself_and_ends_with_the_same_losses(start: Start, whole: Job) -> None:
    job = start(TORCHRUN, (signal.SIGKILL, 1, 6))
    assert job.code == 0, job.said
    # By rank 0, or if torchrun ends that sooner, by torchrun.
    assert re.search(r"error: rank 1 \(|failed \(exitcode: -9\) local_rank: 1 ", job.said), job.said
    assert job.losses == whole.losses


def test_a_job_of_accelerate_ends_too_and_names_the_rank(start: Start, whole: Job) -> None:
    # The launcher looks so often that its SIGTERM comes while rank 0 finds out who is lost.
    job = start([*ACCELERATE, "--monitor_interval=0.002"], (signal.SIGKILL, 1, 6))
    assert job.code not in (0, None)
    assert_names(job, 1, "has died")
    assert job.losses == {step: whole.losses[step] for step in range(EVERY)}


def test_a_job_of_which_one_rank_is_asked_to_stop_stops_at_a_step_and_says_so_once(start: Start, whole: Job) -> None:
    job = start(LIGHTNING, (signal.SIGTERM, 1, 6))
    assert job.code == EXIT_STOPPED
    (stopped,) = re.findall(r"^stopped at step (\d+) of 12: go on with --ckpt_path last$", job.said, re.M)
    assert stopped in ("7", "8")  # a signal to a process is noticed a moment later
    assert "error" not in job.said.lower()
    assert job.seconds < TIMEOUT_S / 3
    assert job.losses == {step: whole.losses[step] for step in range(int(stopped))}


def test_torchrun_starts_a_job_again_that_a_signal_to_one_rank_stopped(start: Start, whole: Job) -> None:
    job = start(TORCHRUN, (signal.SIGTERM, 0, 6))
    assert job.code == 0, job.said
    assert job.losses == whole.losses
