"""First values of a model's parameters, drawn for each module from a seed and the module's name.

So they don't depend on what else the model holds, nor on who draws them: the backbone of a model starts the same at
every split of a sweep's seed, and a process that builds a part of a model draws what one that builds all of it would.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def seed_of(seed: int, name: str) -> int:
    """A seed of its own for a name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def materialize(module: nn.Module, device: torch.device, seed: int, prefix: str = "") -> None:
    """Put all of a module on a device: what it holds already goes there, what is on the meta device is made there and
    drawn by `reset_parameters`, a module's children before itself.

    `prefix` is the module's name in its model. The state of torch's generators stays as it was.
    """
    made: set[nn.Module] = set()
    for name, part in reversed(list(module.named_modules())):
        if _place(part, device) or any(child in made for child in part.children()):
            made.add(part)
            if hasattr(part, "reset_parameters"):
                with torch.random.fork_rng([device] if device.type == "cuda" else []):
                    torch.manual_seed(seed_of(seed, ".".join(filter(None, (prefix, name)))))
                    part.reset_parameters()


def _place(part: nn.Module, device: torch.device) -> bool:
    """Place what the module itself holds; returns whether any of it was on the meta device."""
    made = False

    def place(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal made
        made = made or tensor.is_meta
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)

    part._apply(place, recurse=False)
    return made
