"""Engram in other libraries' models: memory attached to a transformers model, trained, saved and loaded alone."""

from engram.interop.attach import Attachment, attach, load_adapter

__all__ = ["Attachment", "attach", "load_adapter"]
