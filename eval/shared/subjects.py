"""The checkpoints that a question is asked of: model, tokenizer, and the run that trained them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from engram.backbone import EngramLM
from engram.budget import ParameterBudget
from engram.config import ConfigError, build_config, load_yaml, require
from engram.inference.opening import open_model
from engram.parallel.checkpoint import CHECKPOINTS, is_checkpoint, last_checkpoint, read_run
from engram.training.data import TokenData
from engram.training.prepare import DataConfig
from engram.training.recorder import RESULT
from engram.training.windows import sample_windows


@dataclass(frozen=True)
class TrainingRun:
    """What a checkpoint was trained on.

    data: its token files and the order of their windows. corpus: hash of their text. samples: windows trained on by
    then, epochs counted. result: the run's `result.json`; empty if it is not finished.
    """

    data: TokenData
    corpus: str
    samples: int
    result: dict[str, Any]

    def windows(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Numbers of the windows of the training split that were trained on, ascending, and how often each was."""
        n = self.data.n_train_windows
        epochs, rest = divmod(self.samples, n)
        times = np.full(n, epochs, np.int64)
        places = np.arange(epochs * n, epochs * n + rest, dtype=np.int64)
        times[sample_windows(places, n, self.data.config.seed)] += 1
        seen = np.flatnonzero(times)
        return seen, times[seen]


@dataclass(frozen=True)
class Subject:
    """A checkpoint; `run` is None if it lies in no run's folder."""

    name: str
    path: Path
    model: EngramLM
    tokenizer: Tokenizer | None
    run: TrainingRun | None

    @cached_property
    def budget(self) -> ParameterBudget:
        """Its counts, at the length it was trained with if that is known."""
        return ParameterBudget.of(self.model.config, None if self.run is None else self.run.data.config.seq_len)

    @property
    def memory_kind(self) -> str | None:
        """Of its memory; None if it has none."""
        config = self.model.config
        return config.memory.kind if config.memory is not None and config.has_memory else None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.embed.weight.device

    def describe(self) -> dict[str, Any]:
        """What a page says of it."""
        run = self.run
        return {
            "name": self.name,
            "path": str(self.path),
            "rho": self.budget.rho,
            "total": self.budget.total,
            "active": self.budget.active,
            "flops_per_token": self.budget.flops,
            "memory": self.memory_kind,
            "tokens": None if run is None else run.samples * run.data.config.seq_len,
            "corpus_hash": None if run is None else run.corpus,
            "seed": run.result.get("seed") if run is not None else None,
        }


def open_subjects(
    paths: Sequence[Path],
    names: Sequence[str] = (),
    device: torch.device | str = "cpu",
    own_text: bool = True,
    any_text: bool = True,
) -> list[Subject]:
    """Open checkpoints: runs' folders, checkpoints' or models'. Their names are those given, or their folders'.

    `own_text`: the text that they were trained on is needed; else a run whose text can't be had any more is left out.
    `any_text`: text is needed at all; else that of runs is not looked for, and may not be what it was.

    Raises `ConfigError` naming a path that leads to no model, a run whose corpus can't be had any more, names that are
    too few or equal, and tokenizers that differ.
    """
    require(len(names) in (0, len(paths)), "names", list(names), f"{len(paths)}: one for each checkpoint, or none")
    chosen = list(names) or _names_of(paths)
    require(len(set(chosen)) == len(chosen), "names", chosen, "names that differ")
    subjects = [_open(name, path, device, own_text, any_text) for name, path in zip(chosen, paths, strict=True)]
    texts = {subject.name: subject.tokenizer.to_str() for subject in subjects if subject.tokenizer is not None}
    for name, text in texts.items():
        first = next(iter(texts))
        if text != texts[first]:
            raise ConfigError(f"{first!r} and {name!r} have different tokenizers: their tokens can't be compared")
    return subjects


def _names_of(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many of them as tell them apart; a run's `model` is called as the run."""
    parts = [without_model(path).resolve().parts for path in paths]
    longest = max(map(len, parts))
    found = [["/".join(each[-n:]) for each in parts] for n in range(1, longest + 1)]
    return next((names for names in found if len(set(names)) == len(names)), found[-1])


def _open(name: str, path: Path, device: torch.device | str, own_text: bool, any_text: bool) -> Subject:
    model, tokenizer = open_model(path)
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch built without CUDA
        raise ConfigError(f"device is {str(device)!r}: {str(error).splitlines()[0]}") from error
    try:
        run = _run_of(path, any_text)
    except ConfigError:
        if own_text:
            raise
        run = None
    return Subject(name, path, model, tokenizer, run)


def run_folder(path: Path) -> Path | None:
    """The folder of the run that a path's model comes from: its own, that of its `model`, or that of its checkpoint."""
    return next((each for each in (path, *path.resolve().parents[:2]) if (each / "config.yaml").is_file()), None)


def without_model(path: Path) -> Path:
    """The run's folder for its `model`, which leads to the same; any other path as it is."""
    run = run_folder(path)
    return run if run is not None and path.resolve() == run.resolve() / "model" else path


def _run_of(path: Path, check: bool) -> TrainingRun | None:
    """The run that a path's model comes from, by `run_folder`."""
    folder = run_folder(path)
    if folder is None:
        return None
    checkpoint = path if is_checkpoint(path) else last_checkpoint(folder / CHECKPOINTS)
    if (folder / RESULT).is_file() and not is_checkpoint(path):
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        config = build_config(DataConfig, result["data"]["config"])
        samples, corpus = result["tokens"] // config.seq_len, result["data"]["corpus_hash"]
    elif checkpoint is not None:
        result = {}
        config = build_config(DataConfig, load_yaml(folder / "config.yaml")["data"]["config"])
        state = read_run(checkpoint)["TokenData"]
        samples, corpus = state["step"] * config.batch_size, state["order"]["corpus_hash"]
    else:
        return None
    data = TokenData(config)
    if check and data.corpus_hash != corpus:
        raise ConfigError(
            f"{str(path)!r} was trained on corpus {corpus[:12]}, but data.source {config.source!r} now gives "
            f"{data.corpus_hash[:12]}: name a text to evaluate on with --data"
        )
    return TrainingRun(data, corpus, samples, result)
