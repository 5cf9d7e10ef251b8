"""What tests of training share: a small model, and a run's folder read back."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from tokenizers import Tokenizer
from torch.distributed.checkpoint import FileSystemReader

from engram.backbone import EngramLM
from engram.config import ModelConfig
from engram.parallel.checkpoint import last_checkpoint
from engram.training.tokenizer import train_bpe

MODEL = {
    "vocab_size": 300,
    "d_model": 32,
    "n_layers": 2,
    "n_dense_layers": 1,
    "dense_width": 48,
    "max_seq_len": 32,
    "attention": {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1, "head_dim": 16},
    "experts": {"n_experts": 6, "top_k": 2, "width": 16, "shared_width": 16, "score": "sigmoid", "bias_step": 0.01},
    "memory": {"layers": [1], "orders": [2, 3], "n_heads": 2, "row_width": 8, "rows": [97, 131], "eos_id": 1},
}


LOOKUP = torch.arange(300) // 2  # of each id, its canonical one


def built(**changes: object) -> EngramLM:
    """The model with some settings changed, named as in "memory.rows"."""
    return EngramLM(ModelConfig.from_dict(merge(MODEL, changes)), LOOKUP).eval()


def bpe(text: str) -> Tokenizer:
    return train_bpe(iter([text]), 280)


TEXTS = [f"document {i} tells of {' and '.join(str(i * j) for j in range(1, 3 + i % 9))}\n" for i in range(300)]


def write_texts(folder: Path, kinds: Sequence[str]) -> Path:
    """Write the texts to `all.jsonl` in a folder, of each kind by turns; returns the folder."""
    rows = [json.dumps({"text": text, "kind": kinds[i % len(kinds)]}) for i, text in enumerate(TEXTS)]
    (folder / "all.jsonl").write_text("\n".join(rows))
    return folder


@dataclass
class Run:
    """A finished or stopped run: its exit code and its folder."""

    code: int
    folder: Path

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.folder / "result.json").read_text())

    @property
    def checkpoint(self) -> dict[str, Any]:
        """The last one."""
        path = last_checkpoint(self.folder / "checkpoints")
        assert path is not None
        return read_checkpoint(path)

    def column(self, name: str) -> dict[int, float]:
        """Logged values by step."""
        with (self.folder / "metrics.csv").open() as file:
            return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row[name]}


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """All that a checkpoint of one process holds, its tensors under `tensors`."""
    contents = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in contents.items()}
    dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return {"tensors": tensors, **torch.load(folder / "run.pt", weights_only=True)}


def merge(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`settings` with `changes`, whose keys may have dots."""
    result = json.loads(json.dumps(settings))
    for key, value in changes.items():
        *path, last = key.split(".")
        place = result
        for name in path:
            place = place[name]
        place[last] = value
    return result
