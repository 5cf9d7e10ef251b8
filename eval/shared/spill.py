"""Arrays of many tokens and blocks that need not fit in memory: written to a temporary file, and mapped.

The file has no name and is gone with the array, or with the process; `TMPDIR` says where it lies.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram.training.cache import disk_errors_name


def spilled(parts: Iterable[NDArray[Any]]) -> NDArray[Any]:
    """The parts, `[n, ...]` of one type and at least one, end to end.

    Plain writes, as a full disk would kill a process that maps the file. Raises `ConfigError` naming the folder then.
    """
    with tempfile.TemporaryFile() as file, disk_errors_name(Path(tempfile.gettempdir())):
        n = 0
        for part in parts:
            file.write(part.tobytes())
            n, shape, dtype = n + len(part), part.shape[1:], part.dtype
        file.flush()
        return np.memmap(file, dtype, "r", shape=(n, *shape))
