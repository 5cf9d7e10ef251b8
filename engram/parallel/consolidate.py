"""A checkpoint's model as safetensors files, made without ever holding it: tensors are loaded into the mapped files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engram.parallel.checkpoint import fill, named_errors, open_checkpoint
from engram.parallel.state import Piece, pieces_of
from engram.tensor_files import Shapes, create, size_of

WEIGHTS, INDEX, PARTS = "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"
_FILE_BYTES = 2**35


def consolidate(
    checkpoint: Path,
    folder: Path,
    extra: dict[str, Tensor],
    metadata: dict[str, str] | None = None,
    file_bytes: int = _FILE_BYTES,
) -> list[Path]:
    """Write the model of a checkpoint to `folder` as one safetensors file, or several with an index.

    Args:
        checkpoint: a folder that `CheckpointWriter` saved, with any number of processes.
        folder: an empty one.
        extra: other tensors to put beside the model's.
        metadata: to put into the header of each file.
        file_bytes: largest size of a file, unless one tensor is larger.

    Returns:
        The files.

    Raises:
        ConfigError: naming the checkpoint, if it can't be read.
        OSError: when the disk refuses, or has no room.
    """
    with named_errors(checkpoint, "read"):
        reader, saved = open_checkpoint(checkpoint)
        shapes = model_shapes(saved) | {name: (tensor.shape, tensor.dtype) for name, tensor in extra.items()}
        parts = _divided(shapes, file_bytes)
    names = (
        [WEIGHTS]
        if len(parts) == 1
        else [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    )
    for name, part in zip(names, parts, strict=True):
        # The format's name is what transformers and accelerate ask for.
        tensors = create(folder / name, part, {"format": "pt", **(metadata or {})})
        for key in tensors.keys() & extra.keys():
            tensors[key].copy_(extra[key])
        own = {f"model.{key}": value for key, value in tensors.items() if key not in extra}
        with named_errors(checkpoint, "read"):
            fill({k: v for key, value in own.items() for k, v in _entries(key, value, saved)}, saved, reader)
    if len(parts) > 1:
        index = {
            "metadata": {"total_size": sum(size_of(*shape) for shape in shapes.values())},
            "weight_map": {key: name for name, part in zip(names, parts, strict=True) for key in part},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return [folder / name for name in names]


def _entries(key: str, value: Tensor, saved: dict[str, Any]) -> list[tuple[str, Tensor]]:
    return [(key, value)] if key in saved else list(pieces_of(key, 0, 1, value))


def model_shapes(saved: dict[str, Any]) -> Shapes:
    """Shapes and types of a checkpoint's model, by names in the model; `saved` is what `open_checkpoint` tells."""
    shapes: Shapes = {}
    for entry, described in saved.items():
        piece = Piece.parse(entry)
        name = piece.name if piece else entry
        if name.startswith("model."):
            size = described.size
            if piece:
                last = piece.first + piece.stride * (piece.start + size[0] - 1)
                rows = max(last + 1, shapes[name[6:]][0][0] if name[6:] in shapes else 0)
                size = torch.Size([rows, *size[1:]])
            shapes[name[6:]] = size, described.properties.dtype
    return shapes


def _divided(shapes: Shapes, file_bytes: int) -> list[Shapes]:
    parts: list[Shapes] = [{}]
    room = file_bytes
    for name, shape in shapes.items():
        if parts[-1] and size_of(*shape) > room:
            parts.append({})
            room = file_bytes
        parts[-1][name] = shape
        room -= size_of(*shape)
    return parts
