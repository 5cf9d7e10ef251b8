"""Laying rows out by expert: the C++ kernel and its reference, against the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.kernels import lay_out_rows, load_native
from engram.kernels.layout import lay_out_reference


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(1, 6), st.integers(1, 3), st.sampled_from([1, 2, 8]), st.booleans())
def test_rows_are_ordered_by_expert_then_by_token(
    data: st.DataObject, E: int, K: int, multiple: int, worst: bool
) -> None:
    load_native()
    K = min(K, E)
    chosen = data.draw(st.lists(st.permutations(range(E)).map(lambda p: p[:K]), min_size=1, max_size=12))
    experts = torch.tensor(chosen)
    load = torch.bincount(experts.flatten(), minlength=E)
    rows: list[int] = []
    ends = []
    for e in range(E):
        own = [i for i, expert in enumerate(experts.flatten().tolist()) if expert == e]
        rows += own + [experts.numel()] * (-len(own) % multiple)
        ends.append(len(rows))
    room = (experts.numel() + E * (multiple - 1)) // multiple * multiple
    rows += [experts.numel()] * (room - len(rows) if worst else 0)
    for kernel in (lay_out_rows, lay_out_reference):
        place, copy, end = kernel(experts, load, multiple, worst)
        assert copy.tolist() == rows
        assert end.tolist() == ends
        assert copy[place].tolist() == torch.arange(experts.numel()).view(experts.shape).tolist()


def test_a_load_that_does_not_fit_the_experts_is_refused() -> None:
    load_native()
    with pytest.raises(IndexError, match="expert 1 of 2 has more tokens than its load says"):
        lay_out_rows(torch.tensor([[0], [1], [1]]), torch.tensor([2, 1]), 1, False)


@pytest.mark.parametrize("worst", [True, False])
def test_the_operator_keeps_its_promises_to_the_compiler(worst: bool) -> None:
    experts = torch.tensor([[0, 2], [2, 1], [0, 1]])
    torch.library.opcheck(torch.ops.engram.lay_out_rows.default, (experts, torch.tensor([2, 2, 2]), 4, worst))
