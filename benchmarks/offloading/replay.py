"""A step of decoding recorded once as a CUDA graph and replayed, as serving systems do: the host launches one thing.

Where the device itself reads the table, its side stream is part of the graph; a cache that learns can't be.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from engram import EngramLM
from engram.backbone import DecodingState


class ReplayedStep:
    """The steps that follow `state`, by graph: `step(ids [B, 1])` gives logits `[B, V]`, to be used before the next.

    `state` is used up: what moves in it is the graph's from then on.
    """

    def __init__(self, model: EngramLM, state: DecodingState) -> None:
        device = state.real.device
        self.ids = torch.zeros(state.batch_size, 1, dtype=torch.int64, device=device)
        self.graph = torch.cuda.CUDAGraph()
        self.state, self.moving = state, _moving(state)  # kept: replays read and write them where they lie
        stream, current = _recording(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream), torch.no_grad():
            self.graph.capture_begin()
            try:
                self.logits = model.logits(model.step(self.ids, state).hidden[:, -1])
                # The next replay begins where this one ends.
                pairs = list(zip(self.moving, _moving(state), strict=True))
                for kind in {after.dtype for _, after in pairs}:  # of one type, many are copied by one launch
                    some = [pair for pair in pairs if pair[1].dtype == kind]
                    torch._foreach_copy_([before for before, _ in some], [after for _, after in some])
            finally:
                self.graph.capture_end()
        current.wait_stream(stream)

    def __call__(self, ids: Tensor) -> Tensor:
        self.ids.copy_(ids)
        self.graph.replay()
        return self.logits


@functools.cache
def _recording(device: torch.device) -> torch.cuda.Stream:
    """One stream for all recordings: each would get a workspace for its products of matrices."""
    return torch.cuda.Stream(device)


def _moving(state: DecodingState) -> list[Tensor]:
    """What a step puts anew in a state; keys, values and `real` are written in place."""
    return pytree.tree_leaves((state.next_position, state.length, state._undoable, state.memory))
