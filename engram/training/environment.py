"""Process settings: those that make training on the CPU faster, and whom a run outlives. They change no result."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys

import torch

# mallopt(3): parameter numbers of malloc.h, and our values.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_MALLOC = {_M_MMAP_THRESHOLD: 2**30, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 2**28}


_PR_SET_PDEATHSIG = 1  # prctl(2)
_PARENT = "ENGRAM_PARENT"


def training_environment(threads: int) -> dict[str, str]:
    """The environment for a training process of this one that may use `threads` cores and ends when this one does."""
    own = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", _PARENT: str(os.getpid())}
    return {**os.environ, **own}


def prepare_process(threads: int | None = None) -> None:
    """Settings of this process, before it computes anything; `threads` cores if given, else torch's choice."""
    end_with_parent()
    torch.set_flush_denormal(True)  # arithmetic on denormals is 10x and more slower
    keep_freed_memory()
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # else Lightning's launcher sets a number of its own
        torch.set_num_threads(threads)


def end_with_parent() -> None:
    """End when the process that started this one ends, killed or not: else its successor would train the same points
    beside us. Only where `training_environment` asks for it, and only on Linux, which can."""
    parent = os.environ.get(_PARENT)
    if parent is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):  # it was gone before we asked
            raise SystemExit(128 + signal.SIGTERM)


def freeze_objects() -> None:
    """Take all objects that live now out of the garbage collector's rounds, for the rest of the process: those of the
    libraries are so many that looking through them took up to 4 % of a small model's step."""
    gc.collect()
    gc.freeze()


def keep_freed_memory() -> None:
    """Let glibc keep large freed buffers, where it is the C library: else each step gives them back to the kernel, and
    the page faults to get them again cost 5-20 % of a step."""
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "gnu_get_libc_version"):
            for parameter, value in _MALLOC.items():
                library.mallopt(parameter, value)
