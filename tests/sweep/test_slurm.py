"""What a point asks of Slurm, and which of its runs goes on when there are several. `tests/cluster` has a Slurm."""

import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_sweep import plan_at

from engram.cli import main
from engram.config import ConfigError
from engram.sweep.plan import Point

submitit = pytest.importorskip("submitit")

from engram.sweep.slurm import SlurmOptions, recorded_job  # noqa: E402
from engram.sweep.slurm_task import EXIT_SUPERSEDED, PointTask  # noqa: E402

RESULT = Path("result.json")


@given(st.integers(0, 64), st.integers(1, 8), st.integers(1, 16))
def test_every_gpu_has_one_task_and_every_task_its_cores(gpus: int, nodes: int, threads: int) -> None:
    if gpus % nodes:
        with pytest.raises(ConfigError, match=rf"gpus-per-point is {gpus}: allowed is .*nodes-per-point \({nodes}\)"):
            SlurmOptions(gpus=gpus, nodes=nodes)
        return
    asked = SlurmOptions(gpus=gpus, nodes=nodes).parameters("point", threads)
    assert asked["nodes"] * asked["ntasks_per_node"] == (gpus or nodes)
    assert asked["nodes"] * asked.get("gpus_per_node", 0) == gpus
    assert asked["cpus_per_task"] == threads
    assert set(asked) <= submitit.SlurmExecutor._valid_parameters()


def test_options_reach_the_batch_script_that_submitit_writes() -> None:
    from submitit.slurm.slurm import _make_sbatch_string

    options = SlurmOptions(gpus=16, nodes=2, time=90, partition="gpu", account="lab", other={"mem": "64G"})
    script = _make_sbatch_string("true", "folder", **options.parameters("point", 4, after="12"))
    asked = {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")}
    assert asked >= {
        *("job-name=point", "nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=4", "time=90"),
        *("partition=gpu", "account=lab", "mem=64G", "requeue", "dependency=afterany:12"),
    }
    assert not any(line.startswith("qos") for line in asked)
    assert re.search(r"^srun .* --kill-on-bad-exit=1 --cpus-per-task=4 true$", script, re.MULTILINE)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--gpus-per-point", "2"], "gpus-per-point is 2: allowed is with --executor slurm alone"),
        (["--executor", "slurm", "--gpus-per-point", "3", "--nodes-per-point", "2"], "gpus-per-point is 3: allowed"),
        (["--executor", "slurm", "--slurm-time", "4"], "slurm-time is 4: allowed is 5 minutes or more"),
        (["--executor", "slurm", "--slurm-option", "mem"], "slurm-option is 'mem': allowed is NAME=VALUE"),
    ],
)
def test_options_that_cannot_be_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], error: str
) -> None:
    _, path = plan_at(tmp_path)
    assert main(["sweep", "run", str(path), *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {error}")


def test_without_submitit_the_command_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, path = plan_at(tmp_path)
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.delitem(sys.modules, "engram.sweep.slurm")  # which is then imported anew
    assert main(["sweep", "run", str(path), "--executor", "slurm"]) == 2
    said = "error: executor is 'slurm', which needs submitit: pip install 'engram-moe[slurm]'\n"
    assert capsys.readouterr() == ("", said)


def write(point: Point, name: str, **record: object) -> None:
    path = point.folder / "slurm" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def test_a_job_is_known_though_its_launcher_died_before_it_wrote_the_id(tmp_path: Path) -> None:
    point = plan_at(tmp_path)[0].points()[0]
    assert recorded_job(point.folder) is None
    write(point, "submitted.json", attempt=2, job=None)
    write(point, "task.json", attempt=1, job="7")
    assert recorded_job(point.folder) is None
    write(point, "task.json", attempt=2, job="8")
    assert recorded_job(point.folder) == "8"
    write(point, "submitted.json", attempt=3, job="9")
    assert recorded_job(point.folder) == "9"


def start(point: Point, monkeypatch: pytest.MonkeyPatch, attempt: int, job: str, restart: int = 0) -> PointTask:
    """The first task of a job, as far as it comes without training: the point has a result."""
    (point.folder / RESULT).parent.mkdir(parents=True, exist_ok=True)
    (point.folder / RESULT).write_text("{}")
    variables = {"SLURM_PROCID": "0", "SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(restart)}
    for name, value in {**variables, "SLURM_JOB_NODELIST": "node1"}.items():
        monkeypatch.setenv(name, value)
    task = PointTask(point.folder, threads=1, attempt=attempt)
    task()
    return task


def test_a_finished_point_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = plan_at(tmp_path)[0].points()[0]
    start(point, monkeypatch, attempt=1, job="7")
    assert (point.folder / "log.txt").read_text() == "attempt 1, job 7, restart 0 on node1: finished already\n"


def test_the_last_submission_and_the_last_restart_have_the_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = plan_at(tmp_path)[0].points()[0]
    write(point, "submitted.json", attempt=2, job="8")
    first = start(point, monkeypatch, attempt=2, job="8")
    assert not first._is_superseded()
    with pytest.raises(SystemExit) as ended:
        start(point, monkeypatch, attempt=1, job="7")
    assert ended.value.code == EXIT_SUPERSEDED
    start(point, monkeypatch, attempt=2, job="8", restart=1)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert first._is_superseded()


def test_other_tasks_do_what_the_first_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = plan_at(tmp_path)[0].points()[0]
    start(point, monkeypatch, attempt=1, job="7")
    record = json.loads((point.folder / "slurm" / "task.json").read_text())
    write(point, "task.json", **{**record, "arguments": ["--ckpt_path", "somewhere"]})
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert PointTask(point.folder, threads=1, attempt=1)._follow() == ["--ckpt_path", "somewhere"]
