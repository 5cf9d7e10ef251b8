"""How often a run was told each fact of its mixture: sentences that stood whole in a window it was trained on.

The training documents tell a fact an exact number of times, but a run takes some of the windows, some of them more than
once, and a window's edge can cut a sentence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engram.synthetic.facts import TEMPLATES, Fact, Facts
from engram.synthetic.mixture import mixed_documents
from engram.training.data import TokenData
from engram.training.tokens import TokenFile

Ints = NDArray[np.int64]
_SENTENCE_END = len(".")


def questions_about(fact: Fact) -> list[str]:
    """The sentences that tell it, up to the value."""
    return [fact.sentence(i)[:-_SENTENCE_END] for i in range(len(TEMPLATES[fact.place]))]


def times_told(
    data: TokenData, facts: Sequence[Fact], windows: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> list[int]:
    """For each fact how often a run on `data` was told it, in `windows`: their numbers, and how often each was read."""
    times = np.zeros(data.n_train_windows, np.int64)
    times[windows[0]] = windows[1]
    number = {text: i for i, fact in enumerate(facts) for text in questions_about(fact)}
    told, T = np.zeros(len(facts), np.int64), data.config.seq_len
    file = TokenFile.open(data.folder, "train")
    firsts = file.starts[:-1][file.domains == data.domains.index(Facts.name)]
    mixed = mixed_documents(data.config.portions(), data.config.mixture_seed)
    texts = [text for task, text in mixed if task == Facts.name]
    encodings = data.tokenizer.encode_batch(texts, add_special_tokens=False)
    for first, text, encoding in zip(firsts, texts, encodings, strict=True):
        at = 0
        ends = np.array([end for _, end in encoding.offsets])
        for line in text.splitlines():
            stop = at + len(line) - _SENTENCE_END  # after the value
            a = int(first + np.searchsorted(ends, at, side="right"))
            b = int(first + np.searchsorted(ends, stop, side="left"))
            # A window's T tokens predict the next ones, so its last target is one token further.
            window = a // T
            if b <= (window + 1) * T and window < len(times):
                told[number[line[:-_SENTENCE_END]]] += times[window]
            at += len(line) + 1
    return told.tolist()
