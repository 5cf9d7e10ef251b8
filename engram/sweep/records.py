"""Files that launcher and runs leave in a point's folder for each other and for `engram sweep status`.

Each has one writer at any time, writes whole files by rename, and needs no lock, so a shared file system will do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Of every run: its settings and what it prints; of the launcher: that it gave the point up.
SETTINGS, LOG, FAILURE = "run.yaml", "log.txt", "failure.json"
# Of a point's Slurm jobs: the launcher's last submission, and the run that its first task started. submitit's own files
# lie beside them.
SLURM = "slurm"
SUBMITTED, TASK = f"{SLURM}/submitted.json", f"{SLURM}/task.json"


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if it is not there, or is nothing that this package wrote."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
