"""The table against plain indexing, and its backward against the size of what it may allocate."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engram.config import ConfigError, MemoryConfig
from engram.memory import Engram, MemoryTable
from engram.memory.table import concatenated, tables_in
from engram.training.optim.row_adam import coalesced


class LargestDense(TorchDispatchMode):
    """Remembers the number of elements of the largest dense tensor that any operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor) and x.layout == torch.strided and not any(x is a for a in args):
                self.numel = max(self.numel, x.numel())
        return out


def largest_dense_in(step: Callable[[], Tensor]) -> int:
    with LargestDense() as largest:
        step().square().sum().backward()
    return largest.numel


def test_rows_are_the_weights_lines() -> None:
    table = MemoryTable(11, 3)
    rows = torch.randint(0, 11, (2, 5, 4))
    values = table(rows)
    assert values.shape == (2, 5, 4, 3)
    for at in [(0, 0, 0), (1, 4, 3), (1, 2, 0)]:
        assert torch.equal(values[at], table.weight[int(rows[at])])


def test_only_rows_that_were_read_get_a_gradient() -> None:
    table = MemoryTable(1000, 4).double()
    rows = torch.tensor([[[3, 997], [3, 20]]])
    upstream = torch.randn(1, 2, 2, 4, dtype=torch.float64)
    table(rows).backward(upstream)
    assert table.weight.grad is not None
    assert table.weight.grad.is_sparse
    gradient = table.weight.grad.coalesce()
    assert gradient.indices().tolist() == [[3, 20, 997]]
    expected = torch.stack([upstream[0, 0, 0] + upstream[0, 1, 0], upstream[0, 1, 1], upstream[0, 0, 1]])
    torch.testing.assert_close(gradient.values(), expected)


def test_no_tensor_as_large_as_the_table_appears_in_a_step() -> None:
    table, rows = MemoryTable(50_000, 4), torch.randint(0, 50_000, (2, 8, 6))
    assert largest_dense_in(lambda: table(rows)) <= rows.numel() * 4
    # The measure does see a dense gradient.
    assert largest_dense_in(lambda: F.embedding(rows, table.weight)) == table.weight.numel()


def test_no_tensor_as_large_as_the_table_appears_in_a_step_of_the_layer() -> None:
    config = MemoryConfig(rows=(5000, 5000), n_heads=2, row_width=8, d_model=8, vocab_size=100, branches=2)
    memory = Engram(config)
    hidden, ids = torch.randn(2, 8, 2, 8), torch.randint(0, 100, (2, 8))
    assert largest_dense_in(lambda: memory(hidden, ids)) < memory.table.weight.numel() / 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_several_readings_and_backward_passes_add_up_and_stay_sparse(dtype: torch.dtype) -> None:
    table, rows = MemoryTable(100, 2, dtype), torch.tensor([[1, 2]])
    (table(rows).sum() + table(torch.tensor([9])).sum()).backward()
    table(rows + 1).sum().backward()
    assert table.weight.grad is not None
    gradient = table.weight.grad.coalesce()
    assert gradient.indices().tolist() == [[1, 2, 3, 9]]
    assert gradient.values().tolist() == [[1, 1], [2, 2], [1, 1], [1, 1]]


def test_rows_that_do_not_learn_get_no_gradient() -> None:
    table, scale = MemoryTable(10, 2), torch.ones(2, requires_grad=True)
    table.weight.requires_grad_(False)
    (table(torch.tensor([1])) * scale).sum().backward()
    assert table.weight.grad is None
    assert scale.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_come_in_the_type_of_the_weights(dtype: torch.dtype) -> None:
    table = MemoryTable(10, 2).to(dtype)
    assert table(torch.tensor([1])).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert table(torch.tensor([1])).dtype == dtype


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_come_side_by_side_in_the_type_that_takes_them_but_under_autocast_as_they_are(
    dtype: torch.dtype, wanted: torch.dtype, autocast: bool
) -> None:
    table, rows = MemoryTable(10, 3, dtype), torch.randint(0, 10, (2, 5, 4))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        values = concatenated(table(rows), wanted)
    assert values.dtype == (dtype if autocast else wanted)
    assert torch.equal(values, table.weight[rows].reshape(2, 5, 12).to(values.dtype))
    values.sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad.dtype == dtype


def test_heads_are_put_side_by_side_on_the_meta_device() -> None:
    table = MemoryTable(10, 3, torch.bfloat16).to("meta")
    rows = torch.zeros(2, 5, 4, dtype=torch.int64, device="meta")
    assert concatenated(table(rows), torch.float32).shape == (2, 5, 12)


def test_a_table_has_the_type_it_is_made_with_until_it_is_given_another() -> None:
    table = MemoryTable(10, 2, torch.bfloat16)
    assert table.weight.dtype == torch.bfloat16
    before = table.weight.detach().clone()
    assert table.float().weight.dtype == torch.float32
    assert torch.equal(table.bfloat16().weight, before)


def test_gradients_of_a_bfloat16_row_are_summed_in_float32() -> None:
    """In bfloat16 256 + 1 is 256, and 300 ones would add up to no more."""
    table = MemoryTable(10, 2, torch.bfloat16)
    table(torch.full((300,), 3)).sum().backward()
    assert table.weight.grad is not None
    gradient = coalesced(table.weight.grad)
    assert gradient.indices().tolist() == [[3]]
    assert gradient.values().tolist() == [[300, 300]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_start_small_and_distinct(dtype: torch.dtype) -> None:
    weight = MemoryTable(2000, 16, dtype).weight.float()
    assert weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert abs(weight.mean().item()) < 5e-4
    assert len(weight.unique(dim=0)) == 2000


def test_a_table_of_the_meta_device_takes_no_memory() -> None:
    with torch.device("meta"):
        table = MemoryTable(10**11, 64)
    assert table.weight.is_meta
    table = MemoryTable(10, 4).to("meta").to_empty(device="cpu")
    table.reset_parameters()
    assert 0 < table.weight.std().item() < 0.1


@pytest.mark.parametrize(("n_rows", "width", "name"), [(0, 4, "n_rows"), (4, 0, "width"), (-1, 4, "n_rows")])
def test_an_empty_table_is_refused(n_rows: int, width: int, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is .*: allowed is 1 or more"):
        MemoryTable(n_rows, width)


def test_a_table_is_found_under_each_of_its_names() -> None:
    table = MemoryTable(5, 2)
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": table, "c": table, "d": nn.Linear(2, 2)})})
    assert [(name, attribute) for name, _, attribute, _ in tables_in(model)] == [("a.b", "b"), ("a.c", "c")]
    assert all(owner is model["a"] and found is table for _, owner, _, found in tables_in(model))
