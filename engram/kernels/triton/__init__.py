"""The Triton kernels: what `torch.ops.engram.*` runs on a CUDA device.

Each file stands beside a reference in engram/kernels. Triton is imported by `register` and not before.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engram.kernels.library import LIBRARY

_registered: bool | None = None  # what came of it, once tried


def register() -> bool:
    """Put the kernels under the CUDA key; False, and nothing done, without Triton. Only the first call does it.

    torch.compile, which comes later, reads a constant here.
    """
    global _registered
    if _registered is None:
        _registered = importlib.util.find_spec("triton") is not None
        if _registered:
            _register()
    return _registered


def _register() -> None:
    from engram.kernels.triton import (
        elsewhere,
        fusion_backward,
        fusion_forward,
        grouped_swiglu,
        hashing,
        layout,
        loss,
        norm,
        rotate,
        router_logits,
        routing,
        rows,
        sinkhorn,
        swiglu,
    )
    from engram.kernels.triton import gather as gather  # defines an operator

    kernels: dict[str, Callable[..., Any]] = {
        "hash_ngrams": hashing.hash_ngrams_triton,
        "hash_gather": hashing.hash_gather_triton,
        "fuse_memory": fusion_forward.fuse_memory_triton,
        "fuse_memory_backward": fusion_backward.fuse_memory_backward_triton,
        "gather_rows": rows.gather_rows_triton,
        "combine_rows": rows.combine_rows_triton,
        "row_adam_": rows.row_adam_triton_,
        "pick_rows": elsewhere.pick_rows_triton,
        "sinkhorn": sinkhorn.sinkhorn_triton,
        "sinkhorn_backward": sinkhorn.sinkhorn_backward_triton,
        "read_branches": sinkhorn.read_branches_triton,
        "read_branches_backward": sinkhorn.read_branches_backward_triton,
        "write_branches": sinkhorn.write_branches_triton,
        "write_branches_backward": sinkhorn.write_branches_backward_triton,
        "router_logits": router_logits.router_logits_triton,
        "router_logits_backward": router_logits.router_logits_backward_triton,
        "route": routing.route_triton,
        "route_backward": routing.route_backward_triton,
        "lay_out_rows": layout.lay_out_triton,
        "grouped_swiglu": grouped_swiglu.grouped_swiglu_triton,
        "grouped_swiglu_backward": grouped_swiglu.grouped_swiglu_backward_triton,
        "swiglu": swiglu.swiglu_triton,
        "swiglu_backward": swiglu.swiglu_backward_triton,
        "rms_norm": norm.rms_norm_triton,
        "rms_norm_backward": norm.rms_norm_backward_triton,
        "norm_rotate": rotate.norm_rotate_triton,
        "norm_rotate_backward": rotate.norm_rotate_backward_triton,
        "cross_entropy_": loss.cross_entropy_triton_,
    }
    for name, kernel in kernels.items():
        LIBRARY.impl(name, _on_its_device(kernel), "CUDA")


def _on_its_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be that of the tensors."""

    @functools.wraps(kernel)
    def run(first: Tensor, *rest: Any) -> Any:
        with torch.cuda.device(first.device):
            return kernel(first, *rest)

    return run
