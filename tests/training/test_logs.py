"""metrics.csv: one row for each step, whole at any time, and kept through a stop."""

import csv
from pathlib import Path

from engram.training.logs import CSVMetrics


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_values_of_a_step_share_a_row_and_columns_come_as_they_are_logged(tmp_path: Path) -> None:
    logger = CSVMetrics(tmp_path)
    logger.log_metrics({"loss": 2.5}, 0)
    logger.log_metrics({"loss": 0.1 + 0.2}, 1)
    logger.log_metrics({"val": 7.0}, 1)
    logger.finalize("success")
    assert rows(tmp_path) == [
        {"step": "0", "loss": "2.5", "val": ""},
        {"step": "1", "loss": repr(0.1 + 0.2), "val": "7.0"},
    ]


def test_a_resumed_run_keeps_the_rows_before_it_and_replaces_those_after(tmp_path: Path) -> None:
    first = CSVMetrics(tmp_path)
    for step in range(5):
        first.log_metrics({"loss": float(step)}, step)
    first.finalize("failed")
    second = CSVMetrics(tmp_path)
    second.go_on_from(3)
    assert [float(row["loss"]) for row in rows(tmp_path)] == [0, 1, 2]
    for step in range(4, 6):
        second.log_metrics({"loss": step + 0.5, "more": 1.0}, step)
    second.finalize("success")
    assert [float(row["loss"]) for row in rows(tmp_path)] == [0, 1, 2, 4.5, 5.5]
    assert [row["more"] for row in rows(tmp_path)] == [""] * 3 + ["1.0"] * 2


def test_a_run_from_the_start_keeps_nothing_of_an_older_one(tmp_path: Path) -> None:
    first = CSVMetrics(tmp_path)
    first.log_metrics({"loss": 1.0}, 0)
    first.finalize("success")
    second = CSVMetrics(tmp_path)
    second.go_on_from(0)
    assert not first.path.exists()
    second.log_metrics({"loss": 2.0}, 19)
    second.finalize("success")
    assert [row["loss"] for row in rows(tmp_path)] == ["2.0"]


def test_a_run_that_is_refused_leaves_the_file_of_an_older_one(tmp_path: Path) -> None:
    first = CSVMetrics(tmp_path)
    first.log_metrics({"loss": 1.0}, 0)
    first.finalize("success")
    CSVMetrics(tmp_path).finalize("failed")
    assert [row["loss"] for row in rows(tmp_path)] == ["1.0"]


def test_saving_often_writes_seldom(tmp_path: Path) -> None:
    logger = CSVMetrics(tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.save()
    written = (tmp_path / "metrics.csv").stat().st_ino
    for step in range(1, 50):
        logger.log_metrics({"loss": 1.0}, step)
        logger.save()
    assert (tmp_path / "metrics.csv").stat().st_ino == written
    logger.finalize("success")
    assert len(rows(tmp_path)) == 50
