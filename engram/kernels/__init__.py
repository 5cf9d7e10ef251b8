"""Operators for which a chain of torch calls would move several times the bytes that the work needs.

Each is one `torch.library` operator (`torch.ops.engram.*`), so that `torch.compile` and `torch.export` go through it,
with a plain-torch reference that runs anywhere and, where a compiler is at hand, a C++ kernel for the CPU.
"""

from engram.kernels.fusion import Fused, fuse_memory
from engram.kernels.hashing import hash_ngrams
from engram.kernels.native import load_native
from engram.kernels.rows import combine_rows, row_adam_
from engram.kernels.swiglu import weighted_swiglu

__all__ = ["Fused", "combine_rows", "fuse_memory", "hash_ngrams", "load_native", "row_adam_", "weighted_swiglu"]
