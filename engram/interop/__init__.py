"""Engram among others' models, weights and tools: each module is imported by its name, and asks for what it needs.

What attaches memory to a transformers model can also be had from here; it is imported when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engram.interop.attachment import Attachment, attach, load_adapter

__all__ = ["Attachment", "attach", "load_adapter"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from engram.interop import attachment

    return getattr(attachment, name)
