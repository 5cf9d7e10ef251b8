"""What a checkpoint holds, told without loading it: its memory tables, and where its parameters are.

Reads the headers of safetensors files, or the table of contents of a `torch.distributed.checkpoint`, and the config.
P_tot, P_act and rho are those of arXiv:2601.07372, section 3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engram.budget import Cost, ParameterBudget
from engram.config import ConfigError, ModelConfig, require
from engram.inference.opening import find_model
from engram.interop import deepseek_v41, qwen4_exp
from engram.interop.checkpoint_files import TensorFiles
from engram.interop.layers import CONFIG, errors_name, read_config, sizes_that_fit, text_settings
from engram.parallel.checkpoint import named_errors, open_checkpoint, read_run
from engram.parallel.consolidate import model_shapes
from engram.training.weights import read_config as read_model_config


@dataclass(frozen=True)
class Table:
    """A memory table: the block it stands before (None: the embedding), its rows, those of them that no N-gram reads,
    hash heads, width and type of a row, bytes with any scales, and how many tensors it is cut into."""

    layer: int | None
    rows: int
    unread_rows: int
    heads: int
    width: int
    row_type: str
    bytes: int
    tensors: int


@dataclass(frozen=True)
class Report:
    """What `inspect` found. `parts`: parameters held, and used by a token, by what they are for."""

    path: str
    kind: str
    bytes: int
    tables: tuple[Table, ...]
    parts: dict[str, Cost]
    total: int
    active: int
    notes: tuple[str, ...]

    @property
    def sparse(self) -> int:
        """P_sparse: parameters that a token does not use."""
        return self.total - self.active

    @property
    def rho(self) -> float:
        """Share of P_sparse that routed experts hold; 1 where nothing is sparse."""
        return self.parts.get("routed_experts", Cost()).sparse / self.sparse if self.sparse else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        parts = {name: {"total": cost.total, "active": cost.active} for name, cost in self.parts.items()}
        derived = {"sparse": self.sparse, "rho": self.rho}
        return {**asdict(self), "parts": parts, **derived}

    def text(self) -> str:
        """For people to read."""
        lines = [f"{self.path}: {self.kind}, {_size(self.bytes)}"]
        for table in self.tables:
            place = "the embedding" if table.layer is None else f"block {table.layer}"
            unread = f" ({table.unread_rows} to fill up)" if table.unread_rows else ""
            lines.append(
                f"table of {place}: {table.rows:,} rows{unread} of {table.width} x {table.row_type} for {table.heads} "
                f"hash heads, {_size(table.bytes)} in {table.tensors} tensor{'s' if table.tensors > 1 else ''}"
            )
        lines += [] if self.tables else ["no memory table"]
        lines.append(f"{'part':<20} {'parameters':>19} {'active':>17} {'of all':>7}")
        all_held = sum(cost.total for cost in self.parts.values())
        lines += [
            f"{name:<20} {cost.total:>19,} {cost.active:>17,} {cost.total / all_held:>7.1%}"
            for name, cost in self.parts.items()
        ]
        lines.append(f"P_tot {self.total:,}  P_act {self.active:,}  P_sparse {self.sparse:,}  rho {self.rho:.4f}")
        return "\n".join([*lines, *self.notes])


def inspect(path: str | Path) -> Report:
    """Report on the folder of a model, run or checkpoint of engram, of Qwen4-Exp or DeepSeek-V4.1, reading no weights;
    of a run it is its `model`, or if that is not there its last checkpoint.

    Raises `ConfigError` naming the folder, file or tensor for anything else, a header that is damaged, and a table that
    is missing or of another shape than the config says.
    """
    folder = Path(path)
    require(folder.is_dir(), "path", str(path), "the folder of a model or a checkpoint")
    with errors_name(folder):
        return _inspected(folder)


def _inspected(path: Path) -> Report:
    folder = find_model(path)
    if not (folder / CONFIG).exists():
        return _checkpoint(folder)
    config = read_config(folder)
    kind = str(config.get("model_type", "")).removesuffix("_text")
    if kind in _RELEASED:
        return _released(folder, kind, _RELEASED[kind])
    require("d_model" in config, f"{str(folder / CONFIG)!r}: model_type", kind or None, _KINDS)
    return _model(folder, read_model_config(folder))


# --- our own


class _Held(NamedTuple):
    shape: tuple[int, ...]
    type_name: str
    bytes: int


def _model(folder: Path, config: ModelConfig) -> Report:
    files = TensorFiles(folder)
    stored = {name: files.stored(name) for name in files}
    held = {name: _Held(s.shape, _name(s.dtype), s.n_bytes) for name, s in stored.items()}
    return _own(folder, "engram model", config, held)


def _checkpoint(folder: Path) -> Report:
    run = read_run(folder)
    with named_errors(folder, "read"):
        config = ModelConfig.from_dict(run["model_config"])
        _, saved = open_checkpoint(folder)
        held = {
            name: _Held(tuple(shape), _name(dtype), math.prod(shape) * dtype.itemsize)
            for name, (shape, dtype) in model_shapes(saved).items()
        }
        return _own(folder, "engram checkpoint", config, held)


def _own(folder: Path, kind: str, config: ModelConfig, held: Mapping[str, _Held]) -> Report:
    tables = tuple(_own_tables(folder, config, held))
    budget = ParameterBudget.of(config)
    return Report(
        path=str(folder),
        kind=kind,
        bytes=sum(each.bytes for each in held.values()),
        tables=tables,
        parts={name: Cost(cost.total, cost.active) for name, cost in budget.breakdown.items()},
        total=budget.total,
        active=budget.active,
        notes=(
            "counts follow from the config; embedding and head are in neither P_tot nor P_act; bytes are the model's, "
            "without what an optimiser keeps",
        ),
    )


def _own_tables(folder: Path, config: ModelConfig, held: Mapping[str, _Held]) -> Iterator[Table]:
    memory = config.memory
    if memory is None or not memory.present:
        return
    alone: dict[str, tuple[int | None, ...]] = {"over_encoding": (None,), "additive_bigram": (0,)}
    places = alone.get(memory.kind, memory.layers)
    names = ["input_memory.table.weight" if place is None else f"memory.{place}.table.weight" for place in places]
    for name in names:
        if name not in held:
            raise ConfigError(f"{str(folder)!r} lacks the tensor {name}")
    sizes = sizes_that_fit(memory, {name: held[name].shape[0] for name in names}, repr(str(folder)))
    # A memory that stands alone has the first layer's heads.
    for place, name, heads in zip(places, names, sizes.values(), strict=False):
        found, wanted = held[name], (sum(heads), memory.row_width)
        require(found.shape == wanted, f"{str(folder)!r}: tensor {name}: shape", found.shape, str(wanted))
        yield Table(place, sum(heads), 0, len(heads), memory.row_width, found.type_name, found.bytes, 1)


# --- released by others


@dataclass(frozen=True)
class _Kind:
    """How a kind of checkpoint names its parts (by the first pattern that a name matches; the part "" is no parameter)
    and its settings, and what tells of its tables."""

    name: str
    parts: tuple[tuple[str, str], ...]
    defaults: dict[str, Any]
    layers: str
    n_experts: str
    top_k: str
    tables: Callable[[Path, TensorFiles], Iterator[Table]]


def _qwen_tables(folder: Path, files: TensorFiles) -> Iterator[Table]:
    checkpoint = qwen4_exp.Checkpoint(folder)
    config = checkpoint.config
    for layer, heads in checkpoint.sizes().items():
        parts = checkpoint.parts(layer, sum(heads))
        rows, n_bytes = sum(p.n_rows for p in parts), sum(files.stored(p.name).n_bytes for p in parts)
        unread = rows - sum(heads)
        yield Table(layer, rows, unread, len(heads), config.row_width, config.table_dtype, n_bytes, len(parts))


def _v41_tables(folder: Path, files: TensorFiles) -> Iterator[Table]:
    config = deepseek_v41.memory_config(folder)
    for layer, heads in deepseek_v41.sizes(files, config).items():
        name = f"layers.{layer}.engram.embed."
        values = files.expect(name + "weight", (sum(heads), config.row_width))
        row_type, n_bytes = _name(values.dtype), values.n_bytes
        if name + "scale" in files:
            scales = files.expect(name + "scale", (sum(heads), -(-config.row_width // 32)))
            row_type += f" with a {_name(scales.dtype)} scale for each 32"
            n_bytes += scales.n_bytes
        yield Table(layer, sum(heads), 0, len(heads), config.row_width, row_type, n_bytes, 1)


_OUTSIDE = ("embedding", "head", "vision", "draft")
_RELEASED = {
    qwen4_exp.KIND: _Kind(
        name="Qwen4-Exp",
        parts=(
            (r"(^|\.)mtp\.", "draft"),
            (r"(^|\.)visual\.", "vision"),
            (r"(^|\.)embed_tokens\.", "embedding"),
            (r"(^|\.)lm_head\.", "head"),
            (r"\.ngram_embedding\.", "memory_tables"),
            (r"\.ple_embedding\.", ""),  # multipliers, moduli and offsets: no parameters
            (r"\.ple\.", "memory_fusion"),
            (r"\.mlp\.experts\.", "routed_experts"),
            (r"\.shared_expert", "shared_experts"),
            (r"\.mlp\.gate\.", "router"),
            (r"\.(self|linear)_attn\.", "attention"),
            (r"hyper_connection", "hyper_connections"),
        ),
        defaults={"ple_layer_ids": None, "num_experts": 512, "num_experts_per_tok": 10},
        layers="ple_layer_ids",
        n_experts="num_experts",
        top_k="num_experts_per_tok",
        tables=_qwen_tables,
    ),
    deepseek_v41.KIND: _Kind(
        name="DeepSeek-V4.1",
        parts=(
            (r"^mtp\.", "draft"),
            (r"^(vision|aligner|image_\w+)($|\.)", "vision"),
            (r"^embed\.", "embedding"),
            (r"^head\.", "head"),
            (r"\.engram\.embed\.", "memory_tables"),
            (r"\.engram\.", "memory_fusion"),
            (r"\.ffn\.experts\.", "routed_experts"),
            (r"\.ffn\.shared_experts\.", "shared_experts"),
            (r"\.ffn\.gate\.", "router"),
            (r"\.attn\.", "attention"),
            (r"\.hc_", "hyper_connections"),
        ),
        defaults={"engram_layer_ids": [1, 14], "n_routed_experts": 384, "num_experts_per_tok": 6},
        layers="engram_layer_ids",
        n_experts="n_routed_experts",
        top_k="num_experts_per_tok",
        tables=_v41_tables,
    ),
}
_KINDS = "qwen4_exp, deepseek_v41, or none in a model of engram, which has a d_model instead"


def _released(folder: Path, model_type: str, kind: _Kind) -> Report:
    files = TensorFiles(folder)
    settings = text_settings(folder, model_type, kind.defaults)
    tables = tuple(kind.tables(folder, files)) if settings[kind.layers] else ()
    n_experts, top_k = settings[kind.n_experts], settings[kind.top_k]
    where = f"{str(folder / CONFIG)!r}: {kind.top_k}"
    require(0 < top_k <= n_experts, where, top_k, f"1 to {kind.n_experts}, {n_experts}")
    held: dict[str, int] = {}
    for name in files:
        part = next((part for pattern, part in kind.parts if re.search(pattern, name)), "other")
        if part:
            held[part] = held.get(part, 0) + _parameters(files, name)
    active = {
        **held,
        "memory_tables": sum(table.heads * table.width for table in tables),
        "routed_experts": held.get("routed_experts", 0) * top_k // n_experts,
    }
    parts = {name: Cost(count, active[name]) for name, count in sorted(held.items())}
    counted = sum((cost for name, cost in parts.items() if name not in _OUTSIDE), Cost())
    return Report(
        path=str(folder),
        kind=kind.name,
        bytes=sum(files.stored(name).n_bytes for name in files),
        tables=tables,
        parts=parts,
        total=counted.total,
        active=counted.active,
        notes=(
            f"from the headers; a token is taken to use {top_k} of {n_experts} experts of every block and a row of "
            "every hash head",
            "embedding, head, vision and draft layers are in neither P_tot nor P_act; scales of 8- and 4-bit weights "
            "are no parameters",
        ),
    )


def _parameters(files: TensorFiles, name: str) -> int:
    """How many parameters a tensor holds: none in scales, two in a byte of 4-bit weights."""
    stored = files.stored(name)
    if stored.dtype == torch.float8_e8m0fnu:
        return 0
    packed = stored.dtype in (torch.int8, torch.uint8) and name.removesuffix("weight") + "scale" in files
    return math.prod(stored.shape) * (2 if packed else 1)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(n_bytes: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000 or unit == "GB":
            break
        n_bytes /= 1000  # type: ignore[assignment]
    return f"{n_bytes:,} bytes" if unit == "bytes" else f"{n_bytes:,.1f} {unit}"
