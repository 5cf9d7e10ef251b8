"""Operators for which a chain of torch calls would move several times the bytes that the work needs.

Each is one `torch.library` operator (`torch.ops.engram.*`), so that `torch.compile` and `torch.export` go through it,
with a plain-torch reference that runs anywhere and, where a compiler is at hand, a C++ kernel for the CPU.
"""

from engram.kernels.causal_attention import attention, has_attention
from engram.kernels.elsewhere import gather_mapped, pick_rows, picks_from_host
from engram.kernels.fusion import Fused, fuse_memory
from engram.kernels.grouped_swiglu import grouped_swiglu, has_grouped_swiglu
from engram.kernels.hashing import hash_ngrams
from engram.kernels.layout import lay_out_rows
from engram.kernels.linear import linear
from engram.kernels.loading import load_kernels
from engram.kernels.loss import cross_entropy_
from engram.kernels.native import load_native
from engram.kernels.norm import norm_rotate, rms_norm
from engram.kernels.orthogonalize import orthogonalize
from engram.kernels.routing import Routed, route, router_logits, scores_of
from engram.kernels.rows import combine_rows, gather_rows, row_adam_
from engram.kernels.sinkhorn import read_branches, sinkhorn, write_branches
from engram.kernels.swiglu import swiglu

__all__ = [
    "Fused",
    "Routed",
    "attention",
    "combine_rows",
    "cross_entropy_",
    "fuse_memory",
    "gather_mapped",
    "gather_rows",
    "grouped_swiglu",
    "has_attention",
    "has_grouped_swiglu",
    "hash_ngrams",
    "lay_out_rows",
    "linear",
    "load_kernels",
    "load_native",
    "norm_rotate",
    "orthogonalize",
    "pick_rows",
    "picks_from_host",
    "read_branches",
    "rms_norm",
    "route",
    "router_logits",
    "row_adam_",
    "scores_of",
    "sinkhorn",
    "swiglu",
    "write_branches",
]
