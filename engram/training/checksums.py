"""SHA-256 of all that a model's safetensors files hold, in `checksums.json` beside them: whatever bit changes, the
tensor it belongs to is named.

A file has a hash of its header and, for each tensor, one of every 64 MiB of it (engram/digests.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from engram.config import ConfigError
from engram.digests import BLOCK, Advance, digests, where_they_differ
from engram.tensor_files import Header, header_bytes, read_header

CHECKSUMS = "checksums.json"


def write_checksums(folder: Path, files: Iterable[Path]) -> None:
    """Hash files of a folder, and write what comes out beside them."""
    found = {}
    for path in files:
        header = read_header(path)
        found[path.name] = {
            "header": hashlib.sha256(header_bytes(path)).hexdigest(),
            "tensors": tensor_checksums(path, header, header.entries),
        }
    text = json.dumps({"algorithm": "sha256", "block_bytes": BLOCK, "files": found}, indent=1)
    (folder / CHECKSUMS).write_text(text + "\n", encoding="utf-8")


def read_checksums(folder: Path) -> dict[str, Any] | None:
    """What `write_checksums` wrote, by file; None if there is nothing. Raises `ConfigError` if it can't be read."""
    path = folder / CHECKSUMS
    if not path.exists():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if (saved["algorithm"], saved["block_bytes"]) != ("sha256", BLOCK):
            raise ValueError("it is of another version")
        return {
            name: {"header": file["header"], "tensors": dict(file["tensors"])} for name, file in saved["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{CHECKSUMS} is damaged: {type(error).__name__} {error}") from error


def checked_header(path: Path, saved: dict[str, Any]) -> Header:
    """A file's header. Raises `ConfigError` unless it is the one that was saved, and all tensors are there whole."""
    if path.name not in saved:
        raise ConfigError(f"{path.name} is none of the files that {CHECKSUMS} names")
    if hashlib.sha256(header_bytes(path)).hexdigest() != saved[path.name]["header"]:
        raise ConfigError(f"{path.name}: its header is damaged, its SHA-256 is not that in {CHECKSUMS}")
    return read_header(path)


def damages(
    path: Path, header: Header, names: Iterable[str], saved: dict[str, Any], advance: Advance | None = None
) -> Iterator[str]:
    """What is wrong with those tensors of a file, a line each; `advance` is told of bytes as they are read."""
    expected = saved[path.name]["tensors"]
    for name, found in tensor_checksums(path, header, names, advance).items():
        if name not in expected or len(found) != len(expected[name]):
            yield f"{path.name}: {CHECKSUMS} does not say what {name} should be"
            continue
        where = where_they_differ(found, expected[name])
        if where is not None:
            yield f"{path.name}: {name} is damaged{where}, its SHA-256 is not that in {CHECKSUMS}"


def tensor_checksums(
    path: Path, header: Header, names: Iterable[str], advance: Advance | None = None
) -> dict[str, list[str]]:
    """Hex SHA-256 of each block of those tensors of a file."""
    wanted = set(names)
    spans = {name: (entry.start, entry.end) for name, entry in header.entries.items() if name in wanted}
    return digests(path, spans, advance)
