"""What a token asks of a machine, by arithmetic: FLOPs, and bytes that must be read, in prefill and in decoding.

FLOPs are `engram.budget`'s, two for each multiply-add of a contraction. Bytes are those of weights, rows and caches
that a pass cannot do without, each read once; activations and integers (ids, indices) are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.utils import _pytree as pytree

from engram.backbone import DecodingState, EngramLM
from engram.budget import ParameterBudget
from engram.config import GQAConfig, ModelConfig
from engram.experts.experts import Experts
from engram.memory.table import tables_in


def prefill_flops(config: ModelConfig, length: int) -> float:
    """FLOPs for each token of a prompt: attention over all `length` positions (by custom the causal half is not taken
    off), and the head for the last token alone."""
    budget = ParameterBudget.of(config, length)
    return budget.flops - budget.part("head").flops * (1 - 1 / length)


def decoding_flops(config: ModelConfig, length: int) -> int:
    """FLOPs for one token whose attention sees `length` positions, itself included.

    Latent attention does not make keys and values of what it keeps: heads are as wide as the latent instead, which the
    maps around it pay back (`MultiHeadLatentAttention.step`).
    """
    flops, a = ParameterBudget.of(config, length).flops, config.attention
    if isinstance(a, GQAConfig):
        return flops
    expanded, latent = a.qk_nope_head_dim + a.v_head_dim, 2 * a.kv_lora_rank
    return flops + config.n_layers * 2 * length * a.n_heads * (latent - expanded)


@dataclass(frozen=True)
class Bytes:
    """Bytes that a pass over a batch must read of a kind each: weights (once for all its tokens), rows of embedding and
    memory tables, and what is kept of earlier tokens."""

    weights: float
    rows: float
    cache: float

    def __truediv__(self, tokens: float) -> Bytes:
        return Bytes(self.weights / tokens, self.rows / tokens, self.cache / tokens)

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.rows + self.cache


def bytes_read(
    model: EngramLM, tokens: int, experts: float, kept: float = 0, state: DecodingState | None = None
) -> Bytes:
    """What one pass over `tokens`, of all sequences together, reads.

    Args:
        experts: distinct experts that the tokens use, summed over expert layers.
        kept: earlier positions of each sequence that the tokens see, in the caches of `state`.
    """
    numbers, tables = ParameterBudget.of(model.config).part("memory_tables").active, tables_in(model)
    rows = numbers * tables[0][-1].weight.itemsize if tables else 0
    apart = {id(table.weight) for *_, table in tables}
    one_expert = 0
    for layer in model.modules():
        if isinstance(layer, Experts):
            one_expert = sum(weight[0].nbytes for weight in layer.parameters())
            apart.update(map(id, layer.parameters()))
    if model.head is not None:  # else the head reads all of it
        apart.add(id(model.embed.weight))
        rows += model.embed.weight[0].nbytes
    weights = sum(weight.nbytes for weight in model.parameters() if id(weight) not in apart)
    cache = 0.0
    if state is not None:
        cache = sum(x[:, 0].nbytes * kept for block in state.blocks for x in block.tensors)
        cache += sum(x.nbytes for x in pytree.tree_leaves(state.memory) if x.is_floating_point())
    return Bytes(weights + one_expert * experts, rows * tokens, cache)
