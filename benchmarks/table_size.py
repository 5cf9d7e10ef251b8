"""O(1), shown: time of a training step against the rows of the memory table, at the same tokens.

The whole model (configs/models/tiny.yaml at rho 0.4, but for its table: forward, backward, clip and update) and its
memory layer alone (forward, backward and update), with 1e5, 1e6 and 1e7 rows in turn. Before timing every page of
tables and optimiser states is written once: a fresh run pays page faults for states it has not touched, later it does
not. Token pairs are drawn by Zipf's law, anew for each call; larger tables read more distinct rows of them, since fewer
N-grams collide. Ratios are times with more rows over those with 1e5: the aim is 1.05 at 1e7 for the whole, 1.5 for the
layer. `python benchmarks/table_size.py`, or with `--huge` for 1e8 rows of width 8 (10 GB)
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from harness import Side, Table, alternate, finish
from torch import Tensor, nn

from engram import Engram, MemoryConfig, ModelConfig, ParameterBudget
from engram.backbone import EngramLM, mean_loss
from engram.training.environment import prepare_process
from engram.training.optim import OptimConfig, RowAdam, build_optimizer, clip_gradients

ROWS = (100_000, 1_000_000, 10_000_000)
HUGE_ROWS, HUGE_WIDTH = 100_000_000, 8
B, T = 16, 256
RHO = 0.4
OPTIM = OptimConfig()


class Batch(NamedTuple):
    """Token ids, those that follow, and document ids `[B, T]`."""

    ids: Tensor
    targets: Tensor
    documents: Tensor


def draw(vocab: int) -> Batch:
    """Ids by Zipf's law in documents of 200 tokens on average."""
    ids = torch.multinomial(1 / torch.arange(1.0, vocab + 1), B * (T + 1), replacement=True).view(B, T + 1)
    return Batch(ids[:, :-1], ids[:, 1:], (torch.rand(B, T) < 1 / 200).cumsum(1))


def with_rows(config: ModelConfig, rows: int, width: int) -> ModelConfig:
    """The same model with about `rows` rows of `width` in each memory layer's table."""
    memory = config.memory
    assert memory is not None
    each = rows // (memory.n_heads * len(memory.orders))
    return dataclasses.replace(
        config, memory=dataclasses.replace(memory, rows=(each,) * len(memory.orders), row_width=width)
    )


def touch(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Write every page of parameters and optimiser states once."""
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    for tensor in [*(p.data for p in parameters), *states]:
        tensor.add_(0)


def whole_model(config: ModelConfig) -> Side:
    """A training step as runs take it, in bfloat16 autocast."""
    model = EngramLM(config, torch.arange(config.vocab_size))
    optimizer = build_optimizer(model, OPTIM)

    def step(batch: Batch) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out = model.run(batch.ids, batch.documents)
            loss = mean_loss(out.hidden, model.head_weight, batch.targets)
        loss.backward()
        clip_gradients(model, OPTIM.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step(draw(config.vocab_size))
    for each in optimizer.optimizers:
        touch(list(model.parameters()), each)
    return step


def layer_alone(config: MemoryConfig) -> Side:
    """Forward, backward and update of one memory layer, in bfloat16 autocast."""
    layer = Engram(config, lookup=torch.arange(config.vocab_size))
    rest = [p for p in layer.parameters() if p is not layer.table.weight]
    table_optimizer = RowAdam([layer.table.weight], lr=1e-3)
    rest_optimizer = torch.optim.AdamW(rest, lr=1e-3, fused=True)
    hidden = torch.randn(B, T, config.d_model)
    grad = torch.randn(B, T, config.d_model)

    def step(batch: Batch) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            update = layer(hidden, batch.ids, batch.documents)
        update.backward(grad.to(update.dtype))
        for optimizer in (table_optimizer, rest_optimizer):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    step(draw(config.vocab_size))
    touch(list(layer.parameters()), table_optimizer)
    return step


def measure(title: str, build: Callable[[ModelConfig], Side], config: ModelConfig, sizes: list[int], n: int) -> Table:
    """One line: the step's time with the fewest rows, and the others' over it."""
    assert config.memory is not None
    table = Table(title, ["d", "tokens", "width"], [f"{rows:.0e} rows" for rows in sizes])
    sides: dict[str, Side | str] = {
        f"{rows:.0e} rows": build(with_rows(config, rows, config.memory.row_width)) for rows in sizes
    }
    seconds = alternate(sides, lambda: draw(config.vocab_size), rounds=n, budget_s=120.0)
    table.add((config.d_model, B * T, config.memory.row_width), seconds)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two table sizes and few rounds")
    parser.add_argument("--huge", action="store_true", help="1e8 rows too, all tables of width 8")
    arguments = parser.parse_args()
    prepare_process()
    torch.manual_seed(0)
    sizes = [*ROWS[: 2 if arguments.quick else None], *([HUGE_ROWS] if arguments.huge else [])]
    config = ParameterBudget.of(ModelConfig.load("configs/models/tiny.yaml")).split(RHO)
    assert config.memory is not None
    if arguments.huge:
        config = with_rows(config, ROWS[0], HUGE_WIDTH)
    n = 7 if arguments.quick else 41
    tables = [
        measure("A step of the whole model", whole_model, config, sizes, n),
        measure("A step of the memory layer alone", lambda c: layer_alone(c.memory), config, sizes, 2 * n),
    ]
    finish("table_size_huge" if arguments.huge else "table_size", tables, arguments=vars(arguments))


if __name__ == "__main__":
    main()
