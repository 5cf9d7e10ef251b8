"""Questions asked as a user asks them, and what plain loops say of the same checkpoints."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from eval.shared.command import run
from eval.shared.subjects import Subject


def answer_of(name: str, output: Path, checkpoint: Path, *more: str | Path) -> dict[str, Any]:
    """The whole JSON that a question leaves."""
    code = run(name, ["--checkpoint", str(checkpoint), "--output", str(output), *map(str, more)])
    assert code == 0
    return json.loads((output / f"{name}.json").read_text(), parse_constant=lambda word: 1 / 0)  # NaN is no JSON


def suffixes(ids: Any, documents: Any, order: int, pad: int, lookup: Any) -> list[tuple[int, ...]]:
    """The suffix N-gram of each position of one window, as a tuple, oldest id first."""
    found = []
    for t in range(len(ids)):
        gram = []
        for back in reversed(range(order)):
            inside = t - back >= 0 and documents[t - back] == documents[t]
            gram.append(int(lookup[ids[t - back]]) if inside else pad)
        found.append(tuple(gram))
    return found


def seen_in_training(subject: Subject, order: int) -> Counter[tuple[int, ...]]:
    """Suffix N-grams of the batches that the run trained on, step by step."""
    assert subject.run is not None
    data, counts = subject.run.data, Counter[tuple[int, ...]]()
    lookup = data.compressor().lookup.numpy()
    for step in range(subject.run.samples // data.config.batch_size):
        batch = data.train_batch(step)
        for ids, documents in zip(batch["tokens"].numpy(), batch["document_ids"].numpy(), strict=True):
            counts.update(suffixes(ids, documents, order, lookup[data.pad_id], lookup))
    return counts


def held_out_suffixes(subject: Subject, n_windows: int, order: int) -> list[list[tuple[int, ...]]]:
    """Suffix N-grams of the first held-out windows."""
    assert subject.run is not None
    data = subject.run.data
    lookup = data.compressor().lookup.numpy()
    batch = data.val_windows(np.arange(n_windows))
    pairs = zip(batch["tokens"].numpy(), batch["document_ids"].numpy(), strict=True)
    return [suffixes(ids, documents, order, lookup[data.pad_id], lookup) for ids, documents in pairs]


def scipys_interval(sums: Any, over: Any) -> Any:
    """The 95 % interval, `low` and `high`, of a ratio of two sums over documents, by scipy's bootstrap of pairs."""
    return stats.bootstrap(
        (sums, over),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=4000,
        random_state=3,
    ).confidence_interval
