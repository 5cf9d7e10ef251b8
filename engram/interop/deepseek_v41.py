"""N-gram memories of DeepSeek-V4.1 checkpoints, read into `Engram` and written back.

Names and layout are those of the released DeepSeek-V4.1-Flash: orders 2 to 4, ids compressed, one fused projection, no
convolution, no biases; tables and projections in 8 bits with block scales (`block_scales.py`), or in bfloat16 as
trainers save them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from engram.config import ConfigError, MemoryConfig, require
from engram.interop.block_scales import decode, encode
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
from engram.memory import Engram, MemoryTable, ReadOnlyTable, TokenCompressor
from engram.memory.microscaling import BLOCK
from engram.memory.row_formats import BlockFloat8Rows

KIND = "deepseek_v41"
# The settings of DeepSeek-V4.1-Flash.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 129_280,
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "rms_norm_eps": 1e-20,
    "hc_mult": 4,
    "engram_layer_ids": [1, 14],
    "engram_num_embeddings": None,
    "engram_max_ngram_size": 4,
    "engram_vocab_size": 16_000_000,
    "engram_n_heads": 8,
    "engram_head_dim": 256,
    "engram_pad_token_id": 2,
    "engram_compressed_vocab_size": 99_092,
}
_FLOATS = (torch.float32, torch.bfloat16)
_CHUNK = 2**16  # rows of a table, a multiple of the block


def memory_config(folder: str | Path, table_dtype: torch.dtype = torch.bfloat16) -> MemoryConfig:
    """The memory that a checkpoint's `config.json` describes.

    Raises `ConfigError` naming the file for a model of another kind or without such a memory.
    """
    return _config(folder, table_dtype)


def token_lookup(folder: str | Path) -> Tensor:
    """Raw id -> canonical id, int64 `[V]`, by the checkpoint's own `tokenizer.json`.

    Ids of the model's vocabulary that the tokenizer has no token for become the pad id: they never occur.

    Raises `ConfigError` naming the file if it can't be read, or has another number of canonical ids than the config,
    on which all rows depend.
    """
    path = Path(folder) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # of no narrower type in tokenizers
        raise ConfigError(f"{str(path)!r} can't be read as a tokenizer: {error}") from error
    settings = _settings(folder)
    compressor, wanted = TokenCompressor.from_tokenizer(tokenizer), settings["engram_compressed_vocab_size"]
    where = f"{str(path)!r}: canonical ids"
    require(compressor.n_canonical == wanted, where, compressor.n_canonical, f"{wanted}, from {CONFIG}")
    lookup, size, pad = compressor.lookup, settings["vocab_size"], settings["engram_pad_token_id"]
    require(len(lookup) <= size, f"{str(path)!r}: tokens", len(lookup), f"up to {size}, the vocab_size of {CONFIG}")
    require(0 <= pad < len(lookup), "engram_pad_token_id", pad, f"a token of {str(path)!r}")
    return torch.cat([lookup, lookup[pad].expand(size - len(lookup))])


def read_memory(
    folder: str | Path,
    layers: Collection[int] | None = None,
    lookup: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    packed: bool = False,
) -> dict[int, Engram]:
    """The memories of a checkpoint by the block (0-based) they stand before, of all blocks or of those in `layers`.

    Tables and projections become `dtype`, bfloat16 or float32, which hold what is stored exactly; norms keep their
    type. A table is read piece by piece into the memory that holds it.

    Args:
        packed: keep tables in the 8 bits and the scales that are stored, about half of bfloat16's memory: each is a
            `ReadOnlyTable`, frozen, which may go to the host or to disk.
        folder: with `config.json`, safetensors and, unless `lookup` is given, `tokenizer.json`.
        lookup: raw id -> canonical id, int64 `[V]`; `token_lookup(folder)` if None.

    Raises:
        ConfigError: naming file, tensor, what is found and what is expected, for a folder that is no checkpoint of
            this kind, a tokenizer of another number of canonical ids, or a tensor that is missing or of another shape
            than the config says.
    """
    require(dtype in _FLOATS, "dtype", dtype, " or ".join(map(str, _FLOATS)))
    config, files = _config(folder, dtype), TensorFiles(folder)
    if lookup is None:
        lookup = token_lookup(folder)
    else:
        ids = lookup.numel() > 0 and int(lookup.min()) >= 0
        require(ids, "lookup", tuple(lookup.shape), "canonical ids of 0 or more")
    _require_canonical(int(lookup.max()) + 1, folder)
    wanted = chosen(layers, config)
    with errors_name(files.folder):
        return {layer: _read(files, config, layer, lookup, dtype, packed) for layer in wanted}


def write_memory(memories: Mapping[int, Engram], source: str | Path, folder: str | Path) -> Path:
    """Write a copy of the checkpoint `source` to `folder`, with these memories in the places of its own.

    Names, shapes and types stay those of `source`, to which values are rounded. What is unchanged stays bit for bit,
    by block of 32 values (of 32 x 32 in projections). Tables may lie on the host or on disk. The folder appears whole
    or not at all.

    Raises `ConfigError` naming the setting for a memory that is not of the config that `source` has or whose rows are
    quantized otherwise, and as `read_memory` for a `source` that it would refuse.
    """
    config, files = _config(source, torch.bfloat16), TensorFiles(source)
    for layer, memory in memories.items():
        require_fits(memory, layer, config, ("float", BlockFloat8Rows.kind))
        _require_canonical(memory.reader.hasher.n_canonical, source)
        _require_tensors(files, config, layer, _is_packed(memory.table))
    with copied(Path(source), Path(folder)) as draft:
        for layer, memory in memories.items():
            prefix = f"layers.{layer}.engram."
            if _is_packed(memory.table):
                _write_records(files, draft, prefix + "embed", memory.table.records, config.row_width)
            else:
                _write_matrix(files, draft, prefix + "embed", float_rows(memory.table), 1)
            _write_matrix(files, draft, prefix + "wkv", memory.project.weight.detach(), BLOCK)
            for name, norm in _norms(memory, prefix).items():
                stored = files.stored(name)
                write_rows(draft, stored, norm.detach().to("cpu", stored.dtype))
    return Path(folder)


def _settings(folder: str | Path) -> dict[str, Any]:
    return text_settings(folder, KIND, DEFAULTS)


def _config(folder: str | Path, table_dtype: torch.dtype) -> MemoryConfig:
    s, where = _settings(folder), repr(str(Path(folder) / CONFIG))
    blocks = s["engram_layer_ids"]
    numbers = isinstance(blocks, list) and blocks and all(type(block) is int for block in blocks)
    require(bool(numbers), f"{where}: engram_layer_ids", blocks, "the numbers of one block or more")
    orders = orders_up_to(s["engram_max_ngram_size"], f"{where}: engram_max_ngram_size")
    with errors_name(Path(folder) / CONFIG):
        return MemoryConfig(
            layers=tuple(blocks),
            orders=orders,
            n_heads=s["engram_n_heads"],
            row_width=s["engram_head_dim"],
            rows=(s["engram_vocab_size"],) * len(orders),
            table_dtype="float32" if table_dtype == torch.float32 else "bfloat16",
            seed=0,
            pad_id=s["engram_pad_token_id"],
            conv_kernel=0,
            bias=False,
            norm_eps=s["rms_norm_eps"],
            d_model=s["hidden_size"],
            vocab_size=s["vocab_size"],
            branches=s["hc_mult"],
        )


def sizes(files: TensorFiles, config: MemoryConfig) -> dict[int, tuple[int, ...]]:
    """Rows of each head, by block, of tables that are there."""
    with errors_name(files.folder):
        names = [f"layers.{layer}.engram.embed.weight" for layer in config.layers]
        found = {name: files.stored(name).shape[0] for name in names}
        return sizes_that_fit(config, found, repr(str(files.folder)))


def _require_canonical(n_canonical: int, folder: str | Path) -> None:
    """All rows depend on this number, by the hash's multipliers."""
    wanted = _settings(folder)["engram_compressed_vocab_size"]
    require(n_canonical == wanted, "canonical ids of lookup", n_canonical, f"{wanted}, from {CONFIG}")


def _read(
    files: TensorFiles, config: MemoryConfig, layer: int, lookup: Tensor, dtype: torch.dtype, packed: bool
) -> Engram:
    _require_tensors(files, config, layer, packed)
    memory, prefix = empty_layer(config, layer, lookup), f"layers.{layer}.engram."
    if packed:
        fmt = BlockFloat8Rows(config.row_width, dtype)
        memory.table = ReadOnlyTable(_records(files, prefix + "embed", fmt), fmt).requires_grad_(False)
    else:
        _read_matrix(files, prefix + "embed", memory.table.weight, 1)
    memory.project.weight = nn.Parameter(memory.project.weight.to(dtype))
    _read_matrix(files, prefix + "wkv", memory.project.weight, BLOCK)
    for name, norm in _norms(memory, prefix).items():
        norm.data = files.read(name)
    return memory


def _require_tensors(files: TensorFiles, config: MemoryConfig, layer: int, packed: bool) -> None:
    """Raise `ConfigError` unless a memory's tensors are all there, as the config says, and in 8 bits if `packed`."""
    prefix, n_rows = f"layers.{layer}.engram.", sum(sizes(files, config)[layer])
    with errors_name(files.folder):
        _require_rows(files, layer, n_rows)
        if packed:
            files.expect(prefix + "embed.weight", (n_rows, config.row_width), torch.float8_e4m3fn)
        M, D = config.branches, config.d_model
        shapes = {"embed": (n_rows, config.row_width, 1), "wkv": ((M + 1) * D, config.d_memory, BLOCK)}
        for name, (R, C, block_rows) in shapes.items():
            if _is_scaled(files, prefix + name):
                files.expect(f"{prefix}{name}.weight", (R, C))
                scales = (-(-R // block_rows), -(-C // BLOCK))
                files.expect(f"{prefix}{name}.scale", scales, torch.float8_e8m0fnu)
            else:
                files.expect(f"{prefix}{name}.weight", (R, C), *_FLOATS)
        for name in ("q_weight", "k_weight"):
            files.expect(prefix + name, (M, D), *_FLOATS)


def _require_rows(files: TensorFiles, layer: int, n_rows: int) -> None:
    """The config's own count of rows, if it has one, must be that of the hash heads."""
    s = _settings(files.folder)
    if s["engram_num_embeddings"] is not None:
        counts = dict(zip(s["engram_layer_ids"], s["engram_num_embeddings"], strict=False))
        where = f"{str(files.folder / CONFIG)!r}: engram_num_embeddings of block {layer}"
        require(counts.get(layer) == n_rows, where, counts.get(layer), f"{n_rows}, the sum of its hash heads' primes")


def _norms(memory: Engram, prefix: str) -> dict[str, nn.Parameter]:
    return {prefix + "q_weight": memory.fusion.query_norm, prefix + "k_weight": memory.fusion.key_norm}


def _scaled_chunks(files: TensorFiles, name: str, block_rows: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """First row, values and scales of a matrix's pieces, of whole blocks each."""
    scales = files.chunks(name + ".scale", _CHUNK // block_rows)
    for (first, values), (_, scale) in zip(files.chunks(name + ".weight", _CHUNK), scales, strict=True):
        yield first, values, scale


def _records(files: TensorFiles, name: str, fmt: BlockFloat8Rows) -> Tensor:
    """Values and scales of each row side by side."""
    records = torch.empty(files.stored(name + ".weight").shape[0], fmt.row_bytes, dtype=torch.uint8)
    for first, values, scales in _scaled_chunks(files, name, 1):
        torch.cat([values.view(torch.uint8), scales.view(torch.uint8)], 1, out=records[first : first + len(values)])
    return records


def _is_packed(table: MemoryTable) -> TypeGuard[ReadOnlyTable]:
    return isinstance(table, ReadOnlyTable) and isinstance(table.format, BlockFloat8Rows)


def _is_scaled(files: TensorFiles, name: str) -> bool:
    return files.stored(name + ".weight").dtype == torch.float8_e4m3fn


def _read_matrix(files: TensorFiles, name: str, out: nn.Parameter, block_rows: int) -> None:
    if _is_scaled(files, name):
        for first, values, scales in _scaled_chunks(files, name, block_rows):
            out.data[first : first + len(values)] = decode(values, scales, block_rows)
        return
    for first, values in files.chunks(name + ".weight"):
        out.data[first : first + len(values)] = values


def _write_records(files: TensorFiles, folder: Path, name: str, records: Tensor, width: int) -> None:
    values = files.stored(name + ".weight")
    scales = files.stored(name + ".scale")
    for first in range(0, len(records), _CHUNK):
        piece = records[first : first + _CHUNK].cpu()
        write_rows(folder, values, piece[:, :width].contiguous().view(torch.float8_e4m3fn), first)
        write_rows(folder, scales, piece[:, width:].contiguous().view(torch.float8_e8m0fnu), first)


def _write_matrix(files: TensorFiles, folder: Path, name: str, new: Tensor, block_rows: int) -> None:
    stored = files.stored(name + ".weight")
    if _is_scaled(files, name):
        for first, values, scales in _scaled_chunks(files, name, block_rows):
            piece = new[first : first + len(values)].cpu()
            values, scales = encode(piece, values, scales, block_rows)
            write_rows(folder, stored, values, first)
            write_rows(folder, files.stored(name + ".scale"), scales, first // block_rows)
        return
    for first in range(0, len(new), _CHUNK):
        write_rows(folder, stored, new[first : first + _CHUNK].to("cpu", stored.dtype), first)
