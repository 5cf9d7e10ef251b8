"""The data of a run: windows of T tokens from a token file, in an order that the seed and the step alone decide.

Every point of a sweep sees the same tokens in the same order, on any number of ranks, and a resumed run goes on at
the exact next window. Batches carry document ids, so that neither attention nor N-grams cross a document boundary.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from engram.config import require
from engram.memory.compression import TokenCompressor
from engram.training.prepare import DataConfig, prepared
from engram.training.tokens import TokenFile, read_meta
from engram.training.windows import sample_windows

__all__ = ["Batch", "DataConfig", "TokenData"]

Batch = dict[str, Tensor]


class TokenData(lightning.LightningDataModule):
    """Training and validation batches; makes the token files at first use and finds them in the cache later.

    A batch holds int64 [B, T] tensors: `tokens`, `targets` (the next token, across document boundaries too: the
    first token of a document is predicted from the end-of-text token before it) and `document_ids` (the number of the
    token's document in its split). Validation batches also hold, of the target, `target_documents` (the number of its
    document), `domains` (of its domain), `target_bytes` (bytes of text, 0 for the end of text), and `repeated` (see
    `repeats`).

    With `look_ahead` a training batch also holds `next_tokens` and `next_document_ids`, those of the batch after it.

    A checkpoint keeps `step`, the number of batches trained on so far, and training goes on from there.
    """

    def __init__(self, config: DataConfig) -> None:
        super().__init__()
        self.config = config
        self.look_ahead = False
        self._loaded_step = 0

    @property
    def step(self) -> int:
        """Batches trained on so far: the trainer's count, or without one that of the state loaded last."""
        if self.trainer is None:
            return self._loaded_step
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]

    @cached_property
    def folder(self) -> Path:
        """Folder of the token files, made if it is not in the cache. Raises `ConfigError` for data it cannot use."""
        return prepared(self.config)

    @cached_property
    def meta(self) -> dict[str, Any]:
        """What the token files record about themselves."""
        return read_meta(self.folder)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the token files."""
        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    @property
    def vocab_size(self) -> int:
        """Number of ids of the model's vocabulary; the tokenizer uses no more than that."""
        return self.config.vocab_size

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, by number."""
        return tuple(self.meta["domains"])

    @property
    def eos_id(self) -> int:
        """Id of the end-of-text token."""
        return int(self.meta["eos_id"])

    @property
    def pad_id(self) -> int:
        """Id of the padding token."""
        return int(self.meta["pad_id"])

    @property
    def corpus_hash(self) -> str:
        """Hex SHA-256 of all documents in use, in order: equal hashes mean equal text in equal splits."""
        return str(self.meta["corpus_hash"])

    def compressor(self) -> TokenCompressor:
        """The tokenizer compression of the whole vocabulary."""
        return TokenCompressor.from_tokenizer(self.tokenizer, self.vocab_size)

    def describe(self) -> dict[str, Any]:
        """What a result must say about its data: source, corpus hash; documents, tokens, bytes by split and domain."""
        return {
            "source": self.config.source,
            "corpus_hash": self.corpus_hash,
            "vocab_size": self.vocab_size,
            "splits": self.meta["splits"],
            "train_windows": self.n_train_windows,
            "validation_windows": self.n_val_windows,
        }

    @cached_property
    def _train(self) -> TokenFile:
        return TokenFile.open(self.folder, "train")

    @cached_property
    def _validation(self) -> TokenFile:
        return TokenFile.open(self.folder, "validation")

    @property
    def n_train_windows(self) -> int:
        """Windows of an epoch."""
        return self._count_windows(self._train, "train")

    @property
    def n_val_windows(self) -> int:
        """Windows that validation scores: whole batches of the first `val_tokens` held-out tokens."""
        n = self.n_held_out_windows
        if self.config.val_tokens:
            n = max(1, min(n, self.config.val_tokens // self.config.seq_len))
        return n - n % min(n, self.config.batch_size)

    @property
    def n_held_out_windows(self) -> int:
        """All windows of the validation split."""
        return self._count_windows(self._validation, "validation")

    def _count_windows(self, file: TokenFile, split: str) -> int:
        n = (len(file.tokens) - 1) // self.config.seq_len
        require(
            n >= 1, "data.seq_len", self.config.seq_len, f"below the {len(file.tokens)} tokens of the {split} split"
        )
        return n

    def train_batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Rows of this rank of the batch of a step: the ranks' rows in order are the rows of a single process."""
        rows = _slice_of_rank(self.config.batch_size, rank, world_size)
        samples = np.int64(step) * self.config.batch_size + rows
        return self.train_windows(sample_windows(samples, self.n_train_windows, self.config.seed))

    def val_batch(self, index: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Rows of this rank of a validation batch."""
        size = min(self.n_val_windows, self.config.batch_size)
        return self.val_windows(index * size + _slice_of_rank(size, rank, world_size))

    def train_windows(self, windows: NDArray[np.int64]) -> Batch:
        """Windows of the training split, by number."""
        return self._batch(self._train, windows)

    def val_windows(self, windows: NDArray[np.int64]) -> Batch:
        """Windows of the validation split, by number; of them `n_val_windows` are scored in training."""
        return self._batch(self._validation, windows)

    def _batch(self, file: TokenFile, windows: NDArray[np.int64]) -> Batch:
        positions = windows[:, None] * self.config.seq_len + np.arange(self.config.seq_len + 1)
        ids = file.tokens[positions].astype(np.int64)
        documents = file.document_at(positions)
        batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "document_ids": documents[:, :-1]}
        if file.n_bytes is not None:
            batch["target_documents"] = documents[:, 1:]
            batch["domains"] = file.domain_of(documents[:, 1:])
            batch["target_bytes"] = file.n_bytes[positions[:, 1:]].astype(np.int64)
            batch["repeated"] = repeats(batch["tokens"], batch["targets"], batch["document_ids"])
        return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in batch.items()}

    def prepare_data(self) -> None:
        """Make the token files (Lightning calls this in one process of each machine)."""
        _ = self.folder

    def train_dataloader(self) -> TrainBatches:
        """Endless batches from `step` on."""
        return TrainBatches(self, *self._place())

    def val_dataloader(self) -> ValBatches:
        """The validation batches, in the order of the file."""
        return ValBatches(self, *self._place())

    def _place(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def state_dict(self) -> dict[str, Any]:
        """The number of batches trained on, and what they were cut from."""
        return {"step": self.step, "order": self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the batches of the checkpoint. Raises `ConfigError` if they came from other data."""
        for name, value in self._order().items():
            saved = state_dict["order"][name]
            require(value == saved, f"data {name}", value, f"that of the checkpoint, {saved!r}")
        self._loaded_step = state_dict["step"]

    def _order(self) -> dict[str, Any]:
        """All that decides which tokens a step sees."""
        sizes = {name: getattr(self.config, name) for name in ("seq_len", "batch_size", "seed")}
        return {"corpus_hash": self.corpus_hash, **sizes}


class TrainBatches:
    """Endless training batches of one rank, from the data's current step on. Cheap enough to need no worker."""

    def __init__(self, data: TokenData, rank: int, world_size: int) -> None:
        self._data, self._rank, self._world_size = data, rank, world_size

    def __iter__(self) -> Iterator[Batch]:
        batch = self._get(self._data.step)
        for step in count(self._data.step + 1):
            following = self._get(step)
            if self._data.look_ahead:
                batch |= {"next_tokens": following["tokens"], "next_document_ids": following["document_ids"]}
            yield batch
            batch = following

    def _get(self, step: int) -> Batch:
        return self._data.train_batch(step, self._rank, self._world_size)

    def state_dict(self) -> dict[str, Any]:
        """Empty: the data module keeps the step. That this exists tells Lightning that the loader resumes exactly."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


class ValBatches:
    """The validation batches of one rank."""

    def __init__(self, data: TokenData, rank: int, world_size: int) -> None:
        self._data, self._rank, self._world_size = data, rank, world_size

    def __len__(self) -> int:
        return -(-self._data.n_val_windows // self._data.config.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for index in range(len(self)):
            yield self._data.val_batch(index, self._rank, self._world_size)


def repeats(tokens: NDArray[np.int64], targets: NDArray[np.int64], documents: NDArray[np.int64]) -> NDArray[np.int64]:
    """1 where the same token was followed by the same target before, in the same document of the window; else 0.

    There a model that copies from its context needs no other knowledge (the hits of arXiv:2312.04927).
    Arguments and result `[B, T]`.
    """
    pairs = np.unique(np.stack([documents, tokens, targets], -1).reshape(-1, 3), axis=0, return_inverse=True)[1]
    pairs = pairs.reshape(tokens.shape)
    order = np.argsort(pairs, axis=1, kind="stable")
    in_order = np.take_along_axis(pairs, order, axis=1)
    again = np.zeros_like(tokens)
    np.put_along_axis(again, order[:, 1:], (in_order[:, 1:] == in_order[:, :-1]).astype(np.int64), axis=1)
    return again


def _slice_of_rank(n_rows: int, rank: int, world_size: int) -> NDArray[np.int64]:
    require(n_rows % world_size == 0, "data.batch_size", n_rows, f"a multiple of the number of ranks ({world_size})")
    size = n_rows // world_size
    return np.arange(rank * size, (rank + 1) * size)
