"""Putting the fast kernels in the references' place, for the devices that this process has."""

from __future__ import annotations

import functools

import torch

from engram.kernels.native import load_native


@functools.cache
def load_kernels() -> None:
    """Load the C++ kernels, compiling them if need be, and with a CUDA device the Triton ones.

    Layers call it when they are built. Only the first call in a process does anything.
    """
    load_native()
    if torch.cuda.is_available():
        from engram.kernels.triton import register

        register()
