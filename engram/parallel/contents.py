"""A checkpoint's table of contents, which `torch.distributed.checkpoint` pickles, read from anywhere without a risk.

A pickle calls what it names, and changes what it can reach. So a name in it leads to what such a table is made of, and
never to anything that this process shares.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

CONTENTS = ".metadata"


class SafeReader(FileSystemReader):
    """A reader for checkpoints from anywhere: of tensors alone, since torch unpickles entries of any other kind."""

    _contents: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The table of contents. Raises `pickle.UnpicklingError` if it names anything that none of tensors needs."""
        if self._contents is None:
            with (Path(self.path) / CONTENTS).open("rb") as file:
                self._contents = _Unpickler(file).load()
        assert self._contents is not None
        return self._contents


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"its table of contents names {module}.{name}") from None


class _Sealed(type):
    """Of classes that a pickle can use, and not change."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"its table of contents changes {cls.__name__}")


def _maker(made: type) -> type:
    """In the place of a class: makes instances of that, without values yet, whatever it is called with."""
    return _Sealed(made.__name__, (), {"__new__": lambda *_: object.__new__(made)})


class _Properties(TensorProperties):
    """The type of an entry; the rest is not read."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = state[0]


class _Unread:
    """What nobody asks for: how a tensor was laid out, and in which folder it was saved."""


_MODULE, _UNREAD = "torch.distributed.checkpoint.metadata", _maker(_Unread)
_NAMES: dict[tuple[str, str], Any] = {
    (_MODULE, "Metadata"): _maker(Metadata),
    (_MODULE, "MetadataIndex"): _maker(MetadataIndex),
    (_MODULE, "TensorStorageMetadata"): _maker(TensorStorageMetadata),
    (_MODULE, "ChunkStorageMetadata"): _maker(ChunkStorageMetadata),
    (_MODULE, "TensorProperties"): _maker(_Properties),
    (_MODULE, "StorageMeta"): _UNREAD,
    (_MODULE, "_MEM_FORMAT_ENCODING"): _UNREAD,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _maker(_StorageInfo),
    ("torch.serialization", "_get_layout"): _UNREAD,
    # From Python 3.13 on in the second module.
    **{(module, f"{kind}Path"): _UNREAD for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")},
    ("torch", "Size"): torch.Size,
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}
