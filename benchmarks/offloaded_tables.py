"""Serving with memory tables off the device: prefill and decoding with the table on the device, the host and on disk.

One model serves the same prompts in turn with each table in its place: prompts of U(100, 1024) tokens are taken in by
batches, sorted by length, then each is continued for some tokens, one by one, as a text goes on (no sampling), all with
the state of decoding. Ids are those of this Python environment's source files in a BPE trained on them, or (`--ids
zipf`) drawn one by one by Zipf's law, which makes rarer N-grams than text has. "No memory" is the same backbone without
the layer.

On disk a table is measured `in memory`, all of its pages cached by the system, and `cold`, when before every batch the
system has forgotten the file. A table beyond memory is a sparse file: it has the size, and real data in every page that
is read here; all other pages are holes, which would cost no trip to the disk and are never read. Caches have seen other
text than what is measured. With `prefetch` off, rows are fetched when the memory layer asks for them.

    python benchmarks/offloaded_tables.py                        # scale `cpu`: tables of 2 GB, and on disk of 240 GB
    python benchmarks/offloaded_tables.py --scale toy --device cuda
    python benchmarks/offloaded_tables.py --device cuda --ids zipf   # scale `h200`: 4B backbone, 80 GB pinned
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import mmap
import os
import shutil
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import hardware, store
from torch import Tensor, nn

from engram import EngramLM, GQAConfig, MemoryConfig, ModelConfig
from engram.backbone.initialize import materialize
from engram.kernels import gather_mapped, gather_rows
from engram.memory import DiskTable, Engram, HostTable, MemoryTable, OffloadedTable, ReadOnlyTable
from engram.memory.row_formats import FloatRows
from engram.training.environment import prepare_process

PAGE = mmap.PAGESIZE


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
    # The shapes of Qwen3-4B.
    "h200": Scale(
        model=scaled(151936, 2560, 36, (32, 8, 128), 9728, 80, 31_300_000, 2),
        n_prompts=512, lengths=(100, 1024), new_tokens=32, batch=64, cache_rows=4_000_000, count_tokens=2_000_000,
        rounds=2,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """Prompts, padded on their left (False in the mask), and the ids that follow, `[B, T]`."""

    ids: Tensor
    mask: Tensor
    following: Tensor

    def to(self, device: torch.device) -> Batch:
        """On a device."""
        return Batch(self.ids.to(device), self.mask.to(device), self.following.to(device))


@dataclass
class Result:
    """Of one side: tokens a second in each round, and what its table did in all of them."""

    prefill: list[float]
    decode: list[float]
    total: list[float]
    lookups: int = 0
    hit_rate: float = 0.0
    bytes_per_token: float = 0.0
    wait_share: float = 0.0  # of the time, spent waiting for rows


class Words:
    """A stream of token ids, of which each draw is a piece not given before."""

    def __init__(self, ids: Tensor) -> None:
        self.ids, self.at = ids, 0

    def take(self, n: int) -> Tensor:
        """The next `n` ids."""
        if self.at + n > len(self.ids):
            raise SystemExit(f"{len(self.ids)} ids are too few")
        self.at += n
        return self.ids[self.at - n : self.at]


def text_ids(vocab: int, n: int) -> Tensor:
    """At least `n` ids of Python source files, in an order drawn by seed, in a BPE trained on some of them."""
    from engram.training.tokenizer import train_bpe

    paths = sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py"))
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0)).tolist()
    texts = (paths[i].read_text(encoding="utf-8", errors="replace") for i in order)
    some = [text for _, text in zip(range(600), texts, strict=False)]
    tokenizer = train_bpe(iter(some), vocab)
    ids: list[int] = []
    while len(ids) < n:
        ids.extend(tokenizer.encode(next(texts), add_special_tokens=False).ids)
    return torch.tensor(ids)


def zipf_ids(vocab: int, n: int) -> Tensor:
    """`n` ids, the one of rank r with a chance in proportion to 1 / r."""
    weights = 1 / torch.arange(1.0, vocab + 1)
    generator = torch.Generator().manual_seed(0)
    rank = torch.searchsorted(weights.cumsum(0) / weights.sum(), torch.rand(n, generator=generator)).clamp_max(
        vocab - 1
    )
    return torch.randperm(vocab, generator=generator)[rank]


def draw(scale: Scale, words: Words) -> list[Batch]:
    """One round's prompts, shortest first."""
    low, high = scale.lengths
    lengths = torch.randint(low, high + 1, (scale.n_prompts,)).sort().values.tolist()
    batches = []
    for start in range(0, len(lengths), scale.batch):
        part = lengths[start : start + scale.batch]
        longest = max(part)
        ids = torch.stack([nn.functional.pad(words.take(n), (longest - n, 0)) for n in part])
        mask = torch.arange(longest) >= longest - torch.tensor(part).unsqueeze(1)
        batches.append(Batch(ids, mask, torch.stack([words.take(scale.new_tokens) for _ in part])))
    return batches


def finished(device: torch.device) -> float:
    """The time when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def serve(model: EngramLM, batch: Batch, device: torch.device) -> tuple[float, float]:
    """Seconds to take prompts in, and to continue them."""
    B, T = batch.ids.shape
    start = finished(device)
    state = model.init_state(B, T + batch.following.shape[1])
    model.logits(model.step(batch.ids, state, None if bool(batch.mask.all()) else batch.mask).hidden[:, -1])
    middle = finished(device)
    for t in range(batch.following.shape[1]):
        model.logits(model.step(batch.following[:, t : t + 1], state).hidden[:, -1])
    return middle - start, finished(device) - middle


def forget(tables: Sequence[DiskTable]) -> None:
    """Let the system drop what it holds of a file: from this process, which has it mapped for each table, and all."""
    libc, dont_need = ctypes.CDLL(None, use_errno=True), 4
    for table in tables:
        address = table.records.data_ptr()
        first = address // PAGE * PAGE
        size = address + table.records.numel() - first
        if libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), dont_need):
            raise OSError(ctypes.get_errno(), "madvise")
    with tables[0].path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def recall(tables: Sequence[DiskTable]) -> None:
    """Read a file, so that the system holds all of it."""
    with tables[0].path.open("rb", buffering=0) as file:
        buffer = bytearray(2**24)
        while file.readinto(buffer):
            pass


@dataclass
class Side:
    """A way to keep the table: what is put in its place, and what is done, untimed, before each batch."""

    table: MemoryTable | None
    before: Callable[[], None] = lambda: None


def compare(
    title: str, model: EngramLM, sides: dict[str, Side], rounds: list[list[Batch]], device: torch.device
) -> dict[str, Any]:
    """Serve the same prompts with each side in turn, in rounds of which the first warms up.

    Prints medians over the rounds, of the rates and of their ratios to the first side's in the same round.
    """
    memories = model.memory
    (name,) = list(memories)
    results = {side: Result([], [], []) for side in sides}
    spent, n_tokens = dict.fromkeys(sides, 0.0), 0
    for number, drawn in enumerate(rounds):
        n_prompt = sum(int(batch.mask.sum()) for batch in drawn)
        n_new = sum(batch.following.numel() for batch in drawn)
        n_tokens += (n_prompt + n_new) * (number > 0)
        for side_name, side in sides.items():
            model.memory = memories if side.table is not None else nn.ModuleDict()
            if side.table is not None:
                memories.get_submodule(name).table = side.table
            if number == 1 and isinstance(side.table, OffloadedTable):
                side.table.reset_stats()
            prefill = decode = 0.0
            for batch in drawn:
                side.before()
                seconds = serve(model, batch.to(device), device)
                prefill, decode = prefill + seconds[0], decode + seconds[1]
            if number > 0:
                result = results[side_name]
                result.prefill.append(n_prompt / prefill)
                result.decode.append(n_new / decode)
                result.total.append((n_prompt + n_new) / (prefill + decode))
                spent[side_name] += prefill + decode
            print(f"  {number}: {side_name}: {n_prompt / prefill:.0f} and {n_new / decode:.0f} tokens/s", flush=True)
    model.memory = memories
    print(f"\n{title}: tokens/s, against no memory\n{'':34} {'prefill':>16} {'decode':>16} {'both':>16}"
          "   hits bytes/token waited")  # fmt: skip
    base = results[next(iter(results))]
    for side_name, result in results.items():
        table = sides[side_name].table
        if isinstance(table, OffloadedTable):
            stats = table.stats()
            result.lookups, result.hit_rate = stats.lookups, stats.hit_rate
            result.bytes_per_token = stats.bytes_moved / n_tokens
            result.wait_share = stats.wait_seconds / spent[side_name]
        cells = []
        for phase in ("prefill", "decode", "total"):
            rates = getattr(result, phase)
            against = statistics.median(rate / other for rate, other in zip(rates, getattr(base, phase), strict=True))
            cells.append(f"{statistics.median(rates):8.0f} {against - 1:+7.1%}")
        print(f"{side_name:34} {' '.join(cells)}  {result.hit_rate:5.1%} {result.bytes_per_token:11.0f} "
              f"{result.wait_share:6.1%}", flush=True)  # fmt: skip
    return {side_name: asdict(result) for side_name, result in results.items()}


def random_records(n_rows: int, fmt: FloatRows) -> Tensor:
    """Rows as they start, a block of them over and over: nothing here depends on their values."""
    records = torch.empty(n_rows, fmt.row_bytes, dtype=torch.uint8)
    block = fmt.encode(0.02 * torch.randn(2**18, fmt.width))
    for part in records.split(len(block)):
        part.copy_(block[: len(part)])
    return records


def sparse_file(path: Path, fmt: FloatRows, n_rows: int, rows: Tensor) -> int:
    """A file of a table with data in the pages of `rows` alone; how many bytes those are."""
    size = n_rows * fmt.row_bytes
    header = json.dumps({"weight": {"dtype": "BF16", "shape": [n_rows, fmt.width], "data_offsets": [0, size]}}).encode()
    header += b" " * (-(8 + len(header)) % PAGE)
    start = 8 + len(header)
    per_page = PAGE // fmt.row_bytes + 2
    data = [fmt.encode(0.02 * torch.randn(per_page, fmt.width)).numpy().tobytes()[:PAGE] for _ in range(64)]
    first, last = (start + rows * fmt.row_bytes) // PAGE, (start + (rows + 1) * fmt.row_bytes - 1) // PAGE
    pages = torch.cat([first, last]).unique().tolist()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(start + size)
        for i, page in enumerate(pages):
            os.pwrite(file.fileno(), data[i % 64], page * PAGE)
        file.truncate(start + size)
        os.fsync(file.fileno())
    return len(pages) * PAGE


@contextmanager
def space(folder: str | None) -> Iterator[Path]:
    """A folder for files of tables, which is removed."""
    path = Path(tempfile.mkdtemp(prefix="engram-tables-", dir=folder))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def build(config: ModelConfig, device: torch.device) -> tuple[EngramLM, Engram]:
    """A model in bfloat16 whose table is still to come, and its memory."""
    with torch.device("meta"):
        model = EngramLM(config).eval()
    memory = next(part for part in model.modules() if isinstance(part, Engram))
    memory.table = HostTable(
        torch.zeros(1, 2 * memory.config.row_width, dtype=torch.uint8), FloatRows(1, torch.bfloat16)
    )
    materialize(model, device, seed=0)
    return model.to(torch.bfloat16), memory


class Folded(ReadOnlyTable):
    """A table that is too large for the device, of which it has some rows, read in the place of all: as many reads."""

    def start(self, rows: Tensor) -> Callable[[], Tensor]:
        return super().start(rows % self.n_rows)


def without_prefetch(table: OffloadedTable) -> OffloadedTable:
    """The same rows, fetched when they are asked for."""
    table.prefetch = False
    return table


def rows_of(memory: Engram, ids: Tensor, device: torch.device) -> Tensor:
    """The rows that a text reads, one long document."""
    return memory.reader(ids.to(device).unsqueeze(0))


def disk_sides(open_table: Callable[..., DiskTable], hot: Tensor, scale: Scale, beyond: bool) -> dict[str, Side]:
    """A table in a file, as the system holds it or not; one `beyond` memory is never held."""
    tables = [open_table() for _ in range(2 if beyond else 4)]
    cached = open_table(cache_rows=scale.cache_rows)
    cached.warm(hot)
    everyone = [*tables, cached]
    cold = partial(forget, everyone)
    sides = {
        "disk, cold": Side(tables[0], cold),
        "disk, cold, no prefetch": Side(without_prefetch(tables[1]), cold),
        "disk, cold, cache": Side(cached, cold),
    }
    if not beyond:
        warm = partial(recall, everyone)
        sides["disk, in memory"] = Side(tables[2], warm)
        sides["disk, in memory, no prefetch"] = Side(without_prefetch(tables[3]), warm)
    return sides


def within_memory(scale: Scale, words: Words, device: torch.device, folder: Path) -> dict[str, Any]:
    """A table that the host has room for, in all places."""
    model, memory = build(scale.model, device)
    fmt = FloatRows(memory.config.row_width, torch.bfloat16)
    hot = rows_of(memory, words.take(scale.count_tokens), device)
    rounds = [draw(scale, words) for _ in range(scale.rounds + 1)]
    began = time.perf_counter()
    host = HostTable(random_records(memory.reader.n_rows, fmt), fmt)
    size, parameters = host.records.nbytes, host.n_rows * host.width
    print(f"{parameters / 1e9:.2f}e9 parameters, {size / 1e9:.1f} GB, made in {time.perf_counter() - began:.0f} s")
    sides = {"no memory": Side(None)}
    if device.type == "cpu" or size < torch.cuda.mem_get_info(device)[0] / 2:
        sides["device"] = Side(host.read_only().to(device))
    else:
        sides["device, a part"] = Side(Folded(host.records[: 2**30 // fmt.row_bytes].to(device), fmt))
    sides["host"] = Side(host)
    if device.type == "cuda":  # on the CPU the host is the device
        sides["host, no prefetch"] = Side(without_prefetch(copy.deepcopy(host)))
        cached = HostTable(host.records, fmt, scale.cache_rows)
        cached.warm(hot)
        sides["host, cache"] = Side(cached)
    if size < 8e9:
        path = folder / "rows.safetensors"
        host.to_disk(path)
        sides |= disk_sides(partial(DiskTable, path), hot, scale, False)
        quantized = host.to_disk(folder / "int8.safetensors", rows="int8")
        sides["disk, cold, int8"] = Side(quantized, partial(forget, [quantized]))
    rates = compare(f"{size / 1e9:.1f} GB", model, sides, rounds, device)
    return {"parameters": parameters, "bytes": size, "tokens/s": rates}


def beyond_memory(scale: Scale, words: Words, device: torch.device, folder: Path) -> dict[str, Any]:
    """A table on disk that memory has no room for."""
    within = scale.model.memory
    assert within is not None
    config = replace(scale.model, memory=replace(within, rows=(scale.disk_rows,) * 2))
    model, memory = build(config, device)
    fmt = FloatRows(within.row_width, torch.bfloat16)
    hot = rows_of(memory, words.take(scale.count_tokens), device)
    rounds = [draw(scale, words) for _ in range(scale.rounds + 1)]
    rows = [rows_read(memory, batch.to(device)) for drawn in rounds for batch in drawn]
    known, counts = hot.unique(return_counts=True)
    least = counts.topk(min(scale.cache_rows, len(counts))).values[-1]
    rows.append(known[counts >= least])
    began, path = time.perf_counter(), folder / "sparse.safetensors"
    written = sparse_file(path, fmt, memory.reader.n_rows, torch.cat(rows).unique().cpu())
    size = path.stat().st_size
    print(f"{size / 1e9:.0f} GB, {written / 1e9:.2f} GB of it written in {time.perf_counter() - began:.0f} s")
    sides = {"no memory": Side(None)} | disk_sides(partial(DiskTable, path), hot, scale, True)
    rates = compare(f"{size / 1e9:.0f} GB in a sparse file", model, sides, rounds, device)
    return {"bytes": size, "bytes written": written, "tokens/s": rates}


def cache_sizes(scale: Scale, words: Words, device: torch.device) -> list[dict[str, Any]]:
    """Rows alone: what caches of several sizes have of a text, read by 16 sequences a token at a time, when they were
    filled by a count over other text, and when they start empty; after as much again to fill themselves."""
    _, memory = build(scale.model, device)
    fmt = FloatRows(memory.config.row_width, torch.bfloat16)
    records = random_records(memory.reader.n_rows, fmt)
    counted = words.take(scale.count_tokens)
    text = words.take(2 * scale.n_prompts * scale.lengths[1] * (scale.rounds + 1)).to(device)
    steps = memory.reader(text[: len(text) // 16 * 16].view(16, -1)).split(1, dim=1)
    found = []
    print(f"\n{'cache rows':>12} {'of table':>9} {'filled by':>10} {'hits':>6} {'bytes/token':>12}")
    for share in (0.001, 0.01, 0.1):
        for filled in ("count", "reading"):
            table = HostTable(records, fmt, cache_rows := int(share * len(records)))
            if filled == "count":
                table.warm(rows_of(memory, counted, device))
            with torch.no_grad():
                for rows in steps[: len(steps) // 2]:
                    table(rows)
                table.reset_stats()
                for rows in steps[len(steps) // 2 :]:
                    table(rows)
            stats = table.stats()
            of_token = stats.bytes_moved / stats.lookups * steps[0].shape[-1]
            print(f"{cache_rows:12} {share:9.1%} {filled:>10} {stats.hit_rate:6.1%} {of_token:12.0f}", flush=True)
            found.append({"cache rows": cache_rows, "share": share, "filled by": filled, **asdict(stats)})
    return found


def cold_reads(folder: Path) -> list[dict[str, Any]]:
    """Rows of 128 bytes from a file of 1 GB that the system has forgotten: by page faults alone, or asked for ahead."""
    table = HostTable(torch.randint(0, 255, (2**23, 128), dtype=torch.uint8), FloatRows(64, torch.bfloat16))
    table.to_disk(folder / "cold.safetensors")
    ways = {"asked for ahead": gather_mapped, "by page faults": gather_rows}
    found = []
    print(f"\n{'rows':>6} {'of them cold':>13}  microseconds a row: {', '.join(ways)}")
    for n in (16, 256, 8192):
        for cold in (1.0, 0.1, 0.0):
            took: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(7):
                for way, read in ways.items():
                    opened = DiskTable(folder / "cold.safetensors")
                    forget([opened])
                    rows = torch.randint(0, opened.n_rows, (n,)).unique()
                    gather_mapped(opened.records, rows[torch.rand(len(rows)) >= cold])
                    start = time.perf_counter()
                    read(opened.records, rows)
                    took[way].append((time.perf_counter() - start) / n * 1e6)
            medians = {way: statistics.median(times) for way, times in took.items()}
            print(f"{n:6} {cold:13.0%}  {' '.join(f'{x:8.2f}' for x in medians.values())}", flush=True)
            found.append({"rows": n, "cold": cold, "microseconds a row": medians})
    return found


def rows_read(memory: Engram, batch: Batch) -> Tensor:
    """All rows that serving a batch reads, in no order."""
    ids = torch.cat([batch.ids, batch.following], 1)
    padding = ~torch.cat([batch.mask, torch.ones_like(batch.following, dtype=torch.bool)], 1)
    return memory.reader(ids, torch.zeros_like(ids).masked_fill(padding, -1))[~padding].flatten()


def main() -> None:
    """Run one scale and write its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--scale", choices=SCALES, help="cpu, or h200 on a CUDA device, if not given")
    parser.add_argument("--ids", choices=("text", "zipf"), default="text")
    parser.add_argument("--folder", help="for the files of tables, removed afterwards; the system's own if not given")
    arguments = parser.parse_args()
    prepare_process()
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    name = arguments.scale or ("h200" if device.type == "cuda" else "cpu")
    scale = SCALES[name]
    each = (scale.rounds + 1) * scale.n_prompts * (scale.lengths[1] + scale.new_tokens)
    ids = (text_ids if arguments.ids == "text" else zipf_ids)(
        scale.model.vocab_size, 3 * (scale.count_tokens + 2 * each)
    )
    words = Words(ids)
    machine: dict[str, Any] = dict(hardware())
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    result: dict[str, Any] = {"hardware": machine, "ids": arguments.ids, "scale": asdict(scale)}
    with space(arguments.folder) as folder:  # kept until results are written: to remove large files takes a while
        if scale.disk_rows:
            result["cold reads"] = cold_reads(folder)
            result["cache sizes"] = cache_sizes(scale, words, device)
            result["beyond memory"] = beyond_memory(scale, words, device, folder)
        result["within memory"] = within_memory(scale, words, device, folder)
        print(" | ".join(f"{key} {value}" for key, value in machine.items()))
        if name != "toy":
            store(f"offloaded_tables_{name}", result)


if __name__ == "__main__":
    main()
