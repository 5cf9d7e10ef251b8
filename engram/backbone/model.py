"""EngramLM: a decoder-only language model with experts in its blocks and memory in front of some of them.

    h = embed(ids);  for each block: h = h + memory(h, ids);  h = block(h);  logits = head(norm(h))

Memory before attention as in arXiv:2601.07372, section 2; the rest is the common pre-norm decoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.backbone.block import Block
from engram.backbone.decoding import DecodingState
from engram.backbone.norm import RMSNorm
from engram.backbone.positions import Continuation, Positions, positions_of
from engram.config import ModelConfig
from engram.experts import MoE, RoutingStats
from engram.memory import Memory, build_memory
from engram.memory.readers import Reading, documents_of
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
        return self.logits(self.run(token_ids, document_ids).hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` of last hidden states `[..., d]`."""
        # The head as a module: hooks that bring its weight, as accelerate's, are run when it is called.
        return F.linear(hidden, self.embed.weight) if self.head is None else self.head(hidden)

    def run(self, token_ids: Tensor, document_ids: Tensor | None = None) -> ModelOutput:
        """As `forward`, up to the head, with what routers and gates did."""
        require_ids(token_ids, self.config.vocab_size)
        # Before all else: tables that lie elsewhere copy these rows while the first blocks compute.
        readings = {name: memory.look_up(token_ids, document_ids) for name, memory in self.memories().items()}
        positions = positions_of(token_ids, document_ids, self.config.attention)
        return self._through(token_ids, readings, [positions] * len(self.blocks), {})

    def init_state(self, batch_size: int, capacity: int, slack: int = 0) -> DecodingState:
        """The state before the first token of `batch_size` sequences, with room for `capacity` tokens of each.

        `slack`: how many tokens can be taken back. Raises `ConfigError` as `DecodingState` does.
        """
        device = self.embed.weight.device
        return DecodingState(self.memories(), len(self.blocks), batch_size, capacity, slack, device)

    @torch.no_grad()
    def step(self, token_ids: Tensor, state: DecodingState, padding_mask: Tensor | None = None) -> ModelOutput:
        """As `run` for T new tokens `[B, T]` that follow those of `state`, which takes them in.

        Token by token or in chunks, the outputs equal those of `run` on the whole, but for rounding.

        Args:
            padding_mask: `[B, T]`, False at padding, which may stand only before the first token of a sequence; what
                comes out there means nothing.

        Raises:
            ConfigError: a token id outside the vocabulary, another batch size than the state's, more tokens than it has
                room for (values are looked at on the CPU, in eager mode).
        """
        require_ids(token_ids, self.config.vocab_size)
        documents = documents_of(token_ids, None, padding_mask)
        places = state.advance(token_ids, documents, self.config.attention)
        readings = {
            name: memory.look_up(token_ids, None, padding_mask, state.memory[name])
            for name, memory in self.memories().items()
        }
        at = [Continuation(places, cache) for cache in state.blocks]
        return self._through(token_ids, readings, at, state.memory)

    def _through(
        self,
        token_ids: Tensor,
        readings: dict[str, Reading],
        at: Sequence[Positions | Continuation],
        states: dict[str, Any],
    ) -> ModelOutput:
        """From ids to last hidden states; `at` is for each block. `states` of memories, if any, are moved on."""
        routing: list[RoutingStats] = []
        gates: dict[int, Tensor] = {}

        def add_memory(name: str, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
            added = self.memories()[name].add_to(hidden, readings[name], states.get(name))
            if name in states:
                states[name] = added.state
            return added.hidden, added.gates

        h = self.embed(token_ids)
        if self.input_memory is not None:
            h, _ = add_memory("input", h)
        if self.config.branches > 1:
            h = h.unsqueeze(2).expand(-1, -1, self.config.branches, -1)
        for layer, block in enumerate(self.each_block()):
            if str(layer) in self.memory:
                h, alpha = add_memory(str(layer), h)
                if alpha is not None:
                    gates[layer] = alpha
            h, stats = block(h, at[layer])
            if stats is not None:
                routing.append(stats)
        if self.config.branches > 1:
            h = h.mean(2)
        return ModelOutput(self.norm(h), routing, gates)
