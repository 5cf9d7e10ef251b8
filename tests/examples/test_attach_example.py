"""The example that attaches memory to a transformers model, run as a user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "attach_to_transformers.py"


def test_attached_memory_lowers_held_out_loss_comes_off_and_comes_back(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--backbone-steps=20", "--steps=15", f"--folder={tmp_path}"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    before, silent = re.search(r"held-out loss ([\d.]+) nats; ([\d.]+) with memory", done.stdout).groups()
    after = re.search(r"-> ([\d.]+) nats, the backbone as it was", done.stdout).group(1)
    off = re.search(r"memory taken off: ([\d.]+)", done.stdout).group(1)
    again = re.search(r"attached: ([\d.]+)", done.stdout).group(1)
    assert before == silent == off
    assert after == again
    assert float(after) < float(before)
    assert (tmp_path / "memory" / "engram.safetensors").exists()
    assert done.stdout.count("\n| ") == 2
