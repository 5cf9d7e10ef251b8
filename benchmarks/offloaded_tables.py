"""Serving with memory tables off the device: prefill and decoding with the table on the device, the host and on disk.

One model serves the same prompts in turn with each table in its place: prompts of U(100, 1024) tokens are taken in by
batches, sorted by length, then each is continued for some tokens, one by one, as a text goes on (no sampling), all with
the state of decoding. Ids are those of this Python environment's source files in a BPE trained on them, or (`--ids
zipf`) drawn one by one by Zipf's law, which makes rarer N-grams than text has. "No memory" is the same backbone without
the layer. With `--replay`, prompts are continued by a step recorded as a CUDA graph.

On disk a table is measured `in memory`, all of its pages cached by the system, and `cold`, when before every batch the
system has forgotten the file. A table beyond memory is a sparse file: it has the size, and real data in every page that
is read here; all other pages are holes, which would cost no trip to the disk and are never read. Caches have seen other
text than what is measured. With `prefetch` off, rows are fetched when the memory layer asks for them.

    python benchmarks/offloaded_tables.py                        # scale `cpu`: tables of 2 GB, and on disk of 240 GB
    python benchmarks/offloaded_tables.py --scale toy --device cuda
    python benchmarks/offloaded_tables.py --device cuda --ids zipf --replay   # scale `h200`: 4B, 80 GB pinned
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import hardware, store
from offloading.files import forget, recall, space, sparse_file
from offloading.reads import cache_sizes, cold_reads
from offloading.scales import SCALES, Scale
from offloading.serving import Side, compare
from offloading.tables import Folded, build, random_records, rows_of, rows_read, without_prefetch
from offloading.words import Words, draw, text_ids, zipf_ids
from torch import Tensor

from engram.memory import DiskTable, HostTable
from engram.memory.row_formats import FloatRows
from engram.training.environment import prepare_process

Save = Callable[[dict[str, Any]], None]


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


def within_memory(scale: Scale, words: Words, device: torch.device, folder: Path, replays: bool, save: Save) -> None:
    """A table that the host has room for, in all places."""
    began = time.perf_counter()
    model, memory = build(scale.model, device)
    fmt = FloatRows(memory.config.row_width, torch.bfloat16)
    hot = rows_of(memory, words.take(scale.count_tokens), device)
    warming, rounds = draw(scale, words)[:1], [draw(scale, words) for _ in range(scale.rounds)]
    began = told(f"a model of {sum(p.numel() for p in model.parameters()) / 1e9:.2f}e9 parameters, and prompts", began)
    records = random_records(memory.reader.n_rows, fmt)
    size, parameters = records.nbytes, len(records) * fmt.width
    began = told(f"{parameters / 1e9:.2f}e9 parameters of memory, {size / 1e9:.1f} GB", began)
    host = HostTable(records, fmt)
    sides = {"no memory": Side(None)}
    if device.type == "cpu" or size + scale.beside < torch.cuda.mem_get_info(device)[0]:
        sides["device"] = Side(host.read_only().to(device))
    else:
        sides["device, a part"] = Side(Folded(host.records[: 2**30 // fmt.row_bytes].to(device), fmt))
    sides["host"] = Side(host)
    if device.type == "cuda":  # on the CPU the host is the device
        began = told(f"pinned: {host.records.is_pinned()}", began)
        sides["host, no prefetch"] = Side(without_prefetch(HostTable(records, fmt)))
        cached = HostTable(records, fmt, scale.cache_rows)
        cached.warm(hot)
        sides["host, cache"] = Side(cached)
        told("a cache filled", began)
    if size < 8e9:
        path = folder / "rows.safetensors"
        host.to_disk(path)
        sides |= disk_sides(partial(DiskTable, path), hot, scale, False)
        quantized = host.to_disk(folder / "int8.safetensors", rows="int8")
        sides["disk, cold, int8"] = Side(quantized, partial(forget, [quantized]))
    del hot
    compare(
        f"{size / 1e9:.1f} GB", model, sides, warming, rounds, device, replays,
        lambda rates: save({"parameters": parameters, "bytes": size, "tokens/s": rates}),
    )  # fmt: skip


def beyond_memory(scale: Scale, words: Words, device: torch.device, folder: Path, replays: bool, save: Save) -> None:
    """A table on disk that memory has no room for."""
    within = scale.model.memory
    assert within is not None
    config = replace(scale.model, memory=replace(within, rows=(scale.disk_rows,) * 2))
    model, memory = build(config, device)
    fmt = FloatRows(within.row_width, torch.bfloat16)
    hot = rows_of(memory, words.take(scale.count_tokens), device)
    warming, rounds = draw(scale, words)[:1], [draw(scale, words) for _ in range(scale.rounds)]
    rows = [rows_read(memory, batch.to(device)) for drawn in [warming, *rounds] for batch in drawn]
    known, counts = hot.unique(return_counts=True)
    least = counts.topk(min(scale.cache_rows, len(counts))).values[-1]
    rows.append(known[counts >= least])
    began, path = time.perf_counter(), folder / "sparse.safetensors"
    written = sparse_file(path, fmt, memory.reader.n_rows, torch.cat(rows).unique().cpu())
    size = path.stat().st_size
    told(f"a file of {size / 1e9:.0f} GB, {written / 1e9:.2f} GB of it written", began)
    sides = {"no memory": Side(None)} | disk_sides(partial(DiskTable, path), hot, scale, True)
    compare(
        f"{size / 1e9:.0f} GB in a sparse file", model, sides, warming, rounds, device, replays,
        lambda rates: save({"bytes": size, "bytes written": written, "tokens/s": rates}),
    )  # fmt: skip


def told(what: str, began: float) -> float:
    """Say what there is now, and how long it took; the time now."""
    now = time.perf_counter()
    print(f"{what}: {now - began:.1f} s", flush=True)
    return now


def main() -> None:
    """Run one scale and write its results, after each round those so far."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--scale", choices=SCALES, help="cpu, or h200 on a CUDA device, if not given")
    parser.add_argument("--ids", choices=("text", "zipf"), default="text")
    parser.add_argument("--folder", help="for the files of tables, removed afterwards; the system's own if not given")
    parser.add_argument("--rounds", type=int, help="the scale's own if not given")
    parser.add_argument("--prompts", type=int, help="of a round; the scale's own if not given")
    parser.add_argument("--rows", type=int, help="of each of the table's heads; the scale's own if not given")
    parser.add_argument("--replay", action="store_true", help="decode by CUDA graphs")
    arguments = parser.parse_args()
    prepare_process()
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    if arguments.replay and device.type != "cuda":
        parser.error("--replay needs --device cuda")
    name = arguments.scale or ("h200" if device.type == "cuda" else "cpu")
    scale = SCALES[name]
    scale = replace(scale, rounds=arguments.rounds or scale.rounds, n_prompts=arguments.prompts or scale.n_prompts)
    if arguments.rows:
        assert scale.model.memory is not None
        memory = replace(scale.model.memory, rows=(arguments.rows,) * 2)
        scale = replace(scale, model=replace(scale.model, memory=memory))
    # For each case the text that fills its caches, and the rounds, of which the first warms up.
    cases, each = 3 if scale.disk_rows else 1, (scale.rounds + 1) * scale.each_round
    n_ids = cases * (scale.count_tokens + 2 * each)
    words = Words((text_ids if arguments.ids == "text" else zipf_ids)(scale.model.vocab_size, n_ids))
    machine: dict[str, Any] = dict(hardware())
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan anew for each length of prompts
    print(" | ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    result: dict[str, Any] = {
        "hardware": machine, "ids": arguments.ids, "replay": arguments.replay, "scale": asdict(scale)
    }  # fmt: skip

    def save(case: str, found: Any) -> None:
        result[case] = found
        if name != "toy":
            store(f"offloaded_tables_{name}", result)

    with space(arguments.folder) as folder:  # kept until results are written: to remove large files takes a while
        if scale.disk_rows:
            result["cold reads"] = cold_reads(folder)
            result["cache sizes"] = cache_sizes(scale, words, device)
            beyond_memory(scale, words, device, folder, arguments.replay, partial(save, "beyond memory"))
        within_memory(scale, words, device, folder, arguments.replay, partial(save, "within memory"))


if __name__ == "__main__":
    main()
