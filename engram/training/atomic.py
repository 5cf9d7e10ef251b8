"""Files and folders that appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engram.training.cache import disk_errors_name


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to, which takes the name `path` when the block ends well and is removed when not.

    What stood at `path` before stays until then. Raises `ConfigError` naming `path` on a full or read-only disk.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    with disk_errors_name(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield draft
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, owned: Collection[str]) -> Iterator[Path]:
    """Yields an empty folder to write to, which takes the name `path` when the block ends well and is removed when not.

    What stood at `path` before stays until then, when its files named in `owned` go and all others move to the new
    folder. A process killed between the two renames leaves the old one whole, as `old` in a hidden folder beside
    `path`. Raises `ConfigError` naming `path` on a full or read-only disk.
    """
    with disk_errors_name(path):
        path = path.resolve()  # of a link, the folder it leads to is replaced
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        draft, old = work / "draft", work / "old"
        try:
            draft.mkdir()
            yield draft
            if path.is_dir():
                path.rename(old)
            draft.rename(path)
            for other in old.iterdir() if old.exists() else ():
                if other.name not in owned:
                    other.rename(path / other.name)
        finally:
            if old.exists() and not path.exists():
                old.rename(path)
            shutil.rmtree(work, ignore_errors=True)


def write_json(path: Path, data: Any) -> None:
    """Write `data` as JSON, atomically."""
    with atomic_file(path) as draft:
        draft.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
