"""`Engram` and `MoE` in a module of your own: torch and two layers, nothing else of this package.

    python examples/own_module.py

The model predicts the next byte of this repository's documentation.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram import Engram, MemoryConfig, MoE, MoEConfig

V, D, T = 256, 64, 64
MEMORY = MemoryConfig(d_model=D, vocab_size=V, branches=1, compress=False, n_heads=2, row_width=16, rows=(2000, 8000))
EXPERTS = MoEConfig(d_model=D, n_experts=8, top_k=2, width=64, shared_width=64)


class NextByte(nn.Module):
    """A convolution that looks back, N-grams in memory, and experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.look_back = nn.Conv1d(D, D, 8)
        self.memory = Engram(MEMORY)
        self.norm = nn.RMSNorm(D)
        self.experts = MoE(EXPERTS)
        self.head = nn.Linear(D, V)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits `[B, T, V]` for bytes `[B, T]`."""
        h = self.embed(ids)
        h = h + self.look_back(F.pad(h.mT, (7, 0))).mT
        h = h + self.memory(h, ids)
        update, self.routing = self.experts.forward_with_stats(self.norm(h))
        return self.head(h + update)


def main(steps: int) -> None:
    torch.manual_seed(0)
    docs = sorted(Path(__file__).resolve().parents[1].glob("docs/*.md"))
    text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in docs)), dtype=torch.uint8).long()
    model = NextByte()
    # The table's gradient is row-sparse: work on rows that were read, whatever the table's size. torch's SparseAdam
    # takes it; so does `engram.training.optim.RowAdam`, faster and with dense Adam's moments.
    table = model.memory.table.weight
    rest = [parameter for parameter in model.parameters() if parameter is not table]
    optimizers = [torch.optim.AdamW(rest, lr=3e-3), torch.optim.SparseAdam([table], lr=1.5e-2)]
    for step in range(1, steps + 1):
        starts = torch.randint(len(text) - T, (16, 1))
        windows = text[starts + torch.arange(T + 1)]
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        model.experts.update_balance(model.routing.load_E)  # so that all experts get work
        if step == 1 or step % 50 == 0:
            print(f"step {step}: {loss.item():.3f} nats")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    main(**vars(parser.parse_args()))
