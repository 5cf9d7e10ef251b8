"""Rows read by themselves, without a model: what caches have of a text, and what rows of a forgotten file cost."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from engram.kernels import gather_mapped, gather_rows
from engram.memory import DiskTable, HostTable
from engram.memory.row_formats import FloatRows
from offloading.files import forget
from offloading.scales import Scale
from offloading.tables import build, random_records, rows_of
from offloading.words import Words


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
