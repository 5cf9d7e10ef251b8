"""How fetched rows join the residual stream: a gate for each branch, then a short causal convolution.

Equations of arXiv:2601.07372, sections 2.2 to 2.4. Letters: e_t the concatenated rows of a token, h_t the hidden state,
k_t = W_K e_t, v_t = W_V e_t, alpha_t the gate, u_t = alpha_t v_t, Y = SiLU(Conv1D(RMSNorm(u))) + u.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.config import GateKind, MemoryConfig
from engram.memory.hashing import NO_DOCUMENT
from engram.tensors import widen


def signed_sqrt(g: Tensor) -> Tensor:
    """sign(g) * sqrt(max(|g|, 1e-6)): the compression that the demonstration code puts before the sigmoid."""
    return g.sign() * g.abs().clamp_min(1e-6).sqrt()


def identity(g: Tensor) -> Tensor:
    """g itself: the paper's equation has nothing between the dot product and the sigmoid."""
    return g


SQUASHES: dict[GateKind, Callable[[Tensor], Tensor]] = {"signed_sqrt": signed_sqrt, "plain": identity}


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis, which is kept with size 1."""
    # The sum and one division, since the backward of a mean divides a tensor as large as x.
    return torch.rsqrt(x.square().sum(-1, keepdim=True) / x.shape[-1] + eps)


def rms_normalize(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis, computed in float32 or wider, returned in the type of `x`.

    `weight` may have leading axes (one norm for each branch).
    """
    wide = widen(x)
    return (wide * inverse_rms(wide, eps) * weight).type_as(x)


class Gate(nn.Module):
    """alpha = sigmoid(squash(RMSNorm(h) . RMSNorm(k) / sqrt(d))), one for each token and residual branch."""

    def __init__(self, branches: int, d_model: int, kind: GateKind, eps: float) -> None:
        super().__init__()
        self.query_norm = nn.Parameter(torch.ones(branches, d_model))
        self.key_norm = nn.Parameter(torch.ones(branches, d_model))
        self.squash = SQUASHES[kind]
        self.eps = eps

    def forward(self, hidden_BTMD: Tensor, key_BTMD: Tensor) -> Tensor:
        """Hidden states and keys `[B, T, M, D]` -> gates in [0, 1], `[B, T, M]`, float32 or wider."""
        h, k = widen(hidden_BTMD), widen(key_BTMD)
        # The scales of the two norms are numbers for each vector, so they and the weights are multiplied once.
        dot = (h * k * (widen(self.query_norm) * widen(self.key_norm))).sum(-1, keepdim=True)
        g = dot * inverse_rms(h, self.eps) * inverse_rms(k, self.eps) / math.sqrt(h.shape[-1])
        return torch.sigmoid(self.squash(g.squeeze(-1)))


class ConvState(NamedTuple):
    """What the convolution keeps of the past: its last inputs `[B, C, M, D]` and their document ids `[B, C]`."""

    inputs: Tensor
    documents: Tensor


class ShortConv(nn.Module):
    """Y = SiLU(Conv1D(RMSNorm(u))) + u: depthwise, causal, dilated, its weights zero at the start.

    Taps stop at document borders. A sum of shifted products needs no transpose, and was faster on a CPU than a
    depthwise `conv1d` both ways: forward and backward of [16, 256, 1, 96] took 6.5 ms against 13.2 ms in bfloat16.
    """

    def __init__(self, branches: int, d_model: int, kernel: int, dilation: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(branches, d_model))
        self.weight = nn.Parameter(torch.zeros(kernel, branches, d_model))  # the last tap is the token itself
        self.dilation = dilation
        self.eps = eps

    @property
    def context(self) -> int:
        """How many positions before a token its taps reach."""
        return (self.weight.shape[0] - 1) * self.dilation

    def forward(
        self, u_BTMD: Tensor, documents_BT: Tensor | None = None, state: ConvState | None = None
    ) -> tuple[Tensor, ConvState]:
        """Y `[B, T, M, D]` for inputs u of that shape that follow `state`, and the state after them.

        Without documents all positions belong to document 0; without a state the sequence starts here.
        """
        B, T = u_BTMD.shape[:2]
        before = self.init_state(B) if state is None else state
        x = rms_normalize(u_BTMD, self.norm, self.eps)
        x = torch.cat([before.inputs.to(x.dtype), x], 1)
        now = before.documents.new_zeros(B, T) if documents_BT is None else documents_BT
        documents = torch.cat([before.documents, now], 1)
        one_document = documents_BT is None and state is None
        # Copies: a view of the window would keep the inputs of a whole prompt alive.
        following = ConvState(x[:, T:].clone(), documents[:, T:].clone())
        return self._convolve(x, None if one_document else documents) + u_BTMD, following

    def init_state(self, batch_size: int) -> ConvState:
        """The state before the first token of `batch_size` sequences."""
        inputs = self.norm.new_zeros(batch_size, self.context, *self.norm.shape)
        return ConvState(inputs, inputs.new_full(inputs.shape[:2], NO_DOCUMENT, dtype=torch.int64))

    def _convolve(self, x: Tensor, documents: Tensor | None) -> Tensor:
        """SiLU of the convolution at all positions but the first `context` ones, for normed inputs."""
        C, weight = self.context, self.weight.to(x.dtype)
        T = x.shape[1] - C
        y = x[:, C:] * weight[-1]
        for back in range(1, len(weight)):
            past = slice(C - back * self.dilation, C - back * self.dilation + T)
            tap = x[:, past] * weight[-1 - back]
            if documents is not None:
                tap = tap * (documents[:, past] == documents[:, C:])[:, :, None, None]
            y = y + tap
        return F.silu(y)


class NoConv(nn.Module):
    """Y = u: no convolution, as in the released DeepSeek-V4.1. The interface of `ShortConv`."""

    def forward(
        self, u_BTMD: Tensor, documents_BT: Tensor | None = None, state: ConvState | None = None
    ) -> tuple[Tensor, ConvState]:
        """u itself, and a window of no positions."""
        return u_BTMD, self.init_state(len(u_BTMD))

    def init_state(self, batch_size: int) -> ConvState:
        """A window of no positions."""
        return ConvState(torch.empty(batch_size, 0, 0, 0), torch.empty(batch_size, 0, dtype=torch.int64))


def build_conv(config: MemoryConfig) -> ShortConv | NoConv:
    """The convolution that `config.conv_kernel` asks for; 0 is none."""
    if config.conv_kernel == 0:
        return NoConv()
    return ShortConv(config.branches, config.d_model, config.conv_kernel, config.dilation, config.norm_eps)
