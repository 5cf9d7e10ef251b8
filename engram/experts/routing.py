"""Which experts a token goes to, with what weights, and how loads are kept even.

Scores and normalised top-k weights as in DeepSeekMoE (arXiv:2401.06066, equations 9-11); balancing by a selection bias
(arXiv:2408.15664, algorithm 1) or by the sequence-wise auxiliary loss of DeepSeek-V3 (arXiv:2412.19437, 17-20).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from engram.config import MoEConfig
from engram.kernels import load_kernels, route, router_logits, scores_of
from engram.tensors import product_type


class RoutingStats(NamedTuple):
    """What a forward pass did, for logs and balancing.

    load_E: tokens that each expert got (int64). entropy: of the normalised scores, mean over tokens, nats.
    aux_loss: to be added to the training loss, already weighted; 0 unless `balance` is `sequence_aux`. dropped: tokens
    that an expert refused, which is none by construction.
    """

    load_E: Tensor
    entropy: Tensor
    aux_loss: Tensor
    dropped: int = 0


class Router(nn.Module):
    """Scores of all experts in float32, top-k of them with their weights."""

    bias: Tensor

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        load_kernels()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.d_model))
        self.register_buffer("bias", torch.empty(config.n_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew; the bias is zero."""
        nn.init.normal_(self.weight, std=self.config.d_model**-0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, RoutingStats]:
        """Hidden states `[B, T, d]` -> experts `[B, T, K]` (int64), their weights `[B, T, K]` and the statistics."""
        config = self.config
        low = product_type(x_BTD) == torch.bfloat16
        with torch.autocast(x_BTD.device.type, enabled=False):
            logits = router_logits(x_BTD.flatten(0, 1), self.weight, low)
        sigmoid = config.score == "sigmoid"
        routed = route(
            logits,
            self.bias,
            config.top_k,
            sigmoid=sigmoid,
            normalize=config.normalize,
            scale=config.route_scale,
        )
        experts, weights = (x.view(*x_BTD.shape[:2], config.top_k) for x in (routed.experts, routed.weights))
        aux = logits.new_zeros(())
        if config.balance == "sequence_aux":
            scores = scores_of(logits, sigmoid).view(*x_BTD.shape[:2], -1)
            aux = sequence_aux_loss(scores / scores.sum(-1, keepdim=True), experts) * config.aux_weight
        return experts, weights, RoutingStats(routed.load, routed.entropy, aux)

    @torch.no_grad()
    def update_balance(self, load_E: Tensor) -> None:
        """Move the bias of each expert a fixed step against its load error; does nothing unless `balance` is `bias`."""
        if self.config.balance == "bias":
            self.bias += self.config.bias_step * torch.sign(load_E.sum() - load_E * len(load_E))


def _count(experts_BS: Tensor, n_experts: int) -> Tensor:
    """How often each row holds each expert, `[B, S]` -> `[B, E]`; unlike bincount it never waits for a GPU."""
    zeros_BE = experts_BS.new_zeros(len(experts_BS), n_experts)
    return zeros_BE.scatter_add_(1, experts_BS, torch.ones_like(experts_BS))


def sequence_aux_loss(share_BTE: Tensor, experts_BTK: Tensor) -> Tensor:
    """Mean over sequences of sum_e f_e P_e: share of choices times E, and mean share of scores, of each expert.

    1 when loads are even, E / K at most. Arguments: scores that sum to 1 `[B, T, E]`, chosen experts `[B, T, K]`.
    """
    (_, T, E), K = share_BTE.shape, experts_BTK.shape[-1]
    return (_count(experts_BTK.flatten(1), E) * share_BTE.mean(1)).sum(-1).mean() * (E / (K * T))
