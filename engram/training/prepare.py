"""Which data a run uses, and the folder of token files made from them: from the cache, or made now.

The folder's name hashes the text, the settings that shape the files, and the code that makes them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Tokenizer

from engram import synthetic
from engram.config import require
from engram.synthetic.mixture import Portion, mixed_documents, read_mixture
from engram.training import corpus, sources, tokenizer, tokens
from engram.training.cache import build_once, content_key, default_cache_dir
from engram.training.corpus import Document
from engram.training.sources import open_source
from engram.training.tokenizer import load_tokenizer, train_bpe
from engram.training.tokens import SPLITS, write_tokens


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on, and in which pieces.

    `source`: `python-env` (the text of the Python environment), `files` (with `files` and `val_files`: paths or globs
    of parquet, jsonl or text), or a hub id (with `subset` and `revision`). `tokenizer`: a `tokenizer.json`, a folder,
    or a hub id, whose documents end with `eos_token` (empty: the usual names are tried); an empty `tokenizer` trains a
    BPE of `vocab_size` ids on the first `tokenizer_bytes` of the training text.
    `batch_size` is in windows of `seq_len` tokens, over all ranks. `max_bytes` and `max_val_bytes` take that much text
    from the front of each split (0: all), `val_tokens` that many of the held-out tokens (0: all). `cache_dir` empty:
    the platform's.
    `mixture` adds documents of synthetic tasks to the training split alone, each task a domain of its own: bytes by
    task, or a mapping of `bytes` and settings of the task (`engram.synthetic`). They are drawn with `mixture_seed`, not
    with the run's `seed`. A run on a mixture is asked about `probe_examples` questions of each task at each validation.
    """

    source: str = "python-env"
    files: tuple[str, ...] = ()
    val_files: tuple[str, ...] = ()
    subset: str = ""
    revision: str = ""
    text_column: str = "text"
    domain_column: str = ""
    tokenizer: str = ""
    eos_token: str = ""
    vocab_size: int = 8192
    tokenizer_bytes: int = 10_000_000
    seq_len: int = 256
    batch_size: int = 32
    seed: int = 0
    max_bytes: int = 0
    max_val_bytes: int = 0
    val_tokens: int = 0
    cache_dir: str = ""
    num_proc: int = 1
    mixture: dict[str, int | dict[str, Any]] = field(default_factory=dict)
    mixture_seed: int = 0
    probe_examples: int = 200

    def __post_init__(self) -> None:
        for name in ("files", "val_files"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        require(self.source != "", "data.source", self.source, "python-env, files, or a hub id")
        require(
            (self.source == "files") == bool(self.files), "data.files", self.files, "paths, with source `files` alone"
        )
        require(
            not self.val_files or bool(self.files), "data.val_files", self.val_files, "paths, with source `files` alone"
        )
        require(self.text_column != "", "data.text_column", self.text_column, "the name of a column")
        for name in ("vocab_size", "tokenizer_bytes", "seq_len", "batch_size", "num_proc", "probe_examples"):
            require(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "1 or more")
        for name in ("seed", "max_bytes", "max_val_bytes", "val_tokens", "mixture_seed"):
            require(getattr(self, name) >= 0, f"data.{name}", getattr(self, name), "0 or more")
        require(isinstance(self.mixture, Mapping), "data.mixture", self.mixture, "a mapping of tasks to bytes")
        self.portions()

    def portions(self) -> dict[str, Portion]:
        """The tasks that are mixed in. Raises `ConfigError` for one that there isn't, or settings it hasn't."""
        return read_mixture(self.mixture, "data.mixture")


def prepared(config: DataConfig) -> Path:
    """The folder of the token files of a config: from the cache, or made now."""
    cache = Path(config.cache_dir) if config.cache_dir else default_cache_dir()
    source = open_source(
        config.source,
        config.files,
        config.val_files,
        config.text_column,
        config.domain_column,
        config.subset,
        config.revision,
    )
    given = load_tokenizer(config.tokenizer) if config.tokenizer else None
    if given is not None:
        size = given.get_vocab_size(with_added_tokens=True)
        require(
            size <= config.vocab_size,
            "data.vocab_size",
            config.vocab_size,
            f"{size}, the number of ids of the tokenizer {config.tokenizer!r}, or more",
        )
    key = content_key(
        code=_code_hash(),
        library=tokenizers.__version__,
        source=source.fingerprint,
        tokenizer=[given.to_str(), config.eos_token] if given else [config.vocab_size, config.tokenizer_bytes],
        max_bytes=[config.max_bytes, config.max_val_bytes],
        **_mixture_key(config),
    )

    def make_tokenizer(texts: Iterator[str]) -> Tokenizer:
        return given or train_bpe(_first(texts, config.tokenizer_bytes), config.vocab_size)

    def build(folder: Path) -> None:
        limits = dict(zip(SPLITS, (config.max_bytes, config.max_val_bytes), strict=True))
        added = [Document(text, name, "") for name, text in mixed_documents(config.portions(), config.mixture_seed)]
        write_tokens(folder, source, make_tokenizer, limits, config.eos_token, config.num_proc, added)

    return build_once(cache / f"tokens-{key}", build)


def _first(texts: Iterator[str], n_bytes: int) -> Iterator[str]:
    for text in texts:
        yield text
        n_bytes -= len(text.encode())
        if n_bytes <= 0:
            return


def _code_hash() -> str:
    """Of the code that decides what the token files hold, so that a change of it makes new ones."""
    return _hash_of_files(str(module.__file__) for module in (corpus, sources, tokenizer, tokens))


def _mixture_key(config: DataConfig) -> dict[str, Any]:
    """What decides the documents of the mixture; nothing without one, so that other files keep their names."""
    portions = config.portions()
    if not portions:
        return {}
    code = _hash_of_files(sorted(map(str, Path(synthetic.__path__[0]).glob("*.py"))))
    return {"mixture": [code, repr(portions), config.mixture_seed]}


def _hash_of_files(paths: Iterable[str]) -> str:
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()
