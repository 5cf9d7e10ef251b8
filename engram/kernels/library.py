"""The namespace `torch.ops.engram`, and how an operator gets into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("engram", "DEF")


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any], *, replayed: bool = True) -> Any:
    """Register `name(arguments) -> results` and return the operator.

    `reference` runs on every device that has no kernel of its own; `fake` makes outputs of the right shapes, for the
    compiler. An operator that is not `replayed` changes what Python holds, or lets the host wait for the device: a
    compiler leaves it out of CUDA graphs, which would do neither again.
    """
    name = schema.split("(", 1)[0]
    tags = (torch.Tag.pt2_compliant_tag,) if replayed else (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
    LIBRARY.define(schema, tags=tags)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"engram::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.engram, name).default
