"""Canonical token ids -> rows of the memory table, by multiplicative XOR hashing of the last N ids.

The arithmetic is that of arXiv:2601.07372 and its demonstration code, bit for bit in int64 (family `deepseek`, also
DeepSeek-V4.1), or that of Qwen4-Exp in transformers (family `qwen`: other multipliers, a new document after each eos).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from engram.config import MemoryConfig, require
from engram.kernels import hash_ngrams, load_kernels
from engram.memory.primes import next_primes
from engram.tensors import require_ids

_INT64_MAX = 2**63 - 1
_UINT64 = 2**64 - 1
_LAYER_STRIDE = 10007
NO_DOCUMENT = -1


def table_sizes(config: MemoryConfig) -> dict[int, tuple[int, ...]]:
    """Rows of each head's table, by layer: H distinct primes, first by order, then by head.

    For each layer in turn and each order in turn, the next `n_heads` primes from `rows` of that order on that no
    earlier head has taken.
    """
    used: set[int] = set()
    reached = {base: base for base in config.rows}  # where the search from each base stands: all below are used
    sizes: dict[int, tuple[int, ...]] = {}
    for layer in config.layers:
        heads: list[int] = []
        for base in config.rows:
            primes = next_primes(reached[base], config.n_heads, used)
            used.update(primes)
            reached[base] = primes[-1] + 1
            heads += primes
        sizes[layer] = tuple(heads)
    return sizes


def deepseek_multipliers(layer: int, n_canonical: int, order: int, seed: int) -> tuple[int, ...]:
    """`order` odd multipliers of one layer (0-based block index): `2 r + 1` with r from numpy's default generator.

    The bound on r keeps `id * multiplier` below 2**63 for every id below `n_canonical`.
    """
    bound = max(1, _INT64_MAX // n_canonical // 2)
    drawn = np.random.default_rng(seed + _LAYER_STRIDE * layer).integers(0, bound, size=order, dtype=np.int64)
    return tuple(2 * int(r) + 1 for r in drawn)


def qwen_multipliers(ordinal: int, vocab_size: int, order: int, seed: int) -> tuple[int, ...]:
    """`order` odd multipliers of the memory layer number `ordinal` (0-based among memory layers), by splitmix64."""
    bound = max(1, _INT64_MAX // vocab_size // 2)
    base = seed + _LAYER_STRIDE * ordinal
    gamma = 0x9E3779B97F4A7C15
    return tuple(2 * (_splitmix64((base + gamma * (i + 1)) & _UINT64) % bound) + 1 for i in range(order))


def _splitmix64(value: int) -> int:
    """The output function of the splitmix64 generator (Steele, Lea and Flood, 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _UINT64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _UINT64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _UINT64
    return value ^ (value >> 31)


class HashState(NamedTuple):
    """What decoding keeps of the past: canonical ids and document ids of the last N-1 positions, `[B, N-1]` each, or of
    some more that can be taken back."""

    ids: Tensor
    documents: Tensor


def earlier(past: Tensor, n: Tensor, fill: int) -> Tensor:
    """The last positions `[B, P, ...]` as they were `n` `[B]` positions ago; `fill` where nothing is kept of then."""
    P = past.shape[1]
    at = torch.arange(P, device=past.device) - n.to(past.device).unsqueeze(1)
    index = at.clamp(min=0).view(*at.shape, *[1] * (past.ndim - 2)).expand(past.shape)
    kept = (at >= 0).view(*at.shape, *[1] * (past.ndim - 2))
    return torch.where(kept, past.gather(1, index), fill)


class NgramHasher(nn.Module):
    """Rows that the suffix N-grams of each position read, for every memory layer of a config.

    Positions before the start of the row, or of the position's document, count as the pad id. All heads of an order
    share one mix of multiplied ids and differ by their prime modulus alone. Each head's offset into the layer's one
    contiguous table is already added. (The rows that Qwen4-Exp adds to make that table's length a multiple of 128 are
    never read, and not counted in `n_rows`.)

    Args:
        config: names the layers, orders, heads, table sizes, hash family and seed.
        n_canonical: number of canonical ids; every id passed in lies below it.
        pad_id: canonical id of the padding; the config's, as for ids that are not compressed, if None.
        eos_id: canonical id after which family `qwen` starts a new document, and with which it pads; the config's if
            None.

    Raises:
        ConfigError: no rows, no canonical ids, a pad or eos id that is none of them; when called, a layer that is not
            in `config.layers`, or (on the CPU) an id that is not canonical; compiled code raises `ValueError` for that.
    """

    moduli: Tensor
    offsets: Tensor

    def __init__(
        self, config: MemoryConfig, n_canonical: int, pad_id: int | None = None, eos_id: int | None = None
    ) -> None:
        super().__init__()
        load_kernels()
        require(config.present, "memory.rows", config.rows, "1 or more for each order, to hash into")
        require(n_canonical >= 1, "n_canonical", n_canonical, "1 or more")
        self.n_canonical = n_canonical
        self.orders = config.orders
        self.context = config.orders[-1] - 1
        self.layers = config.layers
        self.seed = config.seed
        self.resets_at_eos = config.hash == "qwen"
        self.eos_id = config.eos_id if eos_id is None else eos_id
        self.pad_id = self.eos_id if self.resets_at_eos else config.pad_id if pad_id is None else pad_id
        padding = "eos_id" if self.resets_at_eos else "pad_id"
        require(0 <= self.pad_id < n_canonical, padding, self.pad_id, f"a canonical id, 0 to {n_canonical - 1}")
        sizes = table_sizes(config)
        self.n_rows = {layer: sum(heads) for layer, heads in sizes.items()}
        self.multipliers = {
            layer: qwen_multipliers(ordinal, n_canonical, config.orders[-1], config.seed)
            if self.resets_at_eos
            else deepseek_multipliers(layer, n_canonical, config.orders[-1], config.seed)
            for ordinal, layer in enumerate(config.layers)
        }
        self._sizes = [sizes[layer] for layer in config.layers]
        n_heads = len(self.orders) * config.n_heads
        self.register_buffer("moduli", torch.empty(len(self.layers), n_heads, dtype=torch.int64))
        self.register_buffer("offsets", torch.empty_like(self.moduli))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Write moduli and offsets, again after a module built on the meta device got its storage."""
        sizes = np.array(self._sizes, dtype=np.int64)
        offsets = np.cumsum(sizes, axis=1) - sizes
        for buffer, values in ((self.moduli, sizes), (self.offsets, offsets)):
            if not buffer.is_meta:
                buffer.copy_(torch.from_numpy(values))

    def forward(self, ids_BT: Tensor, layer: int, document_ids_BT: Tensor | None = None) -> Tensor:
        """Rows `[B, T, H]` (int64) for canonical ids `[B, T]`; a change of document id starts a new document."""
        return self._hash(ids_BT.long(), layer, document_ids_BT, 0)

    def init_state(self, batch_size: int, device: torch.device | str | None = None, slack: int = 0) -> HashState:
        """The state before the first token of `batch_size` sequences, on the buffers' device if none is named, with
        `slack` more positions than are needed, so that as many tokens can be taken back."""
        shape, device = (batch_size, self.context + slack), device or self.moduli.device
        return HashState(
            torch.full(shape, self.pad_id, dtype=torch.int64, device=device),
            torch.full(shape, NO_DOCUMENT, dtype=torch.int64, device=device),
        )

    def step(
        self, ids_BT: Tensor, layer: int, state: HashState, document_ids_BT: Tensor | None = None
    ) -> tuple[Tensor, HashState]:
        """Rows `[B, T, H]` of T new tokens that follow `state`, and the state after them; T may change between calls.

        Without document ids the new tokens all belong to document 0.
        """
        T, past, ids_BT = ids_BT.shape[1], state.ids.shape[1], ids_BT.long()
        if document_ids_BT is None:
            document_ids_BT = torch.zeros_like(ids_BT)
        ids = torch.cat([state.ids, ids_BT], dim=1)
        documents = torch.cat([state.documents, document_ids_BT.long()], dim=1)
        # Copies: views would keep the ids of a whole prompt alive.
        following = HashState(ids[:, T:].clone(), documents[:, T:].clone())
        return self._hash(ids, layer, documents, past), following

    def _hash(self, ids: Tensor, layer: int, documents: Tensor | None, past: int) -> Tensor:
        require(layer in self.layers, "layer", layer, f"one of memory.layers {self.layers}")
        try:
            return hash_ngrams(
                ids,
                documents if documents is None else documents.long(),
                self.moduli,
                self.offsets,
                ordinal=self.layers.index(layer),
                multipliers=self.multipliers[layer],
                orders=self.orders,
                past=past,
                pad_id=self.pad_id,
                eos_id=self.eos_id if self.resets_at_eos else -1,
                n_ids=self.n_canonical,
            )
        except ValueError:  # one bad id was met: name the worst
            require_ids(ids, self.n_canonical)
            raise
