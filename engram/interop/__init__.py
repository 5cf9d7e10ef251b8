"""Engram in other libraries' models: memory attached to a transformers model, trained, saved and loaded alone."""

from engram.interop.adapter import load_adapter
from engram.interop.attach import Attachment, attach

__all__ = ["Attachment", "attach", "load_adapter"]
