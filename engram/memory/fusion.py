"""The weights that join fetched rows to the residual stream, and what decoding keeps of the past for the convolution.

The equations, of arXiv:2601.07372, sections 2.2 to 2.4, are in `engram/kernels/fusion.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from engram.config import MemoryConfig
from engram.kernels import Fused, fuse_memory, load_kernels
from engram.memory.hashing import NO_DOCUMENT, earlier


class FusionState(NamedTuple):
    """The last C positions that taps reach: values `[B, C, D]`, their scales `[B, C, M]` and document ids `[B, C]`; or
    some more that can be taken back.

    Values times scales are the normed inputs of the convolution, but for the norm's weight.
    """

    values: Tensor
    scales: Tensor
    documents: Tensor


class Fusion(nn.Module):
    """alpha = gate(h, k), u = alpha v, Y = SiLU(Conv1D(RMSNorm(u))) + u, for every token and residual branch.

    The convolution is depthwise, causal and dilated, and its weights are zero at the start, so that it adds nothing
    then; `conv_kernel` 0 is none, as in the released DeepSeek-V4.1. Taps stop at document borders.

    Args:
        config: with `d_model` and `branches` set.
    """

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        load_kernels()
        M, D, taps = config.branches, config.d_model, config.conv_kernel
        self.query_norm = nn.Parameter(torch.empty(M, D))
        self.key_norm = nn.Parameter(torch.empty(M, D))
        self.conv_norm = nn.Parameter(torch.empty(M, D)) if taps else None
        self.conv_weight = nn.Parameter(torch.empty(taps, M, D)) if taps else None  # the last tap is the token itself
        self.eps = config.norm_eps
        self.squash = config.gate == "signed_sqrt"
        self.dilation = config.dilation
        self.context = max(taps - 1, 0) * self.dilation  # how many positions before a token the taps reach
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Norms of ones, and a convolution of zeros."""
        for norm in (self.query_norm, self.key_norm, self.conv_norm):
            if norm is not None:
                nn.init.ones_(norm)
        if self.conv_weight is not None:
            nn.init.zeros_(self.conv_weight)

    def forward(
        self,
        hidden_BTMD: Tensor,
        kv: Tensor,
        documents: Tensor | None = None,
        state: FusionState | None = None,
        residual: bool = False,
    ) -> Fused:
        """Y `[B, T, M, D]`, or `hidden + Y` with `residual`, in the type of `hidden`; gates and scales `[B, T, M]`.

        Args:
            hidden_BTMD: hidden states.
            kv: M keys, then the value, `[B, T, (M + 1) D]`.
            documents: ids `[B, T]`, below 0 at padding, which gets no update; all are of one document if None.
            state: of the positions before; through it no gradient goes back.
        """
        past_values = past_scales = None
        documents = documents if documents is None else documents.long()
        if state is not None and self.context:
            now = documents if documents is not None else torch.zeros_like(kv[..., 0], dtype=torch.int64)
            documents = torch.cat([state.documents, now], 1)
            past_values, past_scales = state.values, state.scales
        return fuse_memory(
            hidden_BTMD,
            kv,
            self.query_norm,
            self.key_norm,
            self.conv_norm,
            self.conv_weight,
            documents,
            past_values,
            past_scales,
            eps=self.eps,
            squash=self.squash,
            dilation=self.dilation,
            residual=residual,
        )

    def init_state(self, batch_size: int, device: torch.device | None = None, slack: int = 0) -> FusionState:
        """The state before the first token of `batch_size` sequences; on the weights' device if none is named.

        `slack`: how many tokens `rollback` can take back at most.
        """
        (M, D), shape = self.query_norm.shape, (batch_size, self.context + slack if self.context else 0)
        device = device or self.query_norm.device
        wide = torch.promote_types(self.query_norm.dtype, torch.float32)
        return FusionState(
            torch.zeros(*shape, D, dtype=self.query_norm.dtype, device=device),
            torch.zeros(*shape, M, dtype=wide, device=device),
            torch.full(shape, NO_DOCUMENT, dtype=torch.int64, device=device),
        )

    def step(
        self, hidden_BTMD: Tensor, kv: Tensor, documents: Tensor, state: FusionState, residual: bool = False
    ) -> tuple[Fused, FusionState]:
        """As `forward` for T positions that follow `state`, and the state after them."""
        fused = self(hidden_BTMD, kv, documents, state, residual)
        if not self.context:
            return fused, state
        values = kv[..., -hidden_BTMD.shape[-1] :].detach()
        kept = (
            _last(past.shape[1], past, now.to(past.dtype))
            for past, now in zip(state, (values, fused.scales, documents), strict=True)
        )
        return fused, FusionState(*kept)

    def rollback(self, state: FusionState, n: Tensor) -> FusionState:
        """The state before the last `n` `[B]` tokens of each sequence, no more than the slack left."""
        if not self.context:
            return state
        values, scales, documents = state
        return FusionState(earlier(values, n, 0), earlier(scales, n, 0), earlier(documents, n, NO_DOCUMENT))


def _last(count: int, past: Tensor, now: Tensor) -> Tensor:
    """The last `count` positions of two stretches, in storage of their own: a view would keep a whole prompt alive."""
    if now.shape[1] >= count:
        return now[:, now.shape[1] - count :].clone()
    return torch.cat([past[:, now.shape[1] :], now], 1)
