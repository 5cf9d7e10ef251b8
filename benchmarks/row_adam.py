"""RowAdam against `torch.optim.SparseAdam` and, for the smaller table, dense `torch.optim.Adam`.

One step from 2^20 looked-up rows of width 16, in the uncoalesced form in which `F.embedding(..., sparse=True)` gives
their gradient; rows drawn evenly or by Zipf's law, so duplicates are natural. Dense Adam gets its gradient made for
free. Memory is what a later step adds to the process at its peak (VmHWM less VmRSS of /proc/self/status, the mark reset
before the step, in a process for each measurement); states and gradients that lie there already do not count.
`python benchmarks/row_adam.py`
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from harness import Side, Table, alternate, finish
from torch import Tensor, nn

from engram.training.environment import prepare_process
from engram.training.optim import RowAdam

WIDTH = 16
LOOKUPS = 2**20
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
DENSE_ROWS = 1_000_000
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "RowAdam": lambda params: RowAdam(params, **SETTINGS),
    "SparseAdam": lambda params: torch.optim.SparseAdam(params, **SETTINGS),
    "Adam": lambda params: torch.optim.Adam(params, **SETTINGS),
}


class Size(NamedTuple):
    """A table and how the rows that are read of it are drawn."""

    rows: int
    lookups: int
    drawn: str

    def optimizers(self) -> list[str]:
        """Those that run at this size."""
        return [name for name in OPTIMIZERS if name != "Adam" or self.rows <= DENSE_ROWS]


def draw_rows(size: Size) -> Tensor:
    """Rows that one batch reads: any row alike, or the r-th with a probability of about 1/r."""
    if size.drawn == "even":
        return torch.randint(0, size.rows, (size.lookups,))
    ranks = torch.exp(torch.rand(size.lookups, dtype=torch.float64) * torch.tensor(float(size.rows)).log()).long() - 1
    return (ranks * 2_654_435_761) % size.rows  # frequent rows are spread over the table, as hashing does


def draw(size: Size) -> Tensor:
    """A gradient as the lookup gives it: a value for each read, duplicates and all."""
    values = torch.randn(size.lookups, WIDTH)
    return torch.sparse_coo_tensor(draw_rows(size).unsqueeze(0), values, (size.rows, WIDTH), check_invariants=False)


def check(lookups: int) -> None:
    """Raise unless RowAdam's first step is SparseAdam's."""
    size = Size(1000, lookups, "zipf")
    grad = draw(size)
    start = torch.randn(size.rows, WIDTH)
    tables = []
    for name in ("RowAdam", "SparseAdam"):
        table = nn.Parameter(start.clone())
        table.grad = grad
        OPTIMIZERS[name]([table]).step()
        tables.append(table.detach())
    torch.testing.assert_close(*tables, rtol=1e-4, atol=1e-5)


def stepper(name: str, size: Size) -> tuple[Side, torch.optim.Optimizer]:
    """A call that takes one step with the given gradient, which for Adam is made dense before."""
    table = nn.Parameter(torch.zeros(size.rows, WIDTH))
    optimizer = OPTIMIZERS[name]([table])

    def step(grads: dict[str, Tensor]) -> None:
        table.grad = grads["dense" if name == "Adam" else "sparse"]
        optimizer.step()
        table.grad = None

    return step, optimizer


def gradients(size: Size, dense: bool) -> dict[str, Tensor]:
    """A fresh gradient, in both forms where dense Adam takes part."""
    sparse = draw(size)
    return {"sparse": sparse, "dense": sparse.to_dense()} if dense else {"sparse": sparse}


def memory_of_a_step(name: str, size: Size) -> tuple[int, int]:
    """Bytes that a step adds at its peak, and bytes of the optimiser's state; to be called in a process of its own."""
    torch.set_flush_denormal(True)
    step, optimizer = stepper(name, size)
    step(gradients(size, name == "Adam"))
    for tensor in (t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)):
        tensor.add_(0)  # so that pages of the state that the first step left untouched exist
    grads = gradients(size, name == "Adam")
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step(grads)
    peak = _status("VmHWM") - before
    state = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
    return peak, state


def _status(name: str) -> int:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a 16th of the lookups, the smaller table alone")
    arguments = parser.parse_args()
    prepare_process()
    torch.manual_seed(0)
    lookups = LOOKUPS // 16 if arguments.quick else LOOKUPS
    check(lookups)
    table_rows = (1_000_000,) if arguments.quick else (1_000_000, 10_000_000)
    sizes = [Size(rows, lookups, drawn) for rows in table_rows for drawn in ("even", "zipf")]

    times = Table("Time of a step", ["rows", "lookups", "drawn", "distinct"], list(OPTIMIZERS))
    for size in sizes:
        names = size.optimizers()
        sides: dict[str, Side | str] = {name: stepper(name, size)[0] if name in names else "-" for name in OPTIMIZERS}
        seconds = alternate(
            sides,
            lambda size=size, dense="Adam" in names: gradients(size, dense),
            rounds=11,
            budget_s=2.0 if arguments.quick else 15.0,
        )
        times.add((size.rows, size.lookups, size.drawn, len(draw_rows(size).unique())), seconds)

    print("\nMemory that a step adds at its peak, and the optimiser's state, MiB")
    print(f"{'rows':>10} {'drawn':>6} {'optimiser':>11} {'peak':>8} {'state':>8}")
    memory = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for size in sizes:
            for name in size.optimizers():
                peak, state = pool.apply(memory_of_a_step, (name, size))
                memory.append({**size._asdict(), "optimizer": name, "peak_bytes": peak, "state_bytes": state})
                print(
                    f"{size.rows:>10} {size.drawn:>6} {name:>11} {peak / 2**20:>8.0f} {state / 2**20:>8.0f}", flush=True
                )
    finish("row_adam", [times], memory=memory, arguments=vars(arguments))


if __name__ == "__main__":
    main()
