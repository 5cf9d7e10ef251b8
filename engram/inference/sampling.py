"""How the next token is drawn from its logits: the usual settings, in the usual order.

Repetition penalty (arXiv:1909.05858), temperature, top-k, top-p (arXiv:1904.09751), min-p (arXiv:2407.01082); each cuts
what the one before has left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engram.config import require


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of the draw; as they stand, from the model's own distribution.

    temperature: divides logits; 0 takes the most likely token. top_k: only the k most likely, 0 for all. top_p: only
    the most likely ones that together have at least this probability. min_p: only those with at least this share of the
    most likely one's probability. repetition_penalty: logits of tokens that have occurred are divided by it where
    positive, multiplied where negative; 1 for none.

    Raises:
        ConfigError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        allowed = self.temperature == 0 or 1e-6 <= self.temperature < math.inf
        require(allowed, "temperature", self.temperature, "0, or 1e-6 or more")
        require(self.top_k >= 0, "top_k", self.top_k, "1 or more (0: all)")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0, to 1")
        require(0 <= self.min_p <= 1, "min_p", self.min_p, "0 to 1")
        allowed = 1e-6 <= self.repetition_penalty <= 1e6
        require(allowed, "repetition_penalty", self.repetition_penalty, "1e-6 to 1e6")

    def draw(self, logits: Tensor, occurred: Tensor, numbers: Tensor | None = None) -> Tensor:
        """Tokens `[B]` drawn from logits `[B, V]`; `occurred` `[B, V]` says which ids came before.

        `numbers` `[B]`, uniform in [0, 1), decide each draw; new ones if None.
        """
        logits = logits.float()
        if self.repetition_penalty != 1:
            penalized = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(occurred, penalized, logits)
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits - logits.amax(-1, keepdim=True)  # so that none overflows, however small the temperature
        kept = self._cut(logits / self.temperature)
        below = kept.softmax(-1).double().cumsum(-1)  # probability of a token and those before it
        if numbers is None:
            numbers = torch.rand(len(logits), dtype=torch.float64, device=logits.device)
        # Of the whole as rounded, so that a number below 1 never leads beyond it.
        return torch.searchsorted(below, numbers.unsqueeze(-1) * below[:, -1:], right=True).squeeze(-1)

    def _cut(self, logits: Tensor) -> Tensor:
        """Logits with -inf for what is not drawn."""
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p < 1:
            ordered, order = logits.softmax(-1).sort(descending=True)
            unneeded = ordered.cumsum(-1) - ordered >= self.top_p  # those before suffice
            logits = logits.masked_fill(unneeded.gather(-1, order.argsort(-1)), -torch.inf)
        if self.min_p > 0:
            probability = logits.softmax(-1)
            least = self.min_p * probability.amax(-1, keepdim=True)
            logits = logits.masked_fill(probability < least, -torch.inf)
        return logits
