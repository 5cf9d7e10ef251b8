"""Files that launcher and runs leave in a point's folder for each other and for `engram sweep status`.

Each has one writer at any time, writes whole files by rename, and needs no lock, so a shared file system will do.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from engram.config import require

# Of every run: its settings and what it prints; of the launcher: that it gave the point up.
SETTINGS, LOG, FAILURE = "run.yaml", "log.txt", "failure.json"
# Of a point's Slurm jobs: the launcher's last submission, and the run that its first task started. submitit's own files
# lie beside them.
SLURM = "slurm"
SUBMITTED, TASK = f"{SLURM}/submitted.json", f"{SLURM}/task.json"

# What a sweep needs of a run's result.
_NUMBERS = ["tokens", "tokens_per_s", "model.experts.n_experts", "model.experts.shared_width"]
_NUMBERS += [f"budget.{name}" for name in ("total", "active", "rho", "flops_per_token")]
_TEXTS = ["data.corpus_hash", "device", "versions.torch"]
_LISTS = ["model.memory.rows", "history"]


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if it is not there, or is nothing that this package wrote."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        return {}


def check_result(result: Any) -> None:
    """Raise `ConfigError` naming what a run's result lacks of what a sweep needs."""
    for name in _NUMBERS:
        _require_number(name, _at(result, name))
    for name in _TEXTS:
        require(isinstance(_at(result, name), str), name, _at(result, name), "text")
    for name in _LISTS:
        value = _at(result, name)
        require(isinstance(value, list) and len(value) > 0, name, value, "a list of one value or more")
    _require_number("model.memory.rows[0]", result["model"]["memory"]["rows"][0])
    for i, entry in enumerate(result["history"]):
        for name in ("tokens", "nats"):
            _require_number(f"history[{i}].{name}", _at(entry, name))
    last = result["history"][-1]["tokens"]
    require(last == result["tokens"], "history[-1].tokens", last, f"all tokens of the run ({result['tokens']})")


def _require_number(name: str, value: object) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    require(is_number, name, value, "a finite number")


def _at(data: Any, name: str) -> Any:
    """What lies at a dotted name; None where it isn't there."""
    for key in name.split("."):
        data = data.get(key) if isinstance(data, dict) else None
    return data
