"""Hashing: the C++ kernel and the reference against Python's own integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.kernels import hash_ngrams, load_native
from engram.kernels.hashing import hash_ngrams_reference

PRIMES = [2, 3, 1_000_003, 2_147_483_647, 4_294_967_311, 9_007_199_254_740_997]  # the last beyond a double's 53 bits


def in_python(
    ids: list[int],
    documents: list[int] | None,
    moduli: list[int],
    offsets: list[int],
    multipliers: list[int],
    orders: list[int],
    past: int,
    pad_id: int,
    eos_id: int,
) -> list[list[int]]:
    rows = []
    for t in range(past, len(ids)):
        at_t = []
        for number, order in enumerate(orders):
            mix, inside = 0, True
            for back in range(order):
                then = t - back
                inside = inside and then >= 0 and (documents is None or documents[then] == documents[t])
                inside = inside and (back == 0 or ids[then] != eos_id)
                mix ^= (ids[then] if inside else pad_id) * multipliers[back]
            heads = len(moduli) // len(orders)
            at_t += [mix % moduli[h] + offsets[h] for h in range(number * heads, (number + 1) * heads)]
        rows.append(at_t)
    return rows


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_rows_are_those_of_unbounded_integers(data: st.DataObject) -> None:
    load_native()
    orders = sorted(data.draw(st.sets(st.integers(1, 4), min_size=1)))
    heads = data.draw(st.integers(1, 3))
    top = 2**31 - 1
    ids = data.draw(st.lists(st.integers(0, 5) | st.integers(0, top), min_size=1, max_size=9))
    past = data.draw(st.integers(0, len(ids) - 1))
    n = len(ids)
    documents = data.draw(st.none() | st.lists(st.integers(-1, 2), min_size=n, max_size=n))
    n_heads = heads * len(orders)
    moduli = data.draw(st.lists(st.sampled_from(PRIMES), min_size=n_heads, max_size=n_heads))
    offsets = data.draw(st.lists(st.integers(0, 10**12), min_size=n_heads, max_size=n_heads))
    multipliers = data.draw(st.lists(st.integers(1, 2**32), min_size=orders[-1], max_size=orders[-1]))
    pad, eos = data.draw(st.integers(0, 5)), data.draw(st.sampled_from([-1, 0, 3]))
    n_layers = data.draw(st.integers(1, 3))
    ordinal = data.draw(st.integers(0, n_layers - 1))
    expected = in_python(ids, documents, moduli, offsets, multipliers, orders, past, pad, eos)
    tensors = [torch.tensor([ids]), None if documents is None else torch.tensor([documents])]
    # Another layer's numbers give row 1 of everything.
    tensors += [
        torch.tensor([own if at == ordinal else [1] * n_heads for at in range(n_layers)]) for own in (moduli, offsets)
    ]
    settings_ = {"ordinal": ordinal, "multipliers": multipliers, "orders": orders, "past": past, "n_ids": top + 1}
    settings_ |= {"pad_id": pad, "eos_id": eos}
    assert hash_ngrams_reference(*tensors, **settings_)[0].tolist() == expected  # type: ignore[arg-type]
    assert hash_ngrams(*tensors, **settings_)[0].tolist() == expected  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2**62) | st.sampled_from([1, 2, 4096]), st.integers(0, 2**63 - 1), st.sampled_from([-1, 0, 1]))
def test_the_remainder_is_exact_over_the_whole_range(modulus: int, mix: int, side: int) -> None:
    """One id times one multiplier spans all mixes below 2^63; the modulus need not be prime. Of nine heads eight are
    computed together and one alone."""
    load_native()
    beside = min(max(mix // modulus * modulus + side, 0), 2**63 - 1)  # where a quotient may be one off
    for x in (mix, beside):
        rows = hash_ngrams(
            torch.tensor([[1]]), None, torch.full((1, 9), modulus), torch.zeros(1, 9, dtype=torch.int64),
            ordinal=0, multipliers=(x,), orders=(1,), past=0, pad_id=0, eos_id=-1, n_ids=2,
        )  # fmt: skip
        assert rows.flatten().tolist() == [x % modulus] * 9


@pytest.mark.parametrize(("heads", "orders"), [(8, [2, 3]), (8, [1, 2, 3]), (20, [1, 3]), (56, [2])])
def test_heads_computed_together_are_each_their_own(heads: int, orders: list[int]) -> None:
    """Eight heads of an order side by side, up to four such groups in one pass, the rest alone; no two moduli alike."""
    load_native()
    n_heads, top = heads * len(orders), 2**31 - 1
    ids = torch.randint(0, top, (2, 261))  # no multiple of the tokens mixed together
    moduli = [10_007 + 1_000_003 * h for h in range(n_heads)]
    offsets = [10**9 * h for h in range(n_heads)]
    multipliers = [2**31 + 11, 2**30 + 7, 2**29 + 5][: orders[-1]]
    options: dict[str, Any] = {"ordinal": 0, "multipliers": multipliers, "orders": orders, "past": 1}
    options |= {"pad_id": 2, "eos_id": 3, "n_ids": top}
    ours = hash_ngrams(ids, None, torch.tensor([moduli]), torch.tensor([offsets]), **options)
    expected = [in_python(row, None, moduli, offsets, multipliers, orders, 1, 2, 3) for row in ids.tolist()]
    assert ours.tolist() == expected


@pytest.mark.parametrize("hash_", [hash_ngrams, hash_ngrams_reference])
@pytest.mark.parametrize("bad", [-1, 100, 2**40])
@pytest.mark.parametrize(("row", "at"), [(0, 0), (0, 699), (1, 0), (2, 300), (2, 699)])
def test_an_id_out_of_range_is_refused_wherever_it_stands(hash_: Any, bad: int, row: int, at: int) -> None:
    load_native()
    ids = torch.randint(0, 100, (3, 700))
    moduli, offsets = torch.tensor([[97]]), torch.tensor([[0]])
    options = {"ordinal": 0, "multipliers": [3, 5], "orders": [2], "past": 1, "pad_id": 2, "eos_id": -1, "n_ids": 100}
    hash_(ids, None, moduli, offsets, **options)
    ids[row, at] = bad
    with pytest.raises(ValueError, match=f"token id is {bad}: allowed is 0 to 99"):
        hash_(ids, None, moduli, offsets, **options)


def test_rows_of_a_batch_are_hashed_apart() -> None:
    load_native()
    ids = torch.randint(0, 100, (64, 257), generator=torch.Generator().manual_seed(0))
    documents = (torch.rand(64, 257, generator=torch.Generator().manual_seed(1)) < 0.1).long().cumsum(1)
    arguments = (torch.tensor([[97, 1009, 89, 1013]]), torch.tensor([[0, 97, 1106, 1195]]))
    options = {"ordinal": 0, "multipliers": (12345, 999_983, 77_777), "orders": (2, 3), "past": 0, "n_ids": 100}
    options |= {"pad_id": 2, "eos_id": 5}
    whole = hash_ngrams(ids, documents, *arguments, **options)  # type: ignore[arg-type]
    assert torch.equal(whole, hash_ngrams_reference(ids, documents, *arguments, **options))  # type: ignore[arg-type]
    alone = [hash_ngrams(i[None], d[None], *arguments, **options) for i, d in zip(ids, documents, strict=True)]  # type: ignore[arg-type]
    assert torch.equal(whole, torch.cat(alone))


@pytest.mark.parametrize("hash_", [hash_ngrams, hash_ngrams_reference])
def test_no_heads_read_no_rows(hash_: Any) -> None:
    load_native()
    none = torch.zeros(1, 0, dtype=torch.int64)
    options = {"ordinal": 0, "multipliers": [3, 5], "orders": [2], "past": 0, "pad_id": 2, "eos_id": -1, "n_ids": 9}
    assert hash_(torch.tensor([[1, 2, 3]]), None, none, none, **options).shape == (1, 3, 0)


def test_the_operator_keeps_its_promises_to_the_compiler() -> None:
    moduli, offsets = torch.tensor([[97]]), torch.tensor([[0]])
    arguments = (torch.tensor([[1, 2, 3]]), None, moduli, offsets, 0, [3, 5], [2], 0, 0, -1, 4)
    torch.library.opcheck(torch.ops.engram.hash_ngrams.default, arguments)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("documents", torch.zeros(1, 7, dtype=torch.int64)),
        ("offsets", torch.zeros(1, 1, dtype=torch.int64)),
        ("moduli", torch.tensor([97, 101])),
        ("modulus", torch.tensor([[97, 0]])),
        ("ordinal", 1),
        ("ordinal", -1),
        ("past", 8),
        ("multipliers", (3,)),
        ("orders", (3, 2)),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(name: str, wrong: Any) -> None:
    load_native()
    options = {"documents": None, "moduli": torch.tensor([[97, 101]]), "offsets": torch.tensor([[0, 97]])}
    options |= {"ordinal": 0, "multipliers": (3, 5, 7), "orders": (2, 3), "past": 0, "pad_id": 0, "eos_id": -1}
    options |= {"n_ids": 9}
    options["moduli" if name == "modulus" else name] = wrong
    with pytest.raises(ValueError, match=name):
        hash_ngrams(torch.ones(3, 7, dtype=torch.int64), **options)  # type: ignore[arg-type]
