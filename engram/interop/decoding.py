"""Memory's own past while a transformers model decodes: the last ids and the convolution's window, kept on the cache.

Whatever is done to the cache (beams reordered, rejected tokens cropped, the batch repeated, a deep copy for a shared
prompt) is done to them, by a subclass of the cache's own class that it is turned into when memory first sees it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import Cache

from engram.config import ConfigError
from engram.memory import Engram, EngramState


class Past:
    """States of all memories of a model after the tokens that a cache holds.

    Args:
        memories: by layer. Referred to weakly, so that a deep copy of a cache has no tables in it.
        batch_size: of the cache.
        slack: how many tokens can be taken back at most; the last call's tokens always can, but for a cache's first.
    """

    def __init__(self, memories: nn.ModuleDict, batch_size: int, slack: int) -> None:
        self.memories = weakref.ref(memories)
        self.least_slack = self.slack = slack
        self.seen = 0  # tokens
        self.revocable = slack
        self.states = {name: memory.init_state(batch_size, slack) for name, memory in self._live_memories().items()}

    def before(self, n: int) -> dict[str, EngramState]:
        """The states that `n` new tokens follow, wide enough to take all of them back."""
        # A first call is a prompt, long and never taken back.
        slack = max(self.least_slack, n) if self.seen else self.least_slack
        if slack != self.slack:
            self._resize(slack)
        return self.states

    def after(self, states: dict[str, EngramState], n: int) -> None:
        """Move on to the states after `n` new tokens."""
        self.states = states
        self.seen += n
        self.revocable = min(self.slack, self.revocable + n)

    def crop(self, n: int) -> None:
        """Take back the last `n` tokens of each sequence."""
        if n > self.revocable:
            raise ConfigError(
                f"tokens to take back is {n}: allowed is {self.revocable} or less; "
                "give `attach` a larger `slack`, or run the shortened text again without this cache"
            )
        self.seen -= n
        self.revocable -= n
        for name, memory in self._live_memories().items():
            state = self.states[name]
            taken = torch.full((len(state.ids.ids),), n, dtype=torch.int64, device=state.ids.ids.device)
            self.states[name] = memory.rollback(state, taken)

    def reset(self) -> None:
        """Go back to before the first token."""
        for name, memory in self._live_memories().items():
            self.states[name] = memory.init_state(len(self.states[name].ids.ids), self.slack)
        self.seen, self.revocable = 0, self.slack

    def select(self, choose: Callable[[Tensor], Tensor]) -> None:
        """Apply what changes the batch dimension to every tensor."""
        self.states = tree_map(choose, self.states)

    def _live_memories(self) -> dict[str, Engram]:
        memories = self.memories()
        if memories is None:
            raise ConfigError("a cache is used that was filled with memory attached, and the memory is gone")
        return cast(dict[str, Engram], memories)

    def _resize(self, slack: int) -> None:
        for name, memory in self._live_memories().items():
            empty = memory.init_state(len(self.states[name].ids.ids), slack)
            self.states[name] = tree_map(_put_at_end, empty, self.states[name])
        self.slack, self.revocable = slack, min(slack, self.revocable)


def _put_at_end(empty: Tensor, kept: Tensor) -> Tensor:
    """The last positions of `kept`, as many as `empty` has; before them, if there are too few, those of `empty`."""
    n = empty.shape[1] - kept.shape[1]
    return torch.cat([empty[:, :n].to(kept), kept], 1) if n > 0 else kept[:, -n:].clone()


class _Followed(Cache):
    """A cache that memory's states go along with; always the first base beside the cache's own class."""

    engram_past: Past

    def reset(self) -> None:
        super().reset()
        self.engram_past.reset()

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self.engram_past.select(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove < 0:  # as transformers counts them
            self.engram_past.crop(-tokens_to_remove)
        super().crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.engram_past.select(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.engram_past.select(lambda x: x[indices.to(x.device)])


_KINDS: dict[type, type] = {}  # of a class of caches, the one that memory's past goes along with


def past_of(cache: Any, memories: nn.ModuleDict) -> Past | None:
    """What these memories keep on a cache; None if the cache is new to them.

    Raises `ConfigError` for a cache that is no transformers `Cache`, and for one that holds other tokens than the
    memories have seen: they would read N-grams of a text that is not there.
    """
    if not isinstance(cache, Cache):
        raise ConfigError(f"cache is a {type(cache).__name__}: allowed is a transformers Cache")
    past = getattr(cache, "engram_past", None)
    if past is not None and past.memories() is not memories:
        past = None
    seen = 0 if past is None else past.seen
    try:
        held = cache.get_seq_length()
    except ValueError:  # layers of linear attention alone don't count tokens
        if not seen and cache.has_previous_state():
            raise ConfigError("cache holds tokens that the memory has not seen: fill it with memory attached") from None
        return past
    # Of a static cache it is a tensor, whose value a compiled graph doesn't know.
    if not (torch.compiler.is_compiling() and isinstance(held, Tensor)) and int(held) != seen:
        raise ConfigError(
            f"cache holds {int(held)} tokens, and the memory has seen {seen} of them: fill it with memory attached"
        )
    return past


def keep_on(cache: Cache, past: Past) -> None:
    """Let a cache carry memory's past from now on."""
    if not isinstance(cache, _Followed):
        _turn(cache)
    cache.engram_past = past  # type: ignore[attr-defined]


@torch.compiler.disable
def _turn(cache: Cache) -> None:
    own = type(cache)
    if own not in _KINDS:
        _KINDS[own] = type(own.__name__, (_Followed, own), {})
    cache.__class__ = _KINDS[own]
