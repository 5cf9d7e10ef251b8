"""What decoding keeps of the past: keys and values of every block, memory states, and which positions are real.

All shapes stay as they are made, so that a compiled step is compiled once; what moves is a count of positions. A row
of the batch may begin with padding, and tokens can be taken back, as speculative decoding does with those it rejects.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from engram.backbone.positions import BlockCache, Places, angles_of, positions_of
from engram.config import GQAConfig, MLAConfig, require
from engram.memory import Memory


class DecodingState:
    """The past of `batch_size` sequences for `EngramLM.step`, which changes it in place.

    Args:
        memories: of the model, by name.
        n_layers: blocks of the model.
        batch_size, capacity: B sequences of up to S tokens, padding before them counted.
        slack: how many tokens `rollback` can take back at most.
        device: of token ids.

    Raises:
        ConfigError: a size below 1, a slack below 0.
    """

    def __init__(
        self,
        memories: Mapping[str, Memory],
        n_layers: int,
        batch_size: int,
        capacity: int,
        slack: int,
        device: torch.device,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("capacity", capacity)):
            require(value >= 1, name, value, "1 or more")
        require(slack >= 0, "slack", slack, "0 or more")
        self.capacity, self.slack = capacity, slack
        self.blocks = [BlockCache() for _ in range(n_layers)]
        self._memories = memories
        self.real = torch.zeros(batch_size, capacity, dtype=torch.bool, device=device)
        self.reset()

    def reset(self) -> None:
        """Go back to before the first token."""
        B, device = self.batch_size, self.real.device
        for block in self.blocks:
            block.tensors = ()
        self.memory: dict[str, Any] = {name: m.init_state(B, self.slack) for name, m in self._memories.items()}
        self.real = torch.zeros_like(self.real)
        self.next_position = torch.zeros(B, dtype=torch.int64, device=device)
        self.length = torch.zeros((), dtype=torch.int64, device=device)
        self._undoable = torch.zeros_like(self.length)

    @property
    def batch_size(self) -> int:
        """B."""
        return self.real.shape[0]

    def advance(self, token_ids: Tensor, document_ids: Tensor | None, attention: GQAConfig | MLAConfig) -> Places:
        """Take T new tokens `[B, T]` in, those of document -1 as padding; returns their places.

        Raises `ConfigError` for another batch size than the state's, and (on the CPU, in eager mode) for more tokens
        than there is room for.
        """
        B, T = token_ids.shape
        require(self.batch_size == B, "batch size", B, f"the state's, {self.batch_size}")
        if token_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            n = int(self.length) + T
            require(n <= self.capacity, "number of tokens", n, f"at most the state's capacity, {self.capacity}")
        now = torch.arange(T, device=token_ids.device)
        positions = (self.next_position.unsqueeze(1) + now).flatten()
        cos, sin, query_scale = angles_of(positions, attention)
        slots, slot = self.length + now, torch.arange(self.capacity, device=now.device)
        real = torch.ones_like(token_ids, dtype=torch.bool) if document_ids is None else document_ids >= 0
        self.real.index_copy_(1, slots, real)
        itself = slot == slots.unsqueeze(1)  # also padding sees something, or its softmax is of nothing
        visible = (self.real.unsqueeze(1) & (slot <= slots.unsqueeze(1))) | itself
        alone = None if self.blocks[0].tensors else positions_of(token_ids, document_ids, attention)
        self.next_position = self.next_position + T
        self.length = self.length + T
        self._undoable = (self._undoable + T).clamp(max=self.slack)
        return Places(slots, self.capacity, cos, sin, query_scale, visible.unsqueeze(1), alone)

    def rollback(self, n: int | Tensor) -> None:
        """Take the last `n` tokens back: of all sequences, or of each its own number `[B]`.

        The state is then as if they had not been seen. Raises `ConfigError` for more than the slack, less what was
        taken back since, or than a sequence has, padding not counted.
        """
        n_B = torch.as_tensor(n, device=self.length.device).expand(self.batch_size)
        least, most, undoable = int(n_B.min()), int(n_B.max()), int(self._undoable)
        worst = least if least < 0 else most
        require(0 <= worst <= undoable, "tokens to take back", worst, f"0 to {undoable}")
        too_many = (n_B > self.real.sum(1)).nonzero().flatten().tolist()
        require(not too_many, "tokens to take back", most, f"no more than sequences {too_many} have")
        from_end = self.real.flip(1).cumsum(1).flip(1)
        self.real &= from_end > n_B.unsqueeze(1)
        self.next_position = self.next_position - n_B
        # What comes next stands after the longest sequence; before it, others have slots in which nothing is any more.
        self.length = (self.real * torch.arange(1, self.capacity + 1, device=n_B.device)).amax()
        self._undoable = self._undoable - most
        for name, state in self.memory.items():
            self.memory[name] = self._memories[name].rollback(state, n_B)

    def __deepcopy__(self, memo: dict[int, Any]) -> DecodingState:
        """A state of its own, for the same model: its memories, with their tables, are not copied."""
        memo[id(self._memories)] = self._memories
        twin = object.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def select(self, rows: Tensor) -> None:
        """Keep the sequences `rows` `[B']` in this order, some of them several times, as beam search does."""
        for block in self.blocks:
            block.tensors = tuple(x[rows.to(x.device)] for x in block.tensors)
        self.memory = pytree.tree_map(lambda x: x[rows.to(x.device)], self.memory)
        self.real, self.next_position = self.real[rows], self.next_position[rows]

    def grow(self, capacity: int) -> None:
        """Make room for sequences of up to `capacity` tokens. Raises `ConfigError` for fewer than there is room for."""
        more = capacity - self.capacity
        require(more >= 0, "capacity", capacity, f"{self.capacity} or more")
        for block in self.blocks:
            block.tensors = tuple(torch.cat([x, x.new_zeros(len(x), more, *x.shape[2:])], 1) for x in block.tensors)
        self.real = F.pad(self.real, (0, more))
        self.capacity = capacity
