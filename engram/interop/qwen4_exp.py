"""N-gram memories of Qwen4-Exp checkpoints ("per-layer embedding", PLE), read into `Engram` and written back.

Names and layout are those of transformers' `models/qwen4_exp`. Their norms hold their weights less 1, their tables are
filled up to a multiple of 128 rows that nothing reads, and cut into `split_ngram_parts` tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engram.config import ConfigError, MemoryConfig, require
from engram.interop.checkpoint_files import TensorFiles, write_rows
from engram.interop.layers import (
    CONFIG,
    chosen,
    copied,
    empty_layer,
    errors_name,
    float_rows,
    orders_up_to,
    require_fits,
    sizes_that_fit,
    text_settings,
)
from engram.memory import Engram, NgramHasher

KIND = "qwen4_exp"
# What transformers takes for settings that a config.json does not name.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 248_320,
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "rms_norm_eps": 1e-6,
    "eos_token_id": None,
    "hc_count": 4,
    "ple_layer_ids": None,
    "ple_embed_dim": 0,
    "ple_conv_kernel_size": 4,
    "ngram_size": 3,
    "heads_per_ngram": 8,
    "ngram_vocab_size_base": 20_000_000,
    "make_ngram_vocab_size_divisible_by": 128,
    "seed": 1234,
    "split_ngram_parts": 0,  # as many as there are: trainers disagree on what is meant without it
}
_FLOATS = (torch.float32, torch.bfloat16)


class Part(NamedTuple):
    """One of the tensors that a table is cut into: its name and the rows it holds."""

    name: str
    first: int
    n_rows: int


def memory_config(folder: str | Path) -> MemoryConfig:
    """The memory that a checkpoint's `config.json` describes; `table_dtype` is that of its tensors.

    Raises `ConfigError` naming the file for a model of another kind or without such a memory.
    """
    return Checkpoint(folder).config


def read_memory(folder: str | Path, layers: Collection[int] | None = None) -> dict[int, Engram]:
    """The memories of a checkpoint by the block (0-based) they stand before, of all blocks or of those in `layers`.

    Weights have the types that are stored, but for the norms, which are float32. A table is read part by part into the
    memory that holds it. The rows that fill it up are left out.

    Raises:
        ConfigError: naming file, tensor, what is found and what is expected, for a folder that is no checkpoint of
            this kind, a tensor that is missing or of another shape than the config says, or hash multipliers and sizes
            other than those that the config gives.
    """
    source = Checkpoint(folder)
    return {layer: source.read(layer) for layer in chosen(layers, source.config)}


def write_memory(memories: Mapping[int, Engram], source: str | Path, folder: str | Path) -> Path:
    """Write a copy of the checkpoint `source` to `folder`, with these memories in the places of its own.

    Names, shapes, parts and types stay those of `source`, to which values are rounded; what is unchanged stays bit for
    bit. The folder appears whole or not at all.

    Raises `ConfigError` naming the setting for a memory that is not of the config that `source` has, and as
    `read_memory` for a `source` that it would refuse.
    """
    checkpoint = Checkpoint(source)
    for layer, memory in memories.items():
        require_fits(memory, layer, checkpoint.config)
        checkpoint.require_tensors(layer)
    with copied(Path(source), Path(folder)) as draft:
        for layer, memory in memories.items():
            checkpoint.write(layer, memory, draft)
    return Path(folder)


class Checkpoint:
    """A folder's config and tensors, and how a layer's tensors lie in ours."""

    def __init__(self, folder: str | Path) -> None:
        self.settings = text_settings(folder, KIND, DEFAULTS)
        self.files = TensorFiles(folder)
        self.where = repr(str(Path(folder) / CONFIG))
        blocks = self.settings["ple_layer_ids"] or []
        numbers = isinstance(blocks, list) and blocks and all(type(block) is int and block > 0 for block in blocks)
        require(bool(numbers), f"{self.where}: ple_layer_ids", blocks, "the 1-based numbers of one block or more")
        multiple = self.settings["make_ngram_vocab_size_divisible_by"]
        require(multiple >= 1, f"{self.where}: make_ngram_vocab_size_divisible_by", multiple, "1 or more")
        with errors_name(Path(folder) / CONFIG):
            self.config = self._config(sorted(set(blocks)))

    def _config(self, blocks: list[int]) -> MemoryConfig:
        s = self.settings
        eos = s["eos_token_id"][0] if isinstance(s["eos_token_id"], list) else s["eos_token_id"]
        require(type(eos) is int, f"{self.where}: eos_token_id", eos, "an id, at which N-grams start anew")
        orders = orders_up_to(s["ngram_size"], f"{self.where}: ngram_size")
        n_heads = len(orders) * s["heads_per_ngram"]
        width = s["ple_embed_dim"] or s["hidden_size"]
        require(
            n_heads > 0 and width % n_heads == 0,
            f"{self.where}: ple_embed_dim",
            width,
            f"a multiple of the number of hash heads, {n_heads}",
        )
        embedding = self._prefix(blocks[0] - 1) + "ple_embedding.ngram_embedding."
        whole = embedding + "weight"
        table = self.files.stored(whole if whole in self.files else embedding + "shard_0.weight")
        require(table.dtype in _FLOATS, f"{str(table.path)!r}: type of {embedding}", table.dtype, str(_FLOATS))
        return MemoryConfig(
            layers=tuple(block - 1 for block in blocks),
            orders=orders,
            n_heads=s["heads_per_ngram"],
            row_width=width // n_heads,
            rows=(s["ngram_vocab_size_base"],) * len(orders),
            table_dtype="float32" if table.dtype == torch.float32 else "bfloat16",
            hash="qwen",
            seed=s["seed"],
            pad_id=eos,
            eos_id=eos,
            compress=False,
            conv_kernel=s["ple_conv_kernel_size"],
            bias=False,
            norm_eps=s["rms_norm_eps"],
            d_model=s["hidden_size"],
            vocab_size=s["vocab_size"],
            branches=s["hc_count"],
        )

    def _prefix(self, layer: int) -> str:
        """What the names of a layer's tensors begin with: models with and without a vision tower differ in it."""
        key = f"layers.{layer}.ple.key_proj.weight"
        for root in ("model.language_model.", "model.", "language_model.", ""):
            if root + key in self.files:
                return root + f"layers.{layer}.ple."
        raise ConfigError(f"{str(self.files.folder)!r} lacks the tensor {key} (also after `model.` and the like)")

    def sizes(self) -> dict[int, tuple[int, ...]]:
        """Rows of each head, by block, of tables that are there."""
        found = {
            f"the table of block {layer}": sum(
                self.files.stored(name).shape[0] for name in self._tensors_of_table(layer)
            )
            for layer in self.config.layers
        }
        return sizes_that_fit(self.config, found, repr(str(self.files.folder)))

    def _tensors_of_table(self, layer: int) -> dict[str, int]:
        """Names of the tensors that hold a table's rows, and their numbers."""
        embedding = self._prefix(layer) + "ple_embedding.ngram_embedding."
        if embedding + "weight" in self.files:
            return {embedding + "weight": 0}
        pattern = re.compile(re.escape(embedding) + r"shard_(\d+)\.weight")
        return {name: int(found[1]) for name in self.files if (found := pattern.fullmatch(name))}

    def parts(self, layer: int, n_rows: int) -> list[Part]:
        """The parts of a table of `n_rows` rows, filled up, checked for being there and of the right size."""
        multiple = self.settings["make_ngram_vocab_size_divisible_by"]
        padded = -(-n_rows // multiple) * multiple
        embedding = self._prefix(layer) + "ple_embedding.ngram_embedding."
        whole = embedding + "weight" in self.files
        n_parts = 1 if whole else self.settings["split_ngram_parts"]
        n_parts = n_parts or max(self._tensors_of_table(layer).values(), default=0) + 1
        size = -(-padded // n_parts)  # as torch.chunk cuts
        parts = []
        for i, first in enumerate(range(0, padded, size)):
            part = Part(embedding + ("weight" if whole else f"shard_{i}.weight"), first, min(size, padded - first))
            self.files.expect(part.name, (part.n_rows, self.config.row_width), getattr(torch, self.config.table_dtype))
            parts.append(part)
        return parts

    def require_tensors(self, layer: int) -> None:
        """Raise `ConfigError` unless a memory's tensors are all there, as the config says."""
        files, prefix, M, D = self.files, self._prefix(layer), self.config.branches, self.config.d_model
        with errors_name(files.folder):
            self.parts(layer, sum(self.sizes()[layer]))
            key = files.expect(prefix + "key_proj.weight", (M * D, self.config.d_memory), *_FLOATS)
            files.expect(prefix + "value_proj.weight", (D, self.config.d_memory), key.dtype)
            with_conv = ("norm_conv",) if self.config.conv_kernel else ()
            for name in ("norm_query", "norm_key", *with_conv):
                files.expect(f"{prefix}{name}.weight", (M * D,), *_FLOATS)
            if with_conv:
                files.expect(prefix + "conv1d.weight", (M * D, 1, self.config.conv_kernel), *_FLOATS)
            self._require_hash(layer, prefix + "ple_embedding.")

    def read(self, layer: int) -> Engram:
        self.require_tensors(layer)
        with errors_name(self.files.folder):
            return self._read(layer)

    def _read(self, layer: int) -> Engram:
        files, prefix = self.files, self._prefix(layer)
        memory, dtype = empty_layer(self.config, layer), files.stored(prefix + "key_proj.weight").dtype
        table = memory.table.weight
        for part in self.parts(layer, len(table)):
            files.read_into(part.name, table[part.first : part.first + part.n_rows])
        M, D = self.config.branches, self.config.d_model
        memory.project.weight = nn.Parameter(torch.empty(memory.project.weight.shape, dtype=dtype))
        files.read_into(prefix + "key_proj.weight", memory.project.weight[: M * D])
        files.read_into(prefix + "value_proj.weight", memory.project.weight[M * D :])
        for name, norm in self._norms(memory, prefix).items():
            norm.data.copy_(1 + files.read(name).float().view(M, D))
        if memory.fusion.conv_weight is not None:
            taps = files.read(prefix + "conv1d.weight")
            memory.fusion.conv_weight = nn.Parameter(taps.view(M, D, -1).permute(2, 0, 1).contiguous())
        return memory

    def write(self, layer: int, memory: Engram, folder: Path) -> None:
        files, prefix = self.files, self._prefix(layer)

        def put(name: str, values: Tensor, first_row: int = 0) -> None:
            stored = files.stored(name)
            write_rows(folder, stored, values.detach().to("cpu", stored.dtype), first_row)

        table, M, D = float_rows(memory.table), self.config.branches, self.config.d_model
        for part in self.parts(layer, len(table)):
            put(part.name, table[part.first : part.first + part.n_rows])
        put(prefix + "key_proj.weight", memory.project.weight[: M * D])
        put(prefix + "value_proj.weight", memory.project.weight[M * D :])
        for name, norm in self._norms(memory, prefix).items():
            before = files.read(name)
            ours = norm.detach().cpu().float().flatten()
            # 1 + w may have lost digits of w, so a weight that has not moved keeps its own.
            put(name, torch.where(ours == 1 + before.float(), before, (ours - 1).to(before.dtype)))
        if memory.fusion.conv_weight is not None:
            put(prefix + "conv1d.weight", memory.fusion.conv_weight.permute(1, 2, 0).reshape(M * D, 1, -1))

    def _norms(self, memory: Engram, prefix: str) -> dict[str, nn.Parameter]:
        norms = {
            "norm_query": memory.fusion.query_norm,
            "norm_key": memory.fusion.key_norm,
            "norm_conv": memory.fusion.conv_norm,
        }
        return {f"{prefix}{name}.weight": norm for name, norm in norms.items() if norm is not None}

    def _require_hash(self, layer: int, prefix: str) -> None:
        hasher, at = NgramHasher(self.config, self.config.vocab_size), self.config.layers.index(layer)
        ours = {
            "layer_multipliers": torch.tensor(hasher.multipliers[layer]),
            "ngram_heads_vocab_sizes": hasher.moduli[at],
            "ngram_heads_offsets": hasher.offsets[at],
        }
        for name, expected in ours.items():
            if prefix + name in self.files:
                found = self.files.expect(prefix + name, tuple(expected.shape), torch.int64)
                values = self.files.read(prefix + name)
                where = f"{str(found.path)!r}: tensor {prefix}{name}"
                require(torch.equal(values, expected), where, values.tolist(), f"{expected.tolist()}, from {CONFIG}")
