"""All tests of this folder, without a CUDA device: in Triton's interpreter, in processes that set it up first."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = {file.stem.removeprefix("test_triton_"): file for file in Path(__file__).parent.glob("test_triton_*.py")}
LONG = ["fusion", "rows"]  # the others share a process: it takes longer to start one than to run most of them
SHARED = sorted(FILES.keys() - set(LONG))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("names", [[name] for name in LONG] + [SHARED], ids=" ".join)
def test_kernels_do_what_their_references_do(names: list[str]) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command += [str(FILES[name]) for name in names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
