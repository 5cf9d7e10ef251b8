"""A checkpoint's model as safetensors files, made without ever holding it: tensors are loaded into the mapped files.

The format (https://github.com/huggingface/safetensors): the length of a header, a header in JSON that says where each
tensor lies, then the tensors. The library writes only what is in memory.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engram.parallel.checkpoint import fill, named_errors, open_checkpoint
from engram.parallel.state import Piece, pieces_of

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}
_FILE_BYTES = 2**35

Shapes = dict[str, tuple[torch.Size, torch.dtype]]


def consolidate(checkpoint: Path, folder: Path, extra: dict[str, Tensor], file_bytes: int = _FILE_BYTES) -> list[Path]:
    """Write the model of a checkpoint to `folder` as one safetensors file, or several with an index.

    Args:
        checkpoint: a folder that `CheckpointWriter` saved, with any number of processes.
        folder: an empty one.
        extra: other tensors to put beside the model's.
        file_bytes: largest size of a file, unless one tensor is larger.

    Returns:
        The files.

    Raises:
        ConfigError: naming the checkpoint, if it can't be read.
    """
    with named_errors(checkpoint, "read"):
        reader, saved = open_checkpoint(checkpoint)
        shapes = _shapes(saved) | {name: (tensor.shape, tensor.dtype) for name, tensor in extra.items()}
        parts = _divided(shapes, file_bytes)
        names = (
            [WEIGHTS]
            if len(parts) == 1
            else [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
        )
        for name, part in zip(names, parts, strict=True):
            tensors = _create(folder / name, part)
            for key in tensors.keys() & extra.keys():
                tensors[key].copy_(extra[key])
            own = {f"model.{key}": value for key, value in tensors.items() if key not in extra}
            fill({k: v for key, value in own.items() for k, v in _entries(key, value, saved)}, saved, reader)
    if len(parts) > 1:
        index = {
            "metadata": {"total_size": sum(_size(*shape) for shape in shapes.values())},
            "weight_map": {key: name for name, part in zip(names, parts, strict=True) for key in part},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return [folder / name for name in names]


def _entries(key: str, value: Tensor, saved: dict[str, Any]) -> list[tuple[str, Tensor]]:
    return [(key, value)] if key in saved else list(pieces_of(key, 0, 1, value))


def _shapes(saved: dict[str, Any]) -> Shapes:
    """Shapes and types of the model's tensors, by their names in the model."""
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


def _size(shape: torch.Size, dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _divided(shapes: Shapes, file_bytes: int) -> list[Shapes]:
    parts: list[Shapes] = [{}]
    room = file_bytes
    for name, shape in shapes.items():
        if parts[-1] and _size(*shape) > room:
            parts.append({})
            room = file_bytes
        parts[-1][name] = shape
        room -= _size(*shape)
    return parts


def _create(path: Path, shapes: Shapes) -> dict[str, Tensor]:
    """A file for tensors of these shapes, and the tensors, which lie in the mapped file."""
    # Wide types first: then every tensor starts at a multiple of its numbers' size.
    names = sorted(shapes, key=lambda name: -shapes[name][1].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # what transformers and accelerate ask for
    end = 0
    for name in names:
        shape, dtype = shapes[name]
        start, end = end, end + _size(shape, dtype)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(begin + end)
    mapped = torch.from_file(str(path), shared=True, size=begin + end, dtype=torch.uint8)
    return {
        name: mapped[begin + header[name]["data_offsets"][0] : begin + header[name]["data_offsets"][1]]
        .view(shapes[name][1])
        .view(shapes[name][0])
        for name in names
    }
