"""A model as it serves: a prompt read in one pass (prefill), then a token at a time (decoding); and fair timing.

Both go through `EngramLM.step`, with logits of the last position alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engram.backbone import DecodingState, EngramLM
from eval.shared.progress import shown


@torch.no_grad()
def prefill(model: EngramLM, ids_BT: Tensor, room: int) -> tuple[DecodingState, list[Tensor]]:
    """Read prompts; returns the state, with `room` for so many tokens more, and each expert layer's `load_E`."""
    state = model.init_state(len(ids_BT), ids_BT.shape[1] + room)
    return state, _step(model, ids_BT, state)


@torch.no_grad()
def decode(model: EngramLM, ids_BT: Tensor, state: DecodingState) -> list[list[Tensor]]:
    """Take tokens in one after the other, as if each had been drawn; returns each step's `load_E` of expert layers."""
    return [_step(model, ids_BT[:, t : t + 1], state) for t in range(ids_BT.shape[1])]


def _step(model: EngramLM, ids: Tensor, state: DecodingState) -> list[Tensor]:
    output = model.step(ids, state)
    model.logits(output.hidden[:, -1])
    return [stats.load_E for stats in output.routing]


def alternate(
    sides: Mapping[str, Sequence[Callable[[int], object]]], rounds: int, device: torch.device, about: str
) -> dict[str, NDArray[np.float64]]:
    """Seconds of each part of each side, `[rounds, parts]`; a part is called with the number of its round.

    In every round the sides take turns, in another order than in the last, so that what slows the machine for a while
    slows them alike. A first round for warming up is not kept.
    """
    names = list(sides)
    seconds = {name: np.empty((rounds + 1, len(parts))) for name, parts in sides.items()}
    for i in shown(range(rounds + 1), about):
        for name in names if i % 2 else names[::-1]:
            seconds[name][i] = [_seconds(partial(part, i), device) for part in sides[name]]
    return {name: own[1:] for name, own in seconds.items()}


def _seconds(part: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    part()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
