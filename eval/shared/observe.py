"""Hidden states of a model while it runs: after the embedding, after each memory and after each block.

Hooks on the embedding and the blocks hand them out; the model and what comes out of it stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from engram.backbone import EngramLM


class Place(NamedTuple):
    """A place in the residual stream.

    name: what the stream has just passed. depth: blocks passed by then, and a half more if a memory has been added
    since.
    """

    name: str
    depth: float


def places_of(model: EngramLM) -> list[Place]:
    """All places of a model, in the order in which they are passed. Blocks are counted from 0, as in a config."""
    places = [Place("embedding", 0.0)]
    if model.input_memory is not None:
        places.append(Place("memory on the embedding", 0.5))
    for layer in range(len(model.blocks)):
        if str(layer) in model.memory:
            places.append(Place(f"memory before block {layer}", layer + 0.5))
        places.append(Place(f"block {layer}", layer + 1.0))
    return places


@contextmanager
def observed(
    model: EngramLM, places: Sequence[Place], keep: Callable[[Tensor], Tensor] = lambda state: state
) -> Iterator[dict[str, Tensor]]:
    """Inside, each run of the model leaves what `keep` makes of the hidden states at these places, by their names.

    A hidden state is `[B, T, d]`, or `[B, T, M, d]` where there are residual branches. Hooks are gone after it, and
    after an exception.
    """
    states: dict[str, Tensor] = {}

    def before(name: str) -> Any:
        return lambda module, args: states.__setitem__(name, keep(args[0]))

    def after(name: str) -> Any:
        return lambda module, args, out: states.__setitem__(name, keep(out[0] if isinstance(out, tuple) else out))

    blocks = list(model.each_block())
    hooks = []
    try:
        for name, depth in places:
            if depth == 0:
                hooks.append(model.embed.register_forward_hook(after(name)))
            elif depth % 1:  # what a memory makes of the stream is what the block behind it is given
                hooks.append(blocks[int(depth)].register_forward_pre_hook(before(name)))
            else:
                hooks.append(blocks[int(depth) - 1].register_forward_hook(after(name)))
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def mean_branch(state: Tensor) -> Tensor:
    """One stream `[B, T, d]` of a hidden state: the mean of its branches, as a model's last norm is given it."""
    return state.mean(2) if state.ndim == 4 else state
