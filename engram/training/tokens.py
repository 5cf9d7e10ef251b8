"""Documents -> token files: one memory-mapped file of ids for each split, and where its documents start.

Each document is followed by one end-of-text token. A file holds uint16 ids where the vocabulary allows, else uint32.
Beside the ids of the validation split stand the bytes of text of each token, so that bits per byte are exact.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from engram.config import ConfigError, require
from engram.training.corpus import Document
from engram.training.sources import MAX_DOMAINS, Source
from engram.training.tokenizer import byte_counter, eos_id, pad_id

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class TokenFile:
    """The tokens of one split.

    `tokens` [n] ids, on disk; `starts` [documents + 1] index of each document's first token, and n; `domains`
    [documents] number of each document's domain; `n_bytes` [n] bytes of text of each token (0 for the end of text),
    on disk, or None for the training split.
    """

    tokens: NDArray[Any]
    starts: NDArray[np.int64]
    domains: NDArray[np.uint8]
    n_bytes: NDArray[np.uint16] | None

    @classmethod
    def open(cls, folder: Path, split: str) -> TokenFile:
        """Open a split that `write_tokens` wrote to `folder`."""
        tokens = np.memmap(folder / f"{split}.bin", read_meta(folder)["dtype"], "r")
        lengths = np.memmap(folder / f"{split}.bytes.bin", np.uint16, "r") if split == "validation" else None
        return cls(tokens, np.load(folder / f"{split}.starts.npy"), np.load(folder / f"{split}.domains.npy"), lengths)

    def document_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of the document of the token at each position, same shape."""
        return np.searchsorted(self.starts, positions, side="right") - 1

    def domain_of(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of each document's domain, same shape."""
        return self.domains[documents].astype(np.int64)


def read_meta(folder: Path) -> dict[str, Any]:
    """What `write_tokens` recorded: corpus hash, domains, special ids; documents, tokens and bytes of each split."""
    return dict(json.loads((folder / "meta.json").read_text(encoding="utf-8")))


def write_tokens(
    folder: Path,
    source: Source,
    make_tokenizer: Callable[[Iterator[str]], Tokenizer],
    max_bytes: dict[str, int],
    eos_token: str = "",
    num_proc: int = 1,
    mixture: Sequence[Document] = (),
) -> None:
    """Write the token files of `source`, `tokenizer.json` and `meta.json` into `folder`.

    `max_bytes` [split]: whole documents in the source's order until they have this many bytes (0: all of them).
    `make_tokenizer` is given the training texts in that order; `eos_token` as for `eos_id`. `mixture` are documents of
    other domains, which are spread evenly over the training split when all that is done. Raises `ConfigError` if a
    split has no document, or a domain of the mixture is one of the source's.
    """
    scratch = folder / "scratch"
    domains = (*source.domains, *sorted({document.domain for document in mixture}))
    require(len(set(domains)) == len(domains), "domains of the corpus", source.domains, "no names of data.mixture")
    require(len(domains) <= MAX_DOMAINS, "number of domains", len(domains), f"at most {MAX_DOMAINS}")
    tables = {
        "train": _table(source.training(), source.domains, max_bytes["train"], "train", scratch),
        "validation": _table(source.validation(), source.domains, max_bytes["validation"], "validation", scratch),
    }
    tokenizer = make_tokenizer(text for batch in tables["train"].iter(64) for text in batch["text"])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.save(str(folder / "tokenizer.json"))
    if mixture:
        tables["train"] = _mixed(tables["train"], mixture, domains, scratch)
    eos = eos_id(tokenizer, eos_token)
    vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    counts = {}
    for split, table in tables.items():
        encoded = _encoded(table, tokenizer, eos, dtype, split, num_proc, scratch)
        counts[split] = _write_split(folder, split, encoded, dtype, domains)
    meta = {
        "corpus_hash": _corpus_hash(tables),
        "source": source.fingerprint,
        "dtype": dtype.name,
        "domains": list(domains),
        "vocab_size": vocab_size,
        "eos_id": eos,
        "pad_id": pad_id(tokenizer, eos),
        "splits": counts,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    shutil.rmtree(scratch)


def first_bytes(documents: Iterable[Document], limit: int) -> Iterator[Document]:
    """Whole documents from the front until they have `limit` bytes of text; all of them if `limit` is 0."""
    taken = 0
    for document in documents:
        yield document
        taken += len(document.text.encode())
        if limit and taken >= limit:
            return


def _table(documents: Iterator[Document], domains: tuple[str, ...], limit: int, split: str, scratch: Path) -> Any:
    """Documents as a `datasets` table on disk: text, domain (its number) and bytes."""
    first = next(documents, None)
    if first is None:
        raise ConfigError(f"the corpus has no {split} document")

    def rows() -> Iterator[dict[str, Any]]:
        for document in first_bytes(chain([first], documents), limit):
            yield _row(document, domains)

    return _written_table(rows, split, scratch)


def _mixed(table: Any, mixture: Sequence[Document], domains: tuple[str, ...], scratch: Path) -> Any:
    """The table with the documents of the mixture after rows of its own, by the bytes that came before."""
    before = np.cumsum(np.asarray(table.with_format("numpy")["bytes"][:]))
    placed = (len(mixture) * before / before[-1]).round().astype(int)  # documents of the mixture by the end of each row

    def rows() -> Iterator[dict[str, Any]]:
        taken = 0
        for row, upto in zip(table, placed, strict=True):
            yield row
            for document in mixture[taken:upto]:
                yield _row(document, domains)
            taken = upto

    return _written_table(rows, "train_mixed", scratch)


def _row(document: Document, domains: tuple[str, ...]) -> dict[str, Any]:
    n_bytes = len(document.text.encode())
    return {"text": document.text, "domain": domains.index(document.domain), "bytes": n_bytes}


def _written_table(rows: Callable[[], Iterator[dict[str, Any]]], name: str, scratch: Path) -> Any:
    import datasets

    features = datasets.Features(
        text=datasets.Value("large_string"), domain=datasets.Value("uint8"), bytes=datasets.Value("int64")
    )
    return datasets.Dataset.from_generator(
        rows, features=features, cache_dir=str(scratch), fingerprint=f"documents-{name}", split=name
    )


def _encoded(
    table: Any, tokenizer: Tokenizer, eos: int, dtype: np.dtype[Any], split: str, num_proc: int, scratch: Path
) -> Any:
    """The table with its texts as ids, each list ended by the end-of-text token."""
    import datasets

    count_bytes, with_bytes = byte_counter(tokenizer), split == "validation"

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = batch["text"]
        tokenizer.encode_special_tokens = True  # text that spells one is still text; set here, as pickling forgets it
        encode_batch = tokenizer.encode_batch if with_bytes else tokenizer.encode_batch_fast  # fast: without offsets
        encodings = encode_batch(texts, add_special_tokens=False)
        columns = {"ids": [np.array([*encoding.ids, eos], dtype) for encoding in encodings]}
        if with_bytes:
            lengths = zip(encodings, texts, strict=True)
            columns["lengths"] = [np.append(count_bytes(*each), 0).astype(np.uint16) for each in lengths]
        return columns

    features = table.features.copy()
    del features["text"]
    features["ids"] = datasets.Sequence(datasets.Value(dtype.name))
    if with_bytes:
        features["lengths"] = datasets.Sequence(datasets.Value("uint16"))
    return table.map(
        encode,
        batched=True,
        batch_size=64,
        num_proc=num_proc if num_proc > 1 else None,
        remove_columns=["text"],
        features=features,
        cache_file_name=str(scratch / f"{split}.arrow"),
        new_fingerprint=f"tokens-{split}",
        desc=f"tokenising {split}",
    )


def _write_split(
    folder: Path, split: str, encoded: Any, dtype: np.dtype[Any], domains: tuple[str, ...]
) -> dict[str, dict[str, int]]:
    """Write one split's files; returns documents, tokens and bytes of each domain."""
    _write_flat(folder / f"{split}.bin", encoded, "ids", dtype)
    if split == "validation":
        _write_flat(folder / f"{split}.bytes.bin", encoded, "lengths", np.dtype(np.uint16))
    columns = encoded.with_format("numpy")
    lengths = np.concatenate([_list_lengths(chunk) for chunk in encoded.data.column("ids").chunks])
    domain, n_bytes = np.asarray(columns["domain"][:]), np.asarray(columns["bytes"][:])
    np.save(folder / f"{split}.starts.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    np.save(folder / f"{split}.domains.npy", domain.astype(np.uint8))
    return {
        name: {
            "documents": int((domain == i).sum()),
            "tokens": int(lengths[domain == i].sum()),
            "bytes": int(n_bytes[domain == i].sum()),
        }
        for i, name in enumerate(domains)
    }


def _list_lengths(chunk: Any) -> NDArray[np.int64]:
    return np.diff(chunk.offsets.to_numpy()).astype(np.int64)


def _write_flat(path: Path, encoded: Any, column: str, dtype: np.dtype[Any]) -> None:
    """Write a column of lists end to end. Plain writes, as a full disk would kill a process that maps the file."""
    with path.open("wb") as file:
        for chunk in encoded.data.column(column).chunks:
            file.write(chunk.flatten().to_numpy().astype(dtype, copy=False).tobytes())


def _corpus_hash(tables: dict[str, Any]) -> str:
    """Hex SHA-256 of every document's split, domain and text, in order."""
    whole = hashlib.sha256()
    for split, table in tables.items():
        for batch in table.iter(64):
            for text, domain in zip(batch["text"], batch["domain"], strict=True):
                whole.update(f"{split} {domain} {len(text)} {text}".encode())
    return whole.hexdigest()
