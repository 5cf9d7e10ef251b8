"""The command line around a run: what it leaves alone, how it goes on, and what it says when it is stopped."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_run import Run

from engram.inference.opening import find_model
from engram.parallel.checkpoint import last_checkpoint, read_run
from engram.training.main import main
from engram.training.module import LitEngramLM

Train = Callable[..., Run]
InBatch = Callable[[int, Callable[[LitEngramLM], None]], None]


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a run."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture(autouse=True)
def no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of pytest are not the command's."""
    monkeypatch.setattr("sys.argv", ["train.py"])


def test_validating_a_run_changes_nothing_in_its_folder(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    run = train()
    before = contents(run.folder)
    capsys.readouterr()
    flags = ("--ckpt_path", "last", "--model.optim.lr", "0.1")  # which validation does not use
    assert main(["validate", "--config", str(run.folder / "run.yaml"), *flags]) == 0
    assert "val/nats" in capsys.readouterr().out
    assert contents(run.folder) == before


def test_last_is_the_checkpoint_of_the_runs_own_folder(train: Train) -> None:
    train(trainer__limit_val_batches=1.0)
    run = train(flags=("--ckpt_path", "last", "--trainer.max_steps", "12"))
    assert run.code == 0
    assert list(run.column("train/loss")) == list(range(12))
    assert [entry["step"] for entry in run.result["history"]] == [4, 8, 12]


def interrupt(module: LitEngramLM) -> None:
    raise KeyboardInterrupt


# A signal may be taken by another thread of the process first, and be noticed a step earlier or later.
@pytest.mark.parametrize(
    ("act", "stopped_at"),
    [(lambda module: os.kill(os.getpid(), signal.SIGTERM), "[78]"), (interrupt, "6")],
    ids=["TERM", "INT"],
)
def test_a_run_that_is_stopped_says_where_and_how_to_go_on(
    train: Train,
    in_batch: InBatch,
    act: Callable[[LitEngramLM], None],
    stopped_at: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    in_batch(6, act)
    run = train(trainer__max_steps=12)
    assert run.code == 130
    assert re.fullmatch(f"stopped at step {stopped_at} of 12: go on with --ckpt_path last", said(capsys))
    assert not (run.folder / "result.json").exists()


def test_a_run_out_of_time_is_stopped_and_names_no_checkpoint_it_did_not_save(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    train()
    run = train(flags=("--trainer.max_time", "00:00:00:00"))
    assert run.code == 130
    assert said(capsys) == "stopped at step 0 of 8"


def test_a_run_in_a_used_folder_clears_the_old_result_and_rows_when_it_starts(train: Train, in_batch: InBatch) -> None:
    run = train()
    found: list[bool] = []
    in_batch(6, lambda module: found.append((run.folder / "result.json").exists()))
    assert train(trainer__log_every_n_steps=8).code == 0
    assert found == [False]
    assert list(run.column("train/loss")) == [7]


@pytest.mark.parametrize(
    ("changes", "flags", "stop"),
    [({"model__model__memory__rows": [11, 13]}, (), 6), ({"trainer__max_steps": 12}, ("--ckpt_path", "last"), 10)],
    ids=["new", "resumed"],
)
def test_what_is_found_in_a_used_folder_is_of_the_run_that_was_stopped_there(
    train: Train, in_batch: InBatch, changes: dict[str, Any], flags: tuple[str, ...], stop: int
) -> None:
    run = train(trainer__limit_val_batches=1.0)
    notes = run.folder / "model" / "notes.txt"
    notes.write_text("of somebody else")
    in_batch(stop, interrupt)
    assert train(flags=flags, **changes).code == 130
    found = find_model(run.folder)
    assert found == last_checkpoint(run.folder / "checkpoints")
    assert read_run(found)["model_config"]["memory"]["rows"] == changes.get("model__model__memory__rows", [97, 131])
    assert train(flags=flags, **changes).code == 0
    assert find_model(run.folder) == run.folder / "model"
    assert notes.read_text() == "of somebody else"


def test_a_result_that_was_deleted_is_written_again_from_the_last_checkpoint(train: Train) -> None:
    run = train()
    result = run.result
    (run.folder / "result.json").unlink()
    assert train(flags=("--ckpt_path", "last")).code == 0
    assert run.result == result
    assert find_model(run.folder) == run.folder / "model"


def test_a_refused_run_leaves_a_used_folder_as_it_was_but_for_tensorboard(train: Train) -> None:
    run = train()
    before = contents(run.folder)
    for changes in (
        {"model__model__vocab_size": 310},
        {"data__config__seq_len": 64},
        {"trainer__val_check_interval": 3},
        {"flags": ("--ckpt_path", "last", "--model.optim.lr", "1")},
    ):
        assert train(**changes).code == 2
        after = contents(run.folder)
        assert {name: after[name] for name in before if name != "run.yaml"} == {
            name: data for name, data in before.items() if name != "run.yaml"
        }


def test_an_override_on_the_command_line_joins_those_of_the_file(train: Train) -> None:
    run = train(model__overrides={"memory.rows": [11, 13]}, flags=("--model.overrides.experts.top_k", "1"))
    assert run.code == 0
    assert run.result["model"]["experts"]["top_k"] == 1
    assert run.result["model"]["memory"]["rows"] == [11, 13]


def test_a_config_that_is_no_text_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_bytes(yaml.safe_dump({"threads": 1}).encode("utf-16"))
    assert main(["fit", "--config", str(tmp_path / "run.yaml")]) == 2
    assert capsys.readouterr().err.startswith("error: a config file cannot be read: 'utf-8' codec")


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        ("seed_everything", "-3", "0 to 4294967295"),
        ("seed_everything", "4294967296", "0 to 4294967295"),
        ("trainer.accumulate_grad_batches", "0", "1 or more"),
    ],
)
def test_numbers_that_no_run_can_have_are_refused_in_one_line(
    train: Train, flag: str, value: str, allowed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(flags=(f"--{flag}={value}",)).code == 2
    assert capsys.readouterr().err == f"error: {flag} is {value}: allowed is {allowed}\n"


@pytest.mark.parametrize("name", ["test", "predict"])
def test_only_fit_and_validate_are_commands(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    assert said(capsys).startswith("error: ")


def test_a_run_of_one_process_leaves_no_variables_of_a_job(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others who look for a job in the environment, as accelerate does, would take this process for a part of one."""
    of_jobs = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK")
    for name in of_jobs:
        monkeypatch.delenv(name, raising=False)
    assert train().code == 0
    assert not set(of_jobs) & os.environ.keys()
