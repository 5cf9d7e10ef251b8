"""What is seen of a run: logged values as one CSV file that survives a stop, and a progress bar."""

from __future__ import annotations

import csv
import math
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from engram.training.atomic import atomic_file

_SECONDS_BETWEEN_WRITES = 5.0


class CSVMetrics(Logger):
    """Writes `metrics.csv` to a folder, atomically, every few seconds and at the end: a row for each logged step.

    A resumed run keeps the rows of the steps before the one it goes on from (Lightning's CSVLogger starts anew). The
    file of an earlier run stays as it is until `go_on_from` is called.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._rows: dict[int, dict[str, Any]] = {}
        self._last_write = -math.inf

    @property
    def name(self) -> str:
        """Empty: the folder is the run's own."""
        return ""

    @property
    def version(self) -> str:
        """Empty: the folder is the run's own."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's `config.yaml` holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add values to the row of a step."""
        self._rows.setdefault(step or 0, {}).update(metrics)

    @rank_zero_only
    def go_on_from(self, step: int) -> None:
        """Drop the rows that an earlier run in this folder logged for this step and later ones; keep the others."""
        self._rows = {s: row for s, row in _read(self.path).items() if s < step}
        self.write()
        if not self._rows:
            self.path.unlink(missing_ok=True)

    @rank_zero_only
    def save(self) -> None:
        """Write the file if a few seconds have passed since it was last written."""
        if time.monotonic() - self._last_write > _SECONDS_BETWEEN_WRITES:
            self.write()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the file."""
        self.write()

    @rank_zero_only
    def write(self) -> None:
        """Write the file."""
        if not self._rows:
            return
        self._last_write = time.monotonic()
        columns = list(dict.fromkeys(name for row in self._rows.values() for name in row))
        with atomic_file(self.path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["step", *sorted(columns)])
            writer.writeheader()
            writer.writerows({"step": step, **self._rows[step]} for step in sorted(self._rows))


def _read(path: Path) -> dict[int, dict[str, Any]]:
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{name: value for name, value in row.items() if value != ""} for row in csv.DictReader(file)]
    return {int(row.pop("step")): row for row in rows}


class Bar(TQDMProgressBar):
    """Lightning's bar, less the name of a logger."""

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        """What stands behind the bar."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}
