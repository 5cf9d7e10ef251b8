"""RowAdam: dense Adam's numbers for the rows that are read, and no work on the others."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engram.config import ConfigError
from engram.memory import MemoryTable
from engram.training.optim import RowAdam

BETAS, EPS, LR = (0.9, 0.95), 1e-8, 0.01


def sparse(rows: list[int], values: Tensor, n_rows: int) -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, (n_rows, values.shape[1]), check_invariants=True)


def test_it_is_adam_when_every_row_is_read_at_every_step() -> None:
    start = torch.randn(7, 3, dtype=torch.float64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    row_adam = RowAdam([ours], lr=LR, betas=BETAS, eps=EPS)
    adam = torch.optim.Adam([theirs], lr=LR, betas=BETAS, eps=EPS)
    for _ in range(20):
        theirs.grad = torch.randn(7, 3, dtype=torch.float64)
        order = torch.randperm(7)
        ours.grad = sparse(order.tolist(), theirs.grad[order], 7)
        row_adam.step()
        adam.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), max_size=9), min_size=1, max_size=12), st.integers(0, 2**31))
def test_a_row_moves_as_adam_says_when_it_is_read_and_stays_otherwise(reads: list[list[int]], seed: int) -> None:
    """Against moments that are decayed at every step for all rows; rows repeat within a step and miss steps."""
    generator = torch.Generator().manual_seed(seed)
    table = nn.Parameter(torch.randn(6, 2, dtype=torch.float64, generator=generator))
    optimizer = RowAdam([table], lr=LR, betas=BETAS, eps=EPS)
    expected, m, v = table.detach().clone(), torch.zeros(6, 2).double(), torch.zeros(6, 2).double()
    for t, rows in enumerate(reads, start=1):
        values = torch.randn(len(rows), 2, dtype=torch.float64, generator=generator)
        table.grad = sparse(rows, values, 6)
        optimizer.step()
        g = torch.zeros(6, 2).double()
        for row, value in zip(rows, values, strict=True):
            g[row] += value
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
        move = LR * (m / (1 - BETAS[0] ** t)) / ((v / (1 - BETAS[1] ** t)).sqrt() + EPS)
        for row in set(rows):
            expected[row] -= move[row]
        torch.testing.assert_close(table.detach(), expected, rtol=1e-10, atol=1e-13)


def test_it_takes_the_gradients_that_a_memory_table_gives() -> None:
    table = MemoryTable(50, 4)
    before = table.weight.detach().clone()
    optimizer = RowAdam(table.parameters(), lr=LR)
    rows = torch.tensor([[3, 7, 3], [9, 9, 9]])
    table(rows).square().sum().backward()
    optimizer.step()
    moved = (table.weight != before).any(1).nonzero().flatten().tolist()
    assert moved == [3, 7, 9]
    # The first step of Adam is the learning rate against the sign of the gradient.
    torch.testing.assert_close(before[[3, 7, 9]] - table.weight[[3, 7, 9]], LR * before[[3, 7, 9]].sign())


class Watch(TorchDispatchMode):
    """Notes which operations are given, or make, a tensor of at least `size` values."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        dense = [x for x in [*args, out] if isinstance(x, Tensor) and x.layout == torch.strided]
        if any(x.numel() >= self.size for x in dense):
            self.seen.add(func.overloadpacket.__name__)
        return out


def test_a_step_never_passes_over_the_whole_table() -> None:
    n_rows = 10_000
    table = nn.Parameter(torch.randn(n_rows, 2))
    optimizer = RowAdam([table], lr=LR)
    for step in range(2):
        table.grad = sparse([1, 5, 5, 9999], torch.randn(4, 2), n_rows)
        with Watch(n_rows) as watch:
            optimizer.step()
        if step:  # the first step makes the state
            assert watch.seen <= {"row_adam_", "detach"}


def test_rows_that_are_not_read_are_not_so_much_as_looked_at() -> None:
    """They and their moments hold NaN, which any arithmetic on them would spread."""
    table = nn.Parameter(torch.full((1000, 4), torch.nan))
    optimizer = RowAdam([table], lr=LR)
    read = torch.tensor([3, 500, 999])
    for step in range(3):
        with torch.no_grad():
            table[read] = 1.0
        table.grad = sparse(read.tolist(), torch.ones(3, 4), 1000)
        optimizer.step()
        if step == 0:
            state = optimizer.state[table]["row_state"]
            state[[i for i in range(1000) if i not in read.tolist()]] = torch.nan
    assert table[read].isfinite().all()
    assert table.isnan().any(1).sum() == 997


def dense_row_adam(
    start: Tensor, reads: list[tuple[list[int], Tensor]], beta1: float, beta2: float, by_row: bool
) -> Tensor:
    """The rule for all rows at every step, in float64, moments of rows decayed whether read or not."""
    table = start.double().clone()
    m, v = torch.zeros_like(table), torch.zeros_like(table)
    for t, (rows, values) in enumerate(reads, start=1):
        g = torch.zeros_like(table).index_add_(0, torch.tensor(rows), values.double())
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * (g.square().mean(1, keepdim=True) if by_row else g.square())
        move = LR * m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + EPS)
        table[sorted(set(rows))] -= move[sorted(set(rows))]
    return table


def random_reads(steps: int, n_rows: int, width: int, seed: int = 0) -> list[tuple[list[int], Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randint(0, n_rows, (11,), generator=g).tolist(), torch.randn(11, width, generator=g))
        for _ in range(steps)
    ]


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("second_moment", ["element", "row"])
def test_second_moments_by_row_and_no_first_moments_follow_their_rules(beta1: float, second_moment: str) -> None:
    start, reads = torch.randn(13, 6), random_reads(40, 13, 6)
    table = nn.Parameter(start.clone())
    optimizer = RowAdam([table], LR, (beta1, 0.95), EPS, second_moment)  # type: ignore[arg-type]
    for rows, values in reads:
        table.grad = sparse(rows, values, 13)
        optimizer.step()
    expected = dense_row_adam(start, reads, beta1, 0.95, second_moment == "row")
    torch.testing.assert_close(table.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [16, 32])
def test_the_small_state_is_under_an_eighth_of_adams(width: int) -> None:
    table = nn.Parameter(torch.zeros(1000, width))
    optimizer = RowAdam([table], LR, (0.0, 0.95), EPS, "row")
    table.grad = sparse([1], torch.ones(1, width), 1000)
    optimizer.step()
    held = sum(x.nbytes for x in optimizer.state[table].values() if isinstance(x, Tensor))
    assert held < 2 * table.nbytes / 8


def test_updates_too_small_for_bfloat16_add_up_in_the_mean() -> None:
    """1 + 2^-10 is not a bfloat16 (its steps there are 2^-7): rounding to nearest would never move."""
    table = nn.Parameter(torch.ones(400, 16, dtype=torch.bfloat16))
    optimizer = RowAdam([table], lr=2**-10, betas=(0.0, 0.0), eps=1e-30)
    rows = list(range(400))
    for _ in range(64):
        table.grad = sparse(rows, -torch.ones(400, 16, dtype=torch.bfloat16), 400)
        optimizer.step()
    moved = table.float().mean() - 1
    # 64 steps of 2^-10 are 2^-4; the mean of 6400 numbers that each walk in steps of 2^-7 is known to about 0.0004.
    assert abs(moved - 2**-4) < 0.002
    assert len(table.unique()) > 3


def test_random_rounding_depends_on_seed_step_and_place_alone() -> None:
    def train(seed: int, order: list[int]) -> Tensor:
        table = nn.Parameter(torch.ones(5, 8, dtype=torch.bfloat16))
        optimizer = RowAdam([table], lr=1e-3, seed=seed)
        for step in range(3):
            values = torch.randn(5, 8, generator=torch.Generator().manual_seed(step)).bfloat16()
            table.grad = sparse(order, values[order], 5)
            optimizer.step()
        return table.detach()

    assert torch.equal(train(0, [0, 1, 2, 3, 4]), train(0, [4, 2, 0, 1, 3]))
    assert not torch.equal(train(0, [0, 1, 2, 3, 4]), train(1, [0, 1, 2, 3, 4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_state_comes_back_to_the_last_bit(dtype: torch.dtype) -> None:
    """Step numbers too, which bfloat16 could not hold beyond 256."""

    def make() -> tuple[nn.Parameter, RowAdam]:
        torch.manual_seed(0)
        table = nn.Parameter(torch.randn(9, 2).to(dtype))
        return table, RowAdam([table], lr=LR)

    def step(table: nn.Parameter, optimizer: RowAdam, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        rows = torch.randint(0, 9, (3,), generator=generator).tolist()
        table.grad = sparse(rows, torch.randn(3, 2, generator=generator).to(dtype), 9)
        optimizer.step()

    whole, first, second = make(), make(), make()
    for number in range(600):
        step(*whole, number)
        step(*(first if number < 301 else second), number)
        if number == 300:
            with torch.no_grad():
                second[0].copy_(first[0])
            second[1].load_state_dict(first[1].state_dict())
    assert torch.equal(whole[0], second[0])
    states = [optimizer.state_dict()["state"][0] for _, optimizer in (whole, second)]
    assert states[0]["row_state"].dtype == states[1]["row_state"].dtype == torch.float32
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(*(torch.as_tensor(state[name]) for state in states)) for name in states[0])


def test_dense_gradients_and_bad_settings_are_refused() -> None:
    table = nn.Parameter(torch.zeros(3, 2))
    table.grad = torch.ones(3, 2)
    with pytest.raises(TypeError, match="row-sparse"):
        RowAdam([table]).step()
    for name, value in (("lr", -1.0), ("betas", (0.9, 1.0)), ("eps", 0.0)):
        with pytest.raises(ConfigError, match=f"{name} is "):
            RowAdam([table], **{name: value})  # type: ignore[arg-type]
