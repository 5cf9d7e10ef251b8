"""Peak memory of a checkpoint as it serves, in a process of its own, as freed memory may stay with a process.

On the CPU it is the high-water mark of resident memory (Linux's VmHWM, reset before each measurement), on CUDA the most
that torch's allocator held; elsewhere nothing is known.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engram.config import ConfigError
from engram.inference.opening import open_model
from eval.shared.serving import decode, prefill

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peaks_of(
    path: Path, cases: Sequence[tuple[int, int]], new_tokens: int, ids: NDArray[np.int64], device: str, bf16: bool
) -> dict[str, Any]:
    """Bytes beyond those of the process before it opened the model: `model`, opened and run once, and of each case
    `(sequences, length)` the peaks of `prefill` and `decoding`; None for what is not known.

    `ids` is text to read. Raises `ConfigError` with the process's last words if it fails.
    """
    asked = {"path": str(path), "cases": cases, "new_tokens": new_tokens, "device": device, "bf16": bf16}
    text = io.BytesIO()
    np.save(text, ids)
    done = subprocess.run(
        [sys.executable, "-m", "eval.shared.peak_memory", json.dumps(asked)],
        input=text.getvalue(),
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if done.returncode:
        told = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise ConfigError(f"peak memory of {str(path)!r} cannot be measured: {told[-1]}")
    return dict(json.loads(done.stdout.decode().strip().splitlines()[-1]))


class _Meter:
    """Bytes held beyond those when it was made, and their peak since it was last begun."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known = device.type == "cuda" or (device.type == "cpu" and sys.platform == "linux")
        self._start = 0
        self._start = self.begin() or 0

    def begin(self) -> int | None:
        """Forget the peak so far; returns what is held now."""
        if self._known and self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return torch.cuda.memory_allocated(self._device) - self._start
        if self._known:
            try:
                _RESET.write_text("5")
            except OSError:  # not allowed: a peak might be an earlier one
                self._known = False
        return _status("VmRSS") - self._start if self._known else None

    def peak(self) -> int | None:
        """The most that was held since."""
        if not self._known:
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._start
        return _status("VmHWM") - self._start


def _status(name: str) -> int:
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def main(asked: dict[str, Any], text: NDArray[np.int64]) -> dict[str, Any]:
    """Measure in this process."""
    device, n = torch.device(asked["device"]), asked["new_tokens"]
    meter = _Meter(device)
    model = open_model(asked["path"])[0].to(device)
    ids = torch.from_numpy(text).to(device)
    found = []
    with torch.autocast(device.type, torch.bfloat16, enabled=asked["bf16"]):
        state, _ = prefill(model, ids[:2].view(1, 2), 1)  # what libraries set up on first use belongs to no case
        decode(model, ids[:1].view(1, 1), state)
        opened = meter.begin()
        for sequences, length in asked["cases"]:
            part = ids[: sequences * (length + n)].view(sequences, length + n)
            del state
            meter.begin()
            state, _ = prefill(model, part[:, :length], n)
            in_prefill = meter.peak()
            meter.begin()
            decode(model, part[:, length:], state)
            found.append({"prefill": in_prefill, "decoding": meter.peak()})
    return {"model": opened, "cases": found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("asked", type=json.loads)
    print(json.dumps(main(parser.parse_args().asked, np.load(io.BytesIO(sys.stdin.buffer.read())))))
