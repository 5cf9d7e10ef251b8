"""Whether two sets of tokens are sent to other experts, beside what chance would give in the same documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eval.shared.progress import shown

Ints = NDArray[np.int64]
_DRAWS = 200
_SEED = 0
_CHUNK = 2**13  # tokens at once


def loads(experts: NDArray[Any], n_experts: int) -> Ints:
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


class Turned:
    """Labels of a text turned within their documents, each by a random distance, in `_DRAWS` ways.

    `documents` `[n]` in the order of the text, so that each stands in one piece.
    """

    def __init__(self, documents: Ints) -> None:
        self._first = np.flatnonzero(np.diff(documents, prepend=documents[:1] - 1))
        self._lengths = np.diff(np.append(self._first, len(documents)))
        draws = (np.random.default_rng((_SEED, draw)).integers(0, self._lengths) for draw in range(_DRAWS))
        self._distances = np.stack([*draws])

    def sources(self, places: Ints) -> Ints:
        """Where the label of each place comes from, `[draws, places]`."""
        document = np.searchsorted(self._first, places, side="right") - 1
        first, length = self._first[document], self._lengths[document]
        moved = places + self._distances[:, document]
        return np.where(moved >= first + length, moved - length, moved)


def compared(
    experts: NDArray[Any],
    n_experts: int,
    documents: Ints,
    contrast: Contrast,
    layers: Sequence[int],
    about: str = "",
    device: torch.device | str = "cpu",
) -> list[dict[str, Any]]:
    """Divergence of the loads of two sets, for some layers of choices `[N, L, K]`, beside what turning by chance gives.

    null: its mean and 95 % quantile. p: the share of draws, the labels as they are among them, that reach it. All
    without a value where one set is empty.
    """
    sizes = {"first": int((contrast.side == 1).sum()), "second": int((contrast.side == -1).sum())}
    if not all(sizes.values()):
        return [{**sizes, "bits": None, "null": None, "p": None} for _ in layers]
    told = []
    for layer in _loads_of_sides(experts, n_experts, documents, contrast, layers, about, device):
        found, *null = (divergence(first, second) for first, second in layer.swapaxes(0, 1))
        told.append(
            {
                **sizes,
                "bits": found,
                "null": {"mean": np.mean(null), "high": np.quantile(null, 0.95)},
                "p": (1 + (np.array(null) >= found - 1e-12).sum()) / (1 + len(null)),
            }
        )
    return told


def _loads_of_sides(
    experts: NDArray[Any],
    n_experts: int,
    documents: Ints,
    contrast: Contrast,
    layers: Sequence[int],
    about: str,
    device: torch.device | str,
) -> NDArray[np.float64]:
    """Loads `[L, 2, 1 + draws, E]` of both sets, as they are and with labels turned: for some tokens at a time the
    product of all labels with the experts chosen, whole numbers that float32 holds exactly."""
    turned, n, L = Turned(documents[contrast.tokens]), len(contrast.tokens), len(layers)
    found = torch.zeros(L, 2 * (1 + _DRAWS), n_experts, dtype=torch.float64, device=device)
    for start in shown(range(0, n, _CHUNK), about):
        places = np.arange(start, min(start + _CHUNK, n))
        side = torch.from_numpy(contrast.side[np.concatenate([places[None], turned.sources(places)])]).to(device)
        members = torch.cat([side == 1, side == -1]).float()
        chosen = torch.from_numpy(experts[contrast.tokens[places]][:, layers].astype(np.int64)).to(device)
        for layer, choices in zip(found, chosen.unbind(1), strict=True):
            taken = members.new_zeros(len(places), n_experts)
            layer += members @ taken.scatter_add_(1, choices, torch.ones_like(choices, dtype=taken.dtype))
    return found.view(L, 2, 1 + _DRAWS, n_experts).cpu().numpy()
