"""Token ids to serve: those of source code in a BPE trained on it, or drawn by Zipf's law; and prompts made of them."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from offloading.scales import Scale


@dataclass(frozen=True)
class Batch:
    """Prompts, padded on their left (False in the mask, which is None without padding), and the ids that follow,
    `[B, T]`."""

    ids: Tensor
    mask: Tensor | None
    following: Tensor
    n_prompt: int  # tokens of prompts, padding not counted

    def to(self, device: torch.device) -> Batch:
        """On a device."""
        mask = None if self.mask is None else self.mask.to(device)
        return Batch(self.ids.to(device), mask, self.following.to(device), self.n_prompt)


class Words:
    """A stream of token ids, of which each draw is a piece not given before."""

    def __init__(self, ids: Tensor) -> None:
        self.ids, self.at = ids, 0

    def take(self, n: int) -> Tensor:
        """The next `n` ids."""
        if self.at + n > len(self.ids):
            raise SystemExit(f"{len(self.ids)} ids are too few")
        self.at += n
        return self.ids[self.at - n : self.at]


def text_ids(vocab: int, n: int) -> Tensor:
    """At least `n` ids of Python source files, in an order drawn by seed, in a BPE trained on some of them."""
    from engram.training.tokenizer import train_bpe

    paths = sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py"))
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0)).tolist()
    texts = (paths[i].read_text(encoding="utf-8", errors="replace") for i in order)
    some = [text for _, text in zip(range(600), texts, strict=False)]
    tokenizer = train_bpe(iter(some), vocab)
    ids: list[int] = []
    while len(ids) < n:
        ids.extend(tokenizer.encode(next(texts), add_special_tokens=False).ids)
    return torch.tensor(ids)


def zipf_ids(vocab: int, n: int) -> Tensor:
    """`n` ids, the one of rank r with a chance in proportion to 1 / r."""
    weights = 1 / torch.arange(1.0, vocab + 1)
    generator = torch.Generator().manual_seed(0)
    rank = torch.searchsorted(weights.cumsum(0) / weights.sum(), torch.rand(n, generator=generator)).clamp_max(
        vocab - 1
    )
    return torch.randperm(vocab, generator=generator)[rank]


def draw(scale: Scale, words: Words) -> list[Batch]:
    """One round's prompts, the longest first: a device's memory is then asked for once."""
    low, high = scale.lengths
    lengths = torch.randint(low, high + 1, (scale.n_prompts,)).sort(descending=True).values.tolist()
    batches = []
    for start in range(0, len(lengths), scale.batch):
        part = lengths[start : start + scale.batch]
        longest, shortest = part[0], part[-1]
        ids = torch.stack([nn.functional.pad(words.take(n), (longest - n, 0)) for n in part])
        mask = torch.arange(longest) >= longest - torch.tensor(part).unsqueeze(1) if shortest < longest else None
        batches.append(Batch(ids, mask, torch.stack([words.take(scale.new_tokens) for _ in part]), sum(part)))
    return batches
