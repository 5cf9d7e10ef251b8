"""The launcher keeps what is finished, tries again what died, and stops what it started; one sweep trains for real."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from small_sweep import FINISH, ScriptExecutor, finished, plan_at

from engram.cli import main
from engram.config import ConfigError
from engram.parallel.checkpoint import last_checkpoint
from engram.sweep.launch import LocalJob, run_sweep
from engram.sweep.plan import Point, SweepPlan
from engram.sweep.progress import LineDisplay
from engram.training.recorder import EXIT_BAD_SETTING, EXIT_NON_FINITE

DIE_ONCE = (
    "import os, sys; f = os.environ['FOLDER'] + '/tried'\n"
    "if os.environ['RHO'] == '0.5' and not os.path.exists(f): open(f, 'w'); sys.exit(7)\n" + FINISH
)
DIE = "import os, sys\nif os.environ['RHO'] == '0.5': print('out of luck'); sys.exit(7)\n" + FINISH


def test_finished_points_are_skipped(tmp_path: Path) -> None:
    plan, _ = plan_at(tmp_path)
    done = plan.points()[1]
    done.folder.mkdir(parents=True)
    kept = json.dumps(finished(done), indent=4)
    (done.folder / "result.json").write_text(kept)
    executor = ScriptExecutor(FINISH)
    assert run_sweep(plan, executor, LineDisplay()) == []
    assert len(executor.started) == len(plan.points()) - 1
    assert done.name not in executor.started
    assert (done.folder / "result.json").read_text() == kept
    again = ScriptExecutor(FINISH)
    assert run_sweep(plan, again, LineDisplay()) == []
    assert again.started == []


def test_a_point_that_died_is_tried_again(tmp_path: Path) -> None:
    plan, _ = plan_at(tmp_path)
    executor = ScriptExecutor(DIE_ONCE)
    assert run_sweep(plan, executor, LineDisplay()) == []
    tries = [executor.started.count(p.name) for p in plan.points()]
    assert tries == [2 if p.rho == 0.5 else 1 for p in plan.points()]


def test_a_point_that_keeps_dying_is_reported_and_the_others_finish(tmp_path: Path) -> None:
    plan, _ = plan_at(tmp_path, retries=2)
    executor = ScriptExecutor(DIE)
    failures = run_sweep(plan, executor, LineDisplay())
    assert [(f.point.rho, f.code, f.tail.splitlines()[-1]) for f in failures] == [(0.5, 7, "out of luck")] * 3
    for failure in failures:
        record = json.loads((failure.point.folder / "failure.json").read_text())
        assert record == {"code": 7, "how": failure.how}
    assert all((p.folder / "result.json").exists() for p in plan.points() if p.rho != 0.5)
    assert all(executor.started.count(f.point.name) == 3 for f in failures)


def test_runs_that_an_earlier_launcher_left_are_not_started_again(tmp_path: Path) -> None:
    plan, _ = plan_at(tmp_path)
    first, *_, last = plan.points()

    class AdoptingExecutor(ScriptExecutor):
        """Finds the runs of two points where only one may run at a time; one of them then dies."""

        def adopt(self, point: Point) -> LocalJob | None:
            if point not in (first, last):
                return None
            job = ScriptExecutor.start(ScriptExecutor(FINISH if point == first else "raise SystemExit(7)"), point, 0)
            self.adopted = [*getattr(self, "adopted", []), point.name]
            if point == last:
                job.process.wait()  # or on a busy machine it outlives the other, whose slot then goes to the next point
            return job

    executor = AdoptingExecutor(FINISH, workers=1)
    for point in (first, last):
        point.folder.mkdir(parents=True)
    assert run_sweep(plan, executor, LineDisplay()) == []
    assert executor.adopted == [first.name, last.name]
    assert executor.started[0] == last.name
    assert sorted(executor.started) == sorted(point.name for point in plan.points()[1:])


@pytest.mark.parametrize("code", [EXIT_BAD_SETTING, EXIT_NON_FINITE])
def test_a_point_that_would_die_again_is_not_tried_again(tmp_path: Path, code: int) -> None:
    plan, _ = plan_at(tmp_path)
    executor = ScriptExecutor(f"import sys; sys.exit({code})")
    assert [f.code for f in run_sweep(plan, executor, LineDisplay())] == [code] * len(plan.points())
    assert len(executor.started) == len(plan.points())


def test_points_of_another_corpus_are_not_mixed_in(tmp_path: Path) -> None:
    plan, _ = plan_at(tmp_path)
    assert run_sweep(plan, ScriptExecutor(FINISH), LineDisplay()) == []
    first, second = plan.points()[:2]
    (first.folder / "result.json").write_text(json.dumps({**finished(first), "data": {"corpus_hash": "another"}}))
    (second.folder / "result.json").unlink()
    with pytest.raises(ConfigError, match=f"{first.name}.*corpus another.*output"):
        run_sweep(plan, ScriptExecutor(FINISH), LineDisplay())


def test_a_sweep_that_is_running_is_not_run_beside_itself(tmp_path: Path) -> None:
    plan, _ = plan_at(tmp_path)

    class AnotherDisplay(LineDisplay):
        def started(self, name: str, progress_file: Path) -> None:
            with pytest.raises(ConfigError, match=r"sweep 'test' is being run already in .*out"):
                run_sweep(plan, ScriptExecutor(FINISH), LineDisplay())

    assert run_sweep(plan, ScriptExecutor(FINISH), AnotherDisplay()) == []


def without(result: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != name}


@pytest.mark.parametrize(
    "damage",
    [
        *(lambda result, text=text: text for text in ('{"data"', "", "{}", "[]", "[1]", "null", "5", "\x00")),
        *(lambda result, name=name: json.dumps(without(result, name)) for name in ("budget", "history", "data")),
        lambda result: json.dumps({**result, "history": [{**result["history"][0], "nats": math.nan}]}),
        lambda result: json.dumps({**result, "history": []}),
        lambda result: json.dumps({**result, "model": {**result["model"], "memory": None}}),
    ],
)
@pytest.mark.parametrize("action", ["run", "status", "report"])
def test_a_damaged_result_is_named_by_every_command(
    tmp_path: Path, damage: Callable[[dict[str, Any]], str], action: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, path = plan_at(tmp_path)
    point = plan.points()[0]
    point.folder.mkdir(parents=True)
    (point.folder / "result.json").write_text(damage(finished(point)))
    capsys.readouterr()
    code = main(["sweep", action, str(path)])
    out, err = capsys.readouterr()
    named = rf"result '.*{point.name}/result.json' cannot be used \(.*\): delete it, .*"
    if action == "status":
        assert code == 0
        assert re.fullmatch(rf"{point.name} +damaged .*", out.splitlines()[1])
        assert re.fullmatch(named, out.splitlines()[-2])
    else:
        assert code == 2
        assert re.fullmatch(rf"error: {named}\n", err)


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, path = plan_at(tmp_path)
    _, path = plan_at(tmp_path, output=str(path))
    assert main(["sweep", "run", str(path)]) == 2
    assert re.fullmatch(r"error: cannot use '.*plan.yaml': File exists\n", capsys.readouterr().err)


def test_fewer_workers_than_none_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, path = plan_at(tmp_path)
    assert main(["sweep", "run", str(path), "--workers", "-2"]) == 2
    assert "workers is -2" in capsys.readouterr().err


def test_an_interrupt_stops_what_runs_and_keeps_what_is_finished(tmp_path: Path) -> None:
    plan, _ = plan_at(tmp_path)
    first = plan.points()[0]
    script = "import os, time\nif os.environ['RHO'] != '0.0': time.sleep(600)\n" + FINISH
    executor = ScriptExecutor(script)

    class InterruptingDisplay(LineDisplay):
        def refresh(self) -> None:
            if (first.folder / "result.json").exists() and len(executor.started) > 2:
                raise KeyboardInterrupt

    jobs: list[LocalJob] = []
    start = executor.start
    executor.start = lambda point, slot: jobs.append(start(point, slot)) or jobs[-1]  # type: ignore[method-assign,func-returns-value]
    with pytest.raises(KeyboardInterrupt):
        run_sweep(plan, executor, InterruptingDisplay())
    assert all(job.process.poll() is not None for job in jobs)
    assert (first.folder / "result.json").exists()


def test_a_terminated_sweep_takes_its_runs_with_it(tmp_path: Path) -> None:
    plan, path = plan_at(tmp_path, tokens=10**8)
    log = plan.points()[0].folder / "log.txt"
    assert _killed(path, signal.SIGTERM, log.exists) == {"code": 128 + signal.SIGTERM, "left": False}


def _killed(path: Path, how: signal.Signals, ready: Callable[[], bool]) -> dict[str, Any]:
    """Run a sweep through the command and kill it as soon as it is `ready`: how it ended, and whether anything that it
    started was still there a while later."""
    process = subprocess.Popen([sys.executable, "-m", "engram.cli", "sweep", "run", str(path)], start_new_session=True)
    deadline = time.monotonic() + 200
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(how)
    code, deadline = process.wait(60), time.monotonic() + 60
    while _anything_left_of(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = _anything_left_of(process)
    if left:
        os.killpg(process.pid, signal.SIGKILL)
    return {"code": code, "left": left}


def _anything_left_of(session: subprocess.Popen[bytes]) -> bool:
    try:
        os.killpg(session.pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepPlan, Path]:
    """A sweep trained through the command, one of its points killed on the way and the sweep run again.

    Trained once for all workers of a test run: it is the longest setup there is.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_TESTRUNUID" in os.environ else folder) / "trained-sweep"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "trained").exists():
            _train_and_report(*plan_at(folder, tokens=8192, evaluations=4, seeds=[0]))
            (folder / "trained").touch()
    return SweepPlan.load(folder / "plan.yaml"), folder / "plan.yaml"


def _train_and_report(plan: SweepPlan, path: Path) -> None:
    checkpoints = plan.points()[0].folder / "checkpoints"
    killed = _killed(path, signal.SIGKILL, lambda: last_checkpoint(checkpoints) is not None)
    (path.parent / "killed.json").write_text(json.dumps(killed))
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    assert main(["sweep", "run", str(path)]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == handlers
    assert main(["sweep", "report", str(path)]) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's prctl")
def test_a_sweep_killed_outright_takes_its_runs_with_it(trained: tuple[SweepPlan, Path]) -> None:
    _, path = trained
    assert json.loads((path.parent / "killed.json").read_text()) == {"code": -signal.SIGKILL, "left": False}


def test_every_point_ends_with_a_result(trained: tuple[SweepPlan, Path]) -> None:
    plan, _ = trained
    for point in plan.points():
        result = json.loads((point.folder / "result.json").read_text())
        assert [entry["step"] for entry in result["history"]] == [16, 32, 48, 64]
        assert result["tokens"] == 8192
        assert result["budget"]["rho"] == pytest.approx(point.budget.rho)
        assert result["val"]["nats"] < result["history"][0]["nats"]


def test_a_killed_and_resumed_point_has_the_losses_of_an_uninterrupted_one(
    trained: tuple[SweepPlan, Path], tmp_path: Path
) -> None:
    from engram.training.main import main as train

    plan, _ = trained
    point = plan.points()[0]
    settings = yaml.safe_load((point.folder / "run.yaml").read_text())
    settings["trainer"]["default_root_dir"] = str(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert train(["fit", "--config", str(tmp_path / "run.yaml")]) == 0
    alone, resumed = (json.loads((f / "result.json").read_text())["history"] for f in (tmp_path, point.folder))
    assert alone == resumed


def test_the_report_holds_every_number_and_needs_no_other_file(trained: tuple[SweepPlan, Path]) -> None:
    plan, _ = trained
    with (plan.folder / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(plan.points()) * plan.evaluations
    by_point = {p.name: json.loads((p.folder / "result.json").read_text()) for p in plan.points()}
    for row in rows:
        entry = next(e for e in by_point[row["point"]]["history"] if e["tokens"] == int(row["tokens"]))
        assert float(row["nats"]) == entry["nats"]
    page = (plan.folder / "report.html").read_text()
    assert "http://" not in page
    assert "https://" not in page
    assert "src='data:image/png" in page
    assert any(f"<b>{v}</b>" in page for v in ("U-shaped", "monotone", "not resolved"))
    assert by_point[plan.points()[0].name]["data"]["corpus_hash"] in page
    assert "capacity_one" in page
    assert (plan.folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "Loss at equal wall-clock" in page
    assert "same ability" not in page  # nothing was probed
    assert not (plan.folder / "probes.png").exists()


def test_rows_survive_their_csv(trained: tuple[SweepPlan, Path]) -> None:
    from engram.sweep.results import collect, read_csv

    plan, _ = trained
    assert read_csv(plan.folder / "points.csv") == collect(plan)


def test_a_report_of_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, path = plan_at(tmp_path)
    assert main(["sweep", "report", str(path)]) == 2
    assert "no point of sweep 'test' is finished" in capsys.readouterr().err
