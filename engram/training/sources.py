"""Where documents come from: the Python environment, local files, or a data set of the Hugging Face hub.

All give the same thing: training and validation documents in the order of their content hash, without copies.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from engram.config import ConfigError, require
from engram.training.corpus import Document, PythonEnvironment, normalized

HELD_OUT_SHARE = 0.04  # of the documents, by content hash, where a source names no validation documents
MAX_DOMAINS = 256  # token files number them in one byte
_LOADERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text", ".md": "text", ".py": "text"}

_EMPTY = hashlib.sha256(normalized("").encode()).digest()


class Source(Protocol):
    """Documents in two splits; `fingerprint` changes with their content, `domains` names what they can belong to."""

    domains: tuple[str, ...]

    @property
    def fingerprint(self) -> str: ...
    def training(self) -> Iterator[Document]: ...
    def validation(self) -> Iterator[Document]: ...


def open_source(
    source: str,
    files: Sequence[str] = (),
    val_files: Sequence[str] = (),
    text_column: str = "text",
    domain_column: str = "",
    subset: str = "",
    revision: str = "",
) -> Source:
    """Open `python-env`, `files` (paths or globs of parquet, jsonl or text), or a hub id.

    Raises `ConfigError` naming what is missing or cannot be read.
    """
    if source == "python-env":
        return PythonEnvironment()
    if source == "files":
        return _from_files(files, val_files, text_column, domain_column)
    return _from_hub(source, subset, revision, text_column, domain_column)


class Table:
    """Documents of `datasets` tables; without a validation table, documents are held out by their content hash."""

    def __init__(
        self, name: str, train: Any, validation: Any | None, text_column: str, domain_column: str, fingerprint: str
    ) -> None:
        self.fingerprint = fingerprint
        self._text, self._domain = text_column, domain_column
        tables = [train] if validation is None else [train, validation]
        columns = {"data.text_column": text_column, "data.domain_column": domain_column}
        for table in tables:
            for setting, column in columns.items():
                known = not column or column in table.column_names
                require(known, setting, column, "one of " + ", ".join(table.column_names))
            kind = getattr(table.features[text_column], "dtype", "a list")
            is_text = kind in ("string", "large_string")
            require(is_text, "data.text_column", text_column, f"a column of text (it is of {kind})")
        values = {value for table in tables for value in table.unique(domain_column)} if domain_column else {"text"}
        self.domains = tuple(sorted(set(map(str, values))))
        require(
            len(self.domains) <= MAX_DOMAINS,
            "data.domain_column",
            domain_column,
            f"a column of at most {MAX_DOMAINS} different values (it has {len(self.domains):,})",
        )
        keys = _content_keys(train, text_column)
        if validation is None:
            below = int(HELD_OUT_SHARE * 2**64)
            n_texts = len(set(keys) - {_EMPTY})
            require(
                n_texts >= 2,
                f"number of different documents in {name}",
                n_texts,
                "2 or more, or some in data.val_files",
            )
            held_out = {key for key in keys if int.from_bytes(key[:8], "big") < below} or {min(keys)}
            self._validation = train, _in_order(keys, keep=held_out)
            self._training = train, _in_order(keys, keep=set(keys) - held_out)
        else:
            val_keys = _content_keys(validation, text_column)
            self._validation = validation, _in_order(val_keys, keep=set(val_keys))
            self._training = train, _in_order(keys, keep=set(keys) - set(val_keys))

    def training(self) -> Iterator[Document]:
        """Documents to train on."""
        return self._documents(*self._training)

    def validation(self) -> Iterator[Document]:
        """Documents held out."""
        return self._documents(*self._validation)

    def _documents(self, table: Any, rows: Sequence[int]) -> Iterator[Document]:
        for row in rows:
            values = table[row]
            yield Document(values[self._text], str(values[self._domain]) if self._domain else "text", "")


def _content_keys(table: Any, column: str) -> list[bytes]:
    """SHA-256 of each row's normalised text."""

    def keys(batch: dict[str, list[str]]) -> dict[str, list[bytes]]:
        return {"key": [hashlib.sha256(normalized(text or "").encode()).digest() for text in batch[column]]}

    keyed = table.select_columns([column]).map(
        keys, batched=True, remove_columns=[column], keep_in_memory=True, desc="hashing documents"
    )
    return list(keyed["key"])


def _in_order(keys: Sequence[bytes], keep: set[bytes]) -> list[int]:
    """Rows in the order of their keys: the first row of each key in `keep`, none of an empty text."""
    first: dict[bytes, int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    return [first[key] for key in sorted(keep - {_EMPTY})]


def _from_files(files: Sequence[str], val_files: Sequence[str], text_column: str, domain_column: str) -> Table:
    from datasets import load_dataset

    splits = {"train": _matching("data.files", files), "validation": _matching("data.val_files", val_files)}
    splits = {split: paths for split, paths in splits.items() if paths}
    paths = [path for each in splits.values() for path in each]
    kinds = {_LOADERS.get(Path(path).suffix, "") for path in paths}
    require(
        len(kinds) == 1 and kinds < set(_LOADERS.values()),
        "data.files",
        paths,
        "files of one kind: " + ", ".join(_LOADERS),
    )
    kind = kinds.pop()
    whole = hashlib.sha256(f"{kind} {text_column} {domain_column}".encode())
    for split, each in splits.items():
        for path in each:
            whole.update(f"{split} {_checked_digest(path, is_text=kind != 'parquet')}\n".encode())
        if kind != "parquet" and all(map(_is_blank, each)):
            raise ConfigError(f"data.{'files' if split == 'train' else 'val_files'} {each} hold no document")
    # The library finds its own copy of a table by its files' names and times, and by the name given here.
    options = {"sample_by": "document"} if kind == "text" else {}
    try:
        tables = load_dataset(kind, whole.hexdigest()[:16], data_files=splits, **options)
    except Exception as error:
        raise ConfigError(f"data.files {paths} cannot be read: {_one_line(error)}") from error
    validation = tables.get("validation")
    return Table(f"data.files {paths}", tables["train"], validation, text_column, domain_column, whole.hexdigest())


def _matching(setting: str, patterns: Sequence[str]) -> list[str]:
    paths = []
    for pattern in patterns:
        found = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
        if not found and os.path.isdir(pattern):
            example = os.path.join(pattern, "*.jsonl")
            raise ConfigError(f"{setting}: {pattern!r} is a folder; name its files, by a glob such as {example!r}")
        if not found:
            raise ConfigError(f"{setting}: there is no file {pattern!r}")
        paths += found
    return paths


def _is_blank(path: str) -> bool:
    with open(path, "rb") as file:
        return not any(chunk.strip() for chunk in iter(lambda: file.read(1 << 20), b""))


def _checked_digest(path: str, is_text: bool) -> str:
    """SHA-256 of a file. Raises `ConfigError` naming file and byte if it should be UTF-8 text and is not."""
    digest, decoder, n_read = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), 0
    try:
        with open(path, "rb") as file:
            while True:
                chunk = file.read(1 << 20)
                digest.update(chunk)
                if is_text:
                    pending = len(decoder.getstate()[0])
                    decoder.decode(chunk, final=not chunk)
                    n_read += len(chunk)
                if not chunk:
                    return digest.hexdigest()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path!r} is not UTF-8 text: bad byte at offset {n_read - pending + error.start}") from error
    except OSError as error:
        raise ConfigError(f"data.files {path!r} cannot be read: {error.strerror}") from error


def _from_hub(name: str, subset: str, revision: str, text_column: str, domain_column: str) -> Table:
    from datasets import load_dataset

    try:
        tables = load_dataset(name, subset or None, revision=revision or None)
    except Exception as error:
        raise ConfigError(f"data.source {name!r} cannot be loaded: {_one_line(error)}") from error
    require("train" in tables, f"splits of {name!r}", list(tables), "a `train` split among them")
    validation = tables.get("validation")
    parts = [name, text_column, domain_column, *(table._fingerprint for table in tables.values())]
    fingerprint = hashlib.sha256(" ".join(parts).encode()).hexdigest()
    return Table(f"data.source {name!r}", tables["train"], validation, text_column, domain_column, fingerprint)


def _one_line(error: BaseException) -> str:
    """What lies at the root of an error that a library wrapped in others."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__
