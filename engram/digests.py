"""SHA-256 of what lies in files, one of every 64 MiB: blocks are hashed side by side, by all cores (about 2 GB/s each),
and what is damaged in a large table is known to a block."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BLOCK = 2**26
CHECKED_BYTES = 2**30  # up to which a table is read to be checked when it is opened; larger ones only when asked
_READ = 2**20

Advance = Callable[[int], object]


def digests(path: Path, spans: Mapping[str, tuple[int, int]], advance: Advance | None = None) -> dict[str, list[str]]:
    """Hex SHA-256 of each block of those stretches (first byte, end) of a file; `advance` is told of bytes as they are
    read."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pending = {
            name: [pool.submit(_hashed, path, at, min(at + BLOCK, end), advance) for at in range(start, end, BLOCK)]
            for name, (start, end) in spans.items()
        }
        return {name: [part.result() for part in parts] for name, parts in pending.items()}


class Digests:
    """The same of bytes that pass by, on their way to a file."""

    def __init__(self) -> None:
        self._done: list[str] = []
        self._block, self._room = hashlib.sha256(), BLOCK

    def update(self, data: memoryview) -> None:
        """Take the next bytes in."""
        while len(data):
            part, data = data[: self._room], data[self._room :]
            self._block.update(part)
            self._room -= len(part)
            if not self._room:
                self._done.append(self._block.hexdigest())
                self._block, self._room = hashlib.sha256(), BLOCK

    def all(self) -> list[str]:
        """Of each block so far."""
        return self._done + ([self._block.hexdigest()] if self._room < BLOCK else [])


def where_they_differ(found: list[str], expected: list[str]) -> str | None:
    """What to say of blocks whose digests differ, if any do: nothing more where there is one block alone."""
    wrong = [i for i, (own, other) in enumerate(zip(found, expected, strict=True)) if own != other]
    if not wrong:
        return None
    return f" in {len(wrong)} of {len(found)} blocks of {BLOCK >> 20} MiB, the first is number {wrong[0]}" * (
        len(found) > 1
    )


def _hashed(path: Path, start: int, end: int, advance: Advance | None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while start < end and (data := file.read(min(_READ, end - start))):
            digest.update(data)
            start += len(data)
            if advance is not None:
                advance(len(data))
    return digest.hexdigest()
