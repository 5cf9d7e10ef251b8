"""Whether two sets of tokens are sent to other experts, beside what chance would give in the same documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.shared.progress import shown

Ints = NDArray[np.int64]
_DRAWS = 200
_SEED = 0


def loads(experts: NDArray[np.int32], n_experts: int) -> Ints:
    """How often each expert was chosen `[E]`, of choices of any shape."""
    return np.bincount(experts.ravel(), minlength=n_experts)


def entropy(counts: NDArray[Any]) -> float:
    """Entropy in nats of shares that are in proportion to counts."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def divergence(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Jensen-Shannon divergence in bits of shares in proportion to counts."""
    p, q = first / first.sum(), second / second.sum()
    return float((entropy((p + q) / 2) - entropy(p) / 2 - entropy(q) / 2) / np.log(2))


@dataclass(frozen=True)
class Contrast:
    """Two sets of tokens whose routing is compared.

    tokens: numbers of those that it is about, in the order of the text. side: of each of them, 1 in the first set, -1
    in the second, 0 in neither.
    """

    tokens: Ints
    side: NDArray[np.int8]


def turned(documents: Ints, draw: int) -> Ints:
    """Where the label of each place comes from if labels are turned within their documents, each by a random distance.

    `documents` `[n]` in the order of the text, so that each stands in one piece.
    """
    first = np.flatnonzero(np.diff(documents, prepend=documents[:1] - 1))
    lengths = np.diff(np.append(first, len(documents)))
    starts, sizes = np.repeat(first, lengths), np.repeat(lengths, lengths)
    distances = np.repeat(np.random.default_rng((_SEED, draw)).integers(0, lengths), lengths)
    return starts + (np.arange(len(documents)) - starts + distances) % sizes


def compared(
    experts: NDArray[np.int32], n_experts: int, documents: Ints, contrast: Contrast, about: str = ""
) -> list[dict[str, Any]]:
    """Divergence of the loads of two sets, by layer of choices `[L, N, K]`, beside what labels turned by chance give.

    null: its mean and 95 % quantile. p: the share of draws, the labels as they are among them, that reach it. All
    without a value where one set is empty.
    """
    side, of, documents = contrast.side, experts[:, contrast.tokens], documents[contrast.tokens]

    def divergences(side: NDArray[np.int8]) -> list[float]:
        return [divergence(*(loads(layer[side == which], n_experts) for which in (1, -1))) for layer in of]

    sizes = {"first": int((side == 1).sum()), "second": int((side == -1).sum())}
    if not all(sizes.values()):
        return [{**sizes, "bits": None, "null": None, "p": None} for _ in of]
    found = np.array(divergences(side))
    null = np.array([divergences(side[turned(documents, draw)]) for draw in shown(range(_DRAWS), about)])  # [draws, L]
    return [
        {
            **sizes,
            "bits": found[i],
            "null": {"mean": null[:, i].mean(), "high": np.quantile(null[:, i], 0.95)},
            "p": (1 + (null[:, i] >= found[i] - 1e-12).sum()) / (1 + len(null)),
        }
        for i in range(len(of))
    ]
