"""A model's parts called one after the other by hand, as no question does it."""

import numpy as np
import torch
from torch import Tensor

from engram.backbone import EngramLM
from engram.backbone.positions import positions_of
from engram.training.data import Batch
from eval.shared.subjects import Subject


@torch.no_grad()
def stepped(model: EngramLM, tokens: Tensor, documents: Tensor | None) -> dict[str, Tensor]:
    """Hidden states after embedding, memories and blocks, by the names that `eval` gives these places."""
    memories = model.memories()
    positions = positions_of(tokens, documents, model.config.attention)
    h = model.embed(tokens)
    states = {"embedding": h}
    if "input" in memories:
        h = states["memory on the embedding"] = h + memories["input"](h, tokens, documents)
    if model.config.branches > 1:
        h = torch.stack([h] * model.config.branches, 2)
    for i, block in enumerate(model.blocks):
        if str(i) in memories:
            h = states[f"memory before block {i}"] = h + memories[str(i)](h, tokens, documents)
        h, _ = block(h, positions)
        states[f"block {i}"] = h
    return states


def held_out_batch(subject: Subject, n_windows: int) -> Batch:
    """The first held-out windows of a subject's run."""
    assert subject.run is not None
    return subject.run.data.val_windows(np.arange(n_windows))
