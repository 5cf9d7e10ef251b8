"""Rows of N-grams: `NgramHasher` against numpy, as the demonstration code of arXiv:2601.07372 hashes.

numpy's side is the published arithmetic restated: shifted ids times multipliers, XOR, a remainder for each head,
np.stack. There the heads' offsets are added later, by the embedding; so it is timed without and with that sum.
`python benchmarks/hashing.py`
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from harness import Table, alternate, finish
from numpy.typing import NDArray

from engram import MemoryConfig
from engram.memory.hashing import NgramHasher, deepseek_multipliers, table_sizes
from engram.training.environment import prepare_process

VOCAB = 100_000
LAYER = 1
SHAPES = ((1, 1), (1, 128), (8, 512), (8, 2048))
CONFIG = MemoryConfig(layers=(LAYER,), orders=(2, 3), n_heads=8, rows=(500_000, 500_000), vocab_size=VOCAB)

Ids = NDArray[np.int64]


class NumpyHash:
    """The demonstration's way, for one layer of a config."""

    def __init__(self, config: MemoryConfig, layer: int, n_canonical: int) -> None:
        self.multipliers = deepseek_multipliers(layer, n_canonical, config.orders[-1], config.seed)
        self.orders = config.orders
        self.pad_id = config.pad_id
        sizes = np.array(table_sizes(config)[layer])
        self.moduli: list[list[int]] = sizes.reshape(len(self.orders), config.n_heads).tolist()
        self.offsets = np.cumsum(sizes) - sizes

    def __call__(self, ids_BT: Ids) -> Ids:
        """Rows `[B, T, H]` within each head's table."""
        T = ids_BT.shape[1]
        shifted = [ids_BT]
        for back in range(1, len(self.multipliers)):
            padded = np.pad(ids_BT, ((0, 0), (back, 0)), constant_values=self.pad_id)
            shifted.append(padded[:, :T])
        rows = []
        for order, moduli in zip(self.orders, self.moduli, strict=True):
            mix = shifted[0] * self.multipliers[0]
            for back in range(1, order):
                mix = np.bitwise_xor(mix, shifted[back] * self.multipliers[back])
            rows += [(mix % modulus).astype(np.int64, copy=False) for modulus in moduli]
        return np.stack(rows, axis=2)

    def with_offsets(self, ids_BT: Ids) -> Ids:
        """Rows `[B, T, H]` of the one table that holds all heads' tables."""
        return self(ids_BT) + self.offsets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two shapes and few rounds")
    arguments = parser.parse_args()
    prepare_process()
    torch.manual_seed(0)
    hasher = NgramHasher(CONFIG, VOCAB)
    peer = NumpyHash(CONFIG, LAYER, VOCAB)
    table = Table(
        "Hashing alone, int64, orders 2 and 3, 8 heads: times of numpy over ours",
        ["B", "T"],
        ["ours", "numpy", "numpy + offsets"],
    )
    for B, T in SHAPES[:: 3 if arguments.quick else 1]:
        ids = torch.randint(0, VOCAB, (B, T))
        np.testing.assert_array_equal(hasher(ids, LAYER).numpy(), peer.with_offsets(ids.numpy()))
        seconds = alternate(
            {
                "ours": lambda ids: hasher(ids, LAYER),
                "numpy": lambda ids: peer(ids.numpy()),
                "numpy + offsets": lambda ids: peer.with_offsets(ids.numpy()),
            },
            lambda B=B, T=T: torch.randint(0, VOCAB, (B, T)),
            rounds=11 if arguments.quick else 101,
        )
        table.add((B, T), seconds)
    finish("hashing", [table], arguments=vars(arguments))


if __name__ == "__main__":
    main()
