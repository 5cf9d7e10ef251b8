"""What rows in 8 bits cost a trained model: the error of rows, and the loss on text that it was not trained on.

A small model is trained for some steps on the source files of this Python environment, in a BPE trained on them; then
its table is replaced by one in each format. For scale: the loss with all rows set to zero. `python
benchmarks/quantized_rows.py`
"""

from __future__ import annotations

import argparse

import torch
from harness import hardware, store
from offloading.words import text_ids
from torch import Tensor

from engram import EngramLM, GQAConfig, MemoryConfig, ModelConfig
from engram.backbone import mean_loss
from engram.backbone.loss import token_losses
from engram.memory import Engram, MemoryTable
from engram.memory.row_formats import RowKind
from engram.training.environment import prepare_process
from engram.training.optim import OptimConfig, build_optimizer, clip_gradients

VOCAB, B, T, TEST = 4096, 8, 256, 40  # TEST: batches that the loss is measured on
CONFIG = ModelConfig(
    vocab_size=VOCAB, d_model=128, n_layers=4, n_dense_layers=4, dense_width=384, tied=True,
    attention=GQAConfig(n_heads=2, n_kv_heads=1, head_dim=64),
    memory=MemoryConfig(layers=(1,), rows=(80_000, 80_000), row_width=32, table_dtype="bfloat16"),
)  # fmt: skip
OPTIM = OptimConfig()


def windows(ids: Tensor, n: int) -> list[tuple[Tensor, Tensor]]:
    """`n` batches of ids and those that follow, `[B, T]`, from anywhere in a text."""
    pieces = ids[: n * B * (T + 1)].view(n * B, T + 1)
    return [(x[:, :-1], x[:, 1:]) for x in pieces[torch.randperm(n * B)].split(B)]


def train(model: EngramLM, batches: list[tuple[Tensor, Tensor]]) -> None:
    """A pass over batches, in bfloat16 autocast."""
    optimizer = build_optimizer(model, OPTIM)
    for n, (ids, targets) in enumerate(batches):
        with torch.autocast("cpu", torch.bfloat16):
            loss = mean_loss(model.run(ids).hidden, model.head_weight, targets)
        loss.backward()
        clip_gradients(model, OPTIM.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if n % 100 == 0:
            print(f"step {n}: {loss.item():.3f}", flush=True)


@torch.no_grad()
def losses_of(model: EngramLM, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Nats of every token."""
    return torch.cat([token_losses(model.run(x).hidden, model.head_weight, y).flatten() for x, y in batches]).double()


def main() -> None:
    """Train, exchange tables, and write `results/quantized_rows.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    prepare_process()
    torch.manual_seed(0)
    ids = text_ids(VOCAB, (arguments.steps + TEST) * B * (T + 1))
    test = windows(ids[-TEST * B * (T + 1) :], TEST)
    model = EngramLM(CONFIG)
    train(model, windows(ids, arguments.steps))
    model.eval()
    memory = next(part for part in model.modules() if isinstance(part, Engram))
    trained: MemoryTable = memory.table
    expected = losses_of(model, test)
    read = torch.cat([memory.reader(x).flatten() for x, _ in test]).unique()
    rows = trained.weight.detach()[read].double()
    result = {"float": {"loss": expected.mean().item()}}
    kinds: tuple[RowKind, ...] = ("int8", "fp8")
    for kind in kinds:
        memory.table = trained.read_only(kind)
        with torch.no_grad():
            error = (memory.table(read).double() - rows).norm(dim=1) / rows.norm(dim=1)
        change = losses_of(model, test) - expected
        result[kind] = {
            "loss": (expected + change).mean().item(),
            "change": change.mean().item(),
            "standard error of the change": (change.std() / len(change) ** 0.5).item(),
            "bytes of a row": memory.table.format.row_bytes,
            "median error of a row": error.median().item(),
            "largest error of a row": error.max().item(),
        }
    memory.table = MemoryTable(*trained.weight.shape, torch.bfloat16, std=0.0)
    result["zeros"] = {"loss": losses_of(model, test).mean().item()}
    for name, values in result.items():
        print(
            name,
            " ".join(f"{key} {value:.3g}" if key != "loss" else f"loss {value:.5f}" for key, value in values.items()),
        )
    store(
        "quantized_rows", {"hardware": hardware(), "steps": arguments.steps, "tokens tested": len(expected), **result}
    )


if __name__ == "__main__":
    main()
