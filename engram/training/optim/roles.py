"""What a model's parameters are to an optimiser: memory rows, linear maps, embeddings, or small vectors."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from engram.backbone import EngramLM
from engram.experts import Experts, Router
from engram.memory import MemoryTable


class Roles(NamedTuple):
    """The trainable parameters of a model by what they are, whatever their size: a router of 4 experts is a matrix as
    one of 64 is, so that optimisers treat it alike at every point of a sweep.

    tables: memory rows. matrices: 2-D linear maps. stacks: 3-D, the matrices of E experts. embeddings: one vector for
    each token, to read or to score against. vectors: norms, biases, taps of convolutions and other scales.
    """

    tables: list[nn.Parameter]
    matrices: list[nn.Parameter]
    stacks: list[nn.Parameter]
    embeddings: list[nn.Parameter]
    vectors: list[nn.Parameter]

    @classmethod
    def of(cls, model: EngramLM) -> Roles:
        """Every trainable parameter of a model, once, under its role."""
        roles = cls([], [], [], [], [])
        seen: set[int] = set()
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    roles._list_for(module, parameter, is_head=parameter is model.head_weight).append(parameter)
        return roles

    def _list_for(self, module: nn.Module, parameter: nn.Parameter, is_head: bool) -> list[nn.Parameter]:
        if is_head or isinstance(module, nn.Embedding):
            return self.embeddings
        if isinstance(module, MemoryTable):
            return self.tables
        if isinstance(module, Experts):
            return self.stacks
        is_map = isinstance(module, nn.Linear | Router) and parameter.ndim == 2
        return self.matrices if is_map else self.vectors
