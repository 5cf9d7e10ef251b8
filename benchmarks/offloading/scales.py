"""The sizes at which tables off the device are compared: a model, its table, and what is asked of it."""

from __future__ import annotations

from dataclasses import dataclass

from engram import GQAConfig, MemoryConfig, ModelConfig


@dataclass(frozen=True)
class Scale:
    """A model, the rows of its table, and what is asked of it."""

    model: ModelConfig
    n_prompts: int
    lengths: tuple[int, int]
    new_tokens: int
    batch: int
    cache_rows: int
    count_tokens: int  # text by which caches are filled
    rounds: int
    disk_rows: int = 0  # of a table beyond memory, for each head; 0 for none
    beside: int = 2**30  # bytes that a device needs beside the weights and a table

    @property
    def each_round(self) -> int:
        """How many tokens a round takes at most."""
        return self.n_prompts * (self.lengths[1] + self.new_tokens)


def scaled(
    vocab: int, d: int, layers: int, heads: tuple[int, int, int], width: int, row_width: int, rows: int, at: int
) -> ModelConfig:
    """A dense model with memory before block `at`, of `rows` rows for each of 8 heads of two orders."""
    memory = MemoryConfig(layers=(at,), rows=(rows, rows), row_width=row_width, table_dtype="bfloat16")
    return ModelConfig(
        vocab_size=vocab, d_model=d, n_layers=layers, n_dense_layers=layers, dense_width=width, tied=True,
        attention=GQAConfig(n_heads=heads[0], n_kv_heads=heads[1], head_dim=heads[2]), memory=memory,
    )  # fmt: skip


SCALES = {
    "toy": Scale(
        model=scaled(2048, 64, 4, (2, 1, 32), 128, 16, 10_000, 2),
        n_prompts=6, lengths=(10, 60), new_tokens=4, batch=3, cache_rows=2000, count_tokens=20_000, rounds=2,
        disk_rows=200_000,
    ),
    "cpu": Scale(
        model=scaled(16384, 512, 12, (8, 4, 64), 1408, 64, 1_000_000, 2),
        n_prompts=4, lengths=(100, 1024), new_tokens=40, batch=4, cache_rows=160_000, count_tokens=1_000_000, rounds=5,
        disk_rows=117_500_000,
    ),
    # The shapes of Qwen3-4B, and 40e9 parameters of memory.
    "h200": Scale(
        model=scaled(151936, 2560, 36, (32, 8, 128), 9728, 80, 31_300_000, 2),
        n_prompts=512, lengths=(100, 1024), new_tokens=32, batch=64, cache_rows=4_000_000, count_tokens=2_000_000,
        rounds=3, beside=2**35,
    ),
}  # fmt: skip
