"""EngramLM: a decoder-only language model with experts in its blocks and memory in front of some of them.

    h = embed(ids);  for each block: h = h + memory(h, ids);  h = block(h);  logits = head(norm(h))

Memory before attention as in arXiv:2601.07372, section 2; the rest is the common pre-norm decoder.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from engram.backbone.attention import positions_of
from engram.backbone.block import Block
from engram.backbone.norm import RMSNorm
from engram.config import ModelConfig
from engram.experts import MoE, RoutingStats
from engram.memory import Memory, build_memory
from engram.tensors import require_ids


@dataclass
class ModelOutput:
    """Last hidden states `[B, T, d]`, after the final norm; routing of each block with experts; gates `[B, T, M]` of
    each memory that has any, by block."""

    hidden: Tensor
    routing: list[RoutingStats]
    gates: dict[int, Tensor]


class EngramLM(nn.Module):
    """The model that a `ModelConfig` names.

    Args:
        config: what to build. Rows of 0 build no memory.
        lookup: raw id -> canonical id, int64 `[V]` (`TokenCompressor.lookup`), for the memory's hash; None hashes raw
            ids.

    Weights start as N(0, 1/fan-in), those that write to the residual stream divided by sqrt(2 n_layers), so that the
    stream's variance does not grow with depth.
    """

    def __init__(self, config: ModelConfig, lookup: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        V, D = config.vocab_size, config.d_model
        self.embed = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(D, eps=config.norm_eps)
        self.head = None if config.tied else nn.Linear(D, V, bias=False)
        self.input_memory: nn.Module | None = None
        self.memory = nn.ModuleDict()
        if config.memory is not None and config.has_memory:
            modules = build_memory(config.memory, config.n_layers, lookup)
            self.input_memory = modules.at_input
            self.memory.update({str(layer): module for layer, module in modules.at_block.items()})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw embedding and head anew; all other weights are their modules' own."""
        nn.init.normal_(self.embed.weight, std=self.config.d_model**-0.5 if self.config.tied else 1.0)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.02)

    @property
    def head_weight(self) -> Tensor:
        """Output projection `[V, d]`; the embedding itself where the two are tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def each_block(self) -> Iterable[Block]:
        """The decoder blocks, first to last."""
        return cast(Iterable[Block], self.blocks)

    def moe_layers(self) -> list[MoE]:
        """The expert layers, first block first: the order of `ModelOutput.routing`."""
        return [block.ffn for block in self.each_block() if isinstance(block.ffn, MoE)]

    def memories(self) -> dict[str, Memory]:
        """The memories: `input`, on the embedding, and by the number of the block they stand before."""
        at_input = {} if self.input_memory is None else {"input": self.input_memory}
        return cast(dict[str, Memory], at_input | dict(self.memory.items()))

    def forward(self, token_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Logits `[B, T, V]` of the next token for ids `[B, T]`.

        Where `document_ids` `[B, T]` change a new document starts, which sees nothing of the one before: not by
        attention, not by N-grams, not by convolution; an id must not come back after another one in a row. None makes
        each row one document. Raises `ConfigError` for a token id outside the vocabulary (on the CPU, in eager mode).
        """
        hidden = self.run(token_ids, document_ids).hidden
        # The head as a module: hooks that bring its weight, as accelerate's, are run when it is called.
        return F.linear(hidden, self.embed.weight) if self.head is None else self.head(hidden)

    def run(self, token_ids: Tensor, document_ids: Tensor | None = None) -> ModelOutput:
        """As `forward`, up to the head, with what routers and gates did."""
        require_ids(token_ids, self.config.vocab_size)
        positions = positions_of(token_ids, document_ids, self.config.attention)
        # Before all else: tables that lie elsewhere copy these rows while the first blocks compute.
        readings = {name: memory.look_up(token_ids, document_ids) for name, memory in self.memories().items()}
        h = self.embed(token_ids)
        if self.input_memory is not None:
            h = self.memories()["input"].add_to(h, readings["input"]).hidden
        if self.config.branches > 1:
            h = h.unsqueeze(2).expand(-1, -1, self.config.branches, -1)
        routing: list[RoutingStats] = []
        gates: dict[int, Tensor] = {}
        for layer, block in enumerate(self.each_block()):
            if str(layer) in self.memory:
                h, alpha, _ = self.memories()[str(layer)].add_to(h, readings[str(layer)])
                if alpha is not None:
                    gates[layer] = alpha
            h, stats = block(h, positions)
            if stats is not None:
                routing.append(stats)
        if self.config.branches > 1:
            h = h.mean(2)
        return ModelOutput(self.norm(h), routing, gates)
