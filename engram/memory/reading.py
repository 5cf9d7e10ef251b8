"""How rows that lie elsewhere come to where they are used, while something else is computed.

Each way has `start(rows)`, which begins, and returns what waits: a thread of the host gathers them, from memory or
disk, and a side stream copies them to the device; or, for few rows of pinned memory, the device reads them itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engram.kernels import gather_rows, pick_rows
from engram.memory.row_cache import RowCache
from engram.memory.row_formats import RowFormat

Load = Callable[[Tensor], Tensor]
_CPU = torch.device("cpu")
# Rows that the host gathers rather than the device. From 80 GB of pinned memory an H200 read 65,536 rows of 160 bytes
# in 1.8 ms, where its host took 2.4; for 262,144 they took 10.0 and 6.9, and large products waited for the device.
MANY_ROWS = 2**16


@dataclass
class ReadStats:
    """What reading rows took since the start, or since `reset_stats`.

    lookups: rows asked for, each as often as it was. hits: those of them that the cache had. bytes_moved: read from
    host or disk for the others, and for the cache to hold. bytes_fetched: those of them that a thread gathered.
    fetch_seconds: how long it worked. wait_seconds: how long whoever asked waited for it.
    """

    lookups: int = 0
    hits: int = 0
    bytes_moved: int = 0
    bytes_fetched: int = 0
    fetch_seconds: float = 0.0
    wait_seconds: float = 0.0

    def __add__(self, other: ReadStats) -> ReadStats:
        return ReadStats(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def hit_rate(self) -> float:
        """Share of lookups that the cache had."""
        return self.hits / self.lookups if self.lookups else 0.0

    @property
    def bytes_per_second(self) -> float:
        """Bytes that the thread gathered in a second of its work."""
        return self.bytes_fetched / self.fetch_seconds if self.fetch_seconds else 0.0


class ReadByThread:
    """A thread gathers distinct rows, of which the cache has some, and sends the others to the device.

    Args:
        load: distinct rows `[n]`, ascending, on the CPU -> their records `[n, S]` there.
        fmt: of records.
        cache_rows: rows to keep on the device, 0 for none.
        device: where values are wanted.
    """

    def __init__(self, load: Load, fmt: RowFormat, cache_rows: int, device: torch.device) -> None:
        self.load, self.fmt, self.device = load, fmt, device
        self.stats = ReadStats()
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.cache: RowCache | None = None
        if cache_rows:
            with self._on_side():
                self.cache = RowCache(cache_rows, self._load, fmt.row_bytes, device, _CPU)
        self._failure: Exception | None = None  # of choosing what the cache holds, after the values of a read are there
        # One thread: reads come in the order in which they were begun, and the cache needs no lock.
        self._thread = ThreadPoolExecutor(1, "engram-rows")

    def start(self, rows: Tensor) -> Callable[[], Tensor]:
        """Begin to bring rows `[..., H]`; the values, `[..., H, width]`, when what is returned is called."""
        known: torch.cuda.Event | None = None
        if self._side is not None:
            rows = _to_host(rows)
            known = torch.cuda.current_stream(self.device).record_event()
        return partial(_wait, self._thread.submit(self._bring, rows, known), self.stats)

    def warm(self, rows: Tensor) -> None:
        """Fill the cache with the most frequent of `rows`."""
        self._thread.submit(self._warm, rows.flatten().to(_CPU)).result()

    def reset_stats(self) -> None:
        """Count from 0."""
        self.stats = ReadStats()

    def _warm(self, rows: Tensor) -> None:
        assert self.cache is not None
        with self._on_side():
            self.cache.count(*rows.unique(return_counts=True))
            self.cache.refresh(least=1)

    def _bring(self, rows: Tensor, known: torch.cuda.Event | None) -> tuple[Tensor, torch.cuda.Event | None]:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if known is not None:
            known.synchronize()
        began = time.perf_counter()
        distinct, place, counts = rows.unique(return_inverse=True, return_counts=True)
        slots = torch.full_like(distinct, -1) if self.cache is None else self.cache.find(distinct)
        missed = slots < 0
        with self._on_side():
            loaded = self._send(self.load(distinct[missed]))
            if self.cache is None:
                records = loaded
            else:
                at = missed.cumsum(0) - 1  # where a missed row lies in what was loaded
                records = pick_rows(self.cache.records, self._send(slots), loaded, self._send(at))
            values = gather_rows(self.fmt.decode(records), self._send(place))
            done = None if self._side is None else self._side.record_event()
        if self.cache is not None:  # when these values are there: they shall not wait for others to be chosen
            self._thread.submit(self._count, self.cache, distinct, counts)
        self.stats.lookups += rows.numel()
        self.stats.hits += int(counts[~missed].sum())
        self._note(int(missed.sum()), began)
        return values, done

    def _count(self, cache: RowCache, rows: Tensor, counts: Tensor) -> None:
        try:
            with self._on_side():
                cache.count(rows, counts)
        except Exception as failure:  # nobody waits for this: the next read tells it
            self._failure = failure

    def _load(self, rows: Tensor) -> Tensor:
        """Records for the cache."""
        began = time.perf_counter()
        records = self._send(self.load(rows))
        self._note(len(rows), began)
        return records

    def _note(self, n_rows: int, began: float) -> None:
        self.stats.bytes_moved += n_rows * self.fmt.row_bytes
        self.stats.bytes_fetched += n_rows * self.fmt.row_bytes
        self.stats.fetch_seconds += time.perf_counter() - began

    def _on_side(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._side is None else torch.cuda.stream(self._side)

    def _send(self, x: Tensor) -> Tensor:
        # From pinned memory, or the copy would not be done by the side: torch keeps that memory until it is.
        return x if self._side is None else x.pin_memory().to(self.device, non_blocking=True)


class ReadFromPinned:
    """The device reads few rows of the host's pinned memory itself, on a stream beside the one that computes.

    The host waits for nothing then: hashing, cache and copy are queued like all else. They are recorded in a graph
    without the cache, whose place changes while it learns. Of MANY_ROWS and more, those that the cache lacks are
    gathered by a thread of the host, into pinned memory that is copied to the device as a whole. Arguments as for
    `ReadByThread`, but the records themselves for what loads them.
    """

    def __init__(self, records: Tensor, fmt: RowFormat, cache_rows: int, device: torch.device) -> None:
        self.records, self.fmt = records, fmt
        self._read = ReadStats()
        self._thread = ThreadPoolExecutor(1, "engram-rows")
        self._gathered = torch.empty(0, fmt.row_bytes, dtype=torch.uint8)  # the thread's, until they are `_sent`
        self._sent: torch.cuda.Event | None = None
        # All that belongs to it lives on this stream alone, so that its memory is never given away too early.
        self._side = torch.cuda.Stream(device)
        with torch.cuda.stream(self._side):
            self._hits = torch.zeros((), dtype=torch.int64, device=device)
            self.cache = RowCache(max(cache_rows, 1), self._load, fmt.row_bytes, device, device)
        self._caches = cache_rows > 0

    def _load(self, rows: Tensor) -> Tensor:
        """Records for the cache."""
        self._read.bytes_moved += len(rows) * self.fmt.row_bytes
        return pick_rows(self.cache.records, torch.full_like(rows, -1), self.records, rows)

    def start(self, rows: Tensor) -> Callable[[], Tensor]:
        """As `ReadByThread.start`."""
        self._side.wait_stream(torch.cuda.current_stream(rows.device))
        recorded = torch.cuda.is_current_stream_capturing()
        many = rows.numel() >= MANY_ROWS and not recorded
        with torch.cuda.stream(self._side):
            slots = self.cache.find(rows) if self._caches and not recorded else None
            if many:
                on_host = _to_host(rows), None if slots is None else _to_host(slots)
                known = self._side.record_event()
                coming = self._thread.submit(self._bring, *on_host, slots, self.cache.records, known, self._read)
                arrive = partial(_wait, coming, self._read)
            else:
                found = torch.full_like(rows, -1) if slots is None else slots
                values = self.fmt.decode(pick_rows(self.cache.records, found, self.records, rows))
                arrive = partial(_arrive, values, self._side.record_event())
            self._read.lookups += rows.numel()
            if slots is not None:
                self._hits = self._hits + (slots >= 0).sum()
                self.cache.count(rows.flatten())
        rows.record_stream(self._side)  # its memory is not given away before the side has read it
        return arrive

    def _bring(
        self,
        rows: Tensor,
        slots: Tensor | None,
        slots_there: Tensor | None,
        cached: Tensor,
        known: torch.cuda.Event,
        stats: ReadStats,
    ) -> tuple[Tensor, torch.cuda.Event | None]:
        """Values of rows, whose slots in `cached`, if there are any, lie here and on the device."""
        known.synchronize()
        began = time.perf_counter()
        missed = rows.flatten() if slots is None else rows[slots < 0]
        gathered = self._room_for(len(missed))
        torch.index_select(self.records, 0, missed, out=gathered)
        with torch.cuda.stream(self._side):
            records = gathered.to(cached.device, non_blocking=True)
            self._sent = self._side.record_event()
            if slots_there is None:
                records = records.view(*rows.shape, -1)
            else:
                at = (slots_there < 0).flatten().cumsum(0).view_as(slots_there) - 1  # where missed rows lie in those
                records = pick_rows(cached, slots_there, records, at)
            values, done = self.fmt.decode(records), self._side.record_event()
        stats.bytes_fetched += gathered.numel()
        stats.fetch_seconds += time.perf_counter() - began
        return values, done

    def _room_for(self, n: int) -> Tensor:
        """Pinned memory for `n` records, the same each time: to pin new memory takes longer than to fill it."""
        if self._sent is not None:
            self._sent.synchronize()
        if len(self._gathered) < n:
            self._gathered = torch.empty(n, self.fmt.row_bytes, dtype=torch.uint8, pin_memory=True)
        return self._gathered[:n]

    def warm(self, rows: Tensor) -> None:
        """As `ReadByThread.warm`."""
        self._side.wait_stream(torch.cuda.current_stream(self._hits.device))
        with torch.cuda.stream(self._side):
            self.cache.count(rows.flatten().to(self._hits.device))
            self.cache.refresh(least=1)

    def reset_stats(self) -> None:
        """Count from 0."""
        self._read = ReadStats()
        with torch.cuda.stream(self._side):
            self._hits = torch.zeros_like(self._hits)

    @property
    def stats(self) -> ReadStats:
        """As of now; to know the hits, the host waits for the device."""
        with torch.cuda.stream(self._side):
            hits = int(self._hits)
        missed = (self._read.lookups - hits) * self.fmt.row_bytes
        return replace(self._read, hits=hits, bytes_moved=self._read.bytes_moved + missed)


def _to_host(x: Tensor) -> Tensor:
    """In pinned memory, when the current stream has come so far."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def _wait(coming: Future[tuple[Tensor, torch.cuda.Event | None]], stats: ReadStats) -> Tensor:
    """The values that a thread brings."""
    began = time.perf_counter()
    values, done = coming.result()
    stats.wait_seconds += time.perf_counter() - began
    return values if done is None else _arrive(values, done)


def _arrive(values: Tensor, done: torch.cuda.Event) -> Tensor:
    """Let the stream that computes wait for values that another one brings."""
    stream = torch.cuda.current_stream(values.device)
    stream.wait_event(done)
    values.record_stream(stream)
    return values
