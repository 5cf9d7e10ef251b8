"""These tests run on a CUDA device, or in the interpreter of Triton, which must be chosen before Triton is imported.

Without a device, and unless TRITON_INTERPRET=1 says so already, `test_in_interpreter.py` runs them in a process of its
own: an interpreting Triton is nothing to leave about for tests of torch.compile. What the interpreter can't tell, that
kernels compile, `test_compiling.py` asks the compiler, which needs no device.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUN_HERE = importlib.util.find_spec("triton") is not None and (INTERPRETED or torch.cuda.is_available())
collect_ignore_glob = ["test_in_interpreter.py"] if RUN_HERE else ["test_triton_*.py"]
if INTERPRETED:
    collect_ignore_glob.append("test_compiling.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name.startswith("test_triton_") and not INTERPRETED:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: in the interpreter they take tensors of the CPU."""
    return torch.device("cpu" if INTERPRETED else "cuda")
