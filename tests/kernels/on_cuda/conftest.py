"""These tests run on a CUDA device, or in the interpreter of Triton, which must be chosen before Triton is imported.

Without a device, and unless TRITON_INTERPRET=1 says so already, `test_in_interpreter.py` runs them in a process of its
own: an interpreting Triton is nothing to leave about for tests of torch.compile. What the interpreter can't tell, that
kernels compile, `test_compiling.py` asks the compiler, which needs no device.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

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


if INTERPRETED:
    from triton.runtime.interpreter import InterpretedFunction

    prepare_and_call, prepared = InterpretedFunction.__call__, set()

    def call_prepared(function: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        """At each call of a function by a kernel Triton looks through its whole language: a third of the time here.

        What that replaces stays replaced, until the launch that began with the same replacements ends.
        """
        if function.fn in prepared:
            return function.rewrite()(*args, **kwargs)
        prepared.add(function.fn)
        return prepare_and_call(function, *args, **kwargs)

    InterpretedFunction.__call__ = call_prepared


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: in the interpreter they take tensors of the CPU."""
    return torch.device("cpu" if INTERPRETED else "cuda")
