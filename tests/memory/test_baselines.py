"""What holds for every kind of memory; what each rival computes, and what each control takes away from Engram."""

import copy
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engram.config import ConfigError, MemoryConfig, MemoryKind
from engram.memory import MEMORIES, AdditiveBigram, Engram, MemoryTable, OverEncoding, build_memory

D, V, N_LAYERS = 16, 50, 4
KINDS: tuple[MemoryKind, ...] = get_args(MemoryKind)


def memory(kind: MemoryKind, **changes: Any) -> MemoryConfig:
    base: dict[str, Any] = {
        "kind": kind,
        "layers": (1, 3),
        "orders": (2, 3),
        "n_heads": 2,
        "row_width": 4,
        "rows": (101, 103),
        "d_model": D,
        "vocab_size": V,
        "branches": 1,
    }
    return MemoryConfig(**{**base, **changes})


def modules_of(config: MemoryConfig, lookup: Tensor | None = None) -> nn.ModuleDict:
    """All modules of a memory, under the names `input` and block numbers; random where they started at 0."""
    built = build_memory(config, N_LAYERS, lookup)
    modules = nn.ModuleDict({str(layer): module for layer, module in built.at_block.items()})
    if built.at_input is not None:
        modules["input"] = built.at_input
    with torch.no_grad():
        for parameter in modules.parameters():
            parameter.normal_(std=0.5)
    return modules.double()


def inputs(B: int, T: int, module: nn.Module | None = None, branches: int = 1) -> tuple[Tensor, Tensor]:
    """Hidden states as the module meets them, and raw ids; the input embedding never has branches."""
    shape = (B, T, D) if branches == 1 or isinstance(module, OverEncoding) else (B, T, branches, D)
    return torch.randn(shape, dtype=torch.float64), torch.randint(0, V, (B, T))


def only(config: MemoryConfig) -> Engram:
    """The memory before block 1, as it starts."""
    return cast(Engram, build_memory(config, N_LAYERS).at_block[1])


def tensors_of(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else [x for part in state for x in tensors_of(part)]


def test_every_kind_that_a_config_may_name_can_be_built() -> None:
    assert set(MEMORIES) == set(KINDS)
    built = {kind: build_memory(memory(kind), N_LAYERS) for kind in KINDS}
    assert {kind: (b.at_input is not None, list(b.at_block)) for kind, b in built.items()} == {
        "engram": (False, [1, 3]),
        "capacity_one": (False, [1, 3]),
        "shuffled": (False, [1, 3]),
        "frozen_random": (False, [1, 3]),
        "over_encoding": (True, []),
        "additive_bigram": (False, [0, 1, 2, 3]),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("branches", [1, 3])
def test_every_kind_has_the_one_interface(kind: MemoryKind, branches: int) -> None:
    for module in modules_of(memory(kind, branches=branches)).values():
        hidden, ids = inputs(2, 7, module, branches)
        documents, mask = torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool)
        added, gates, _ = module.add_to(hidden, module.look_up(ids, documents, mask))
        assert added.shape == hidden.shape
        torch.testing.assert_close(added, hidden + module(hidden, ids))
        if isinstance(module, (OverEncoding, AdditiveBigram)):
            assert gates is None
        else:
            assert gates.shape == (2, 7, branches)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_ids_may_be_int32(kind: MemoryKind, packed: bool, padded: bool) -> None:
    for module in modules_of(memory(kind)).values():
        hidden, ids = inputs(2, 7, module)
        documents = torch.tensor([[0] * 3 + [1] * 4]).expand(2, -1) if packed else None
        mask = torch.arange(7).expand(2, -1) < 5 if padded else None
        short = None if documents is None else documents.int()
        assert torch.equal(module(hidden, ids.int(), short, mask), module(hidden, ids, documents, mask))
        state = module.init_state(2)
        step, expected = (module.step(hidden, i, state, d, mask)[0] for i, d in ((ids.int(), short), (ids, documents)))
        assert torch.equal(step, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("branches", [1, 3])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_rows_say_what_the_same_rows_say_in_float32(kind: MemoryKind, branches: int, autocast: bool) -> None:
    exact = modules_of(memory(kind, branches=branches)).float()
    kept = copy.deepcopy(exact)
    tables = {name: m for name, m in kept.named_modules() if isinstance(m, MemoryTable)}
    for name, table in tables.items():
        table.bfloat16()
        with torch.no_grad():
            cast(MemoryTable, exact.get_submodule(name)).weight.copy_(table.weight)
    for name, module in kept.items():
        hidden, ids = inputs(2, 14, module, branches)
        grad, updates = torch.randn(hidden.shape), []
        for one in (module, exact[name]):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                updates.append(one.add_to(hidden.float(), one.look_up(ids)).hidden)
            updates[-1].backward(grad)
        tolerance = {"rtol": 2**-7, "atol": 2**-7} if autocast else {"rtol": 0.0, "atol": 0.0}
        torch.testing.assert_close(*updates, **tolerance)
    for name, table in tables.items():
        expected = cast(MemoryTable, exact.get_submodule(name)).weight.grad
        if kind == "frozen_random":
            assert table.weight.grad is expected is None
        else:
            assert table.weight.grad is not None
            assert expected is not None
            found = table.weight.grad
            assert found.is_sparse
            assert found.dtype == torch.bfloat16
            # Each lookup's is rounded, and rows are read several times.
            torch.testing.assert_close(found.float().to_dense(), expected.to_dense(), rtol=2**-6, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_its_rows_in_the_type_of_the_config(kind: MemoryKind) -> None:
    built = build_memory(memory(kind, table_dtype="bfloat16"), N_LAYERS)
    modules = nn.ModuleList([*built.at_block.values(), *([built.at_input] if built.at_input is not None else [])])
    types = {name.endswith("table.weight"): p.dtype for name, p in modules.named_parameters()}
    assert types == {True: torch.bfloat16, False: torch.float32}
    for convert in (modules.bfloat16, modules.double, modules.float):
        (dtype,) = {p.dtype for p in convert().parameters()}
        for module in modules:
            hidden, ids = inputs(2, 5, module)
            assert module.add_to(hidden.to(dtype), module.look_up(ids)).hidden.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("branches", [1, 3])
@pytest.mark.parametrize("chunks", [[1] * 14, [3, 1, 6, 4], [14]], ids=str)
def test_decoding_in_any_chunks_equals_the_whole(kind: MemoryKind, branches: int, chunks: list[int]) -> None:
    documents = torch.tensor([[0] * 4 + [1] * 5 + [2] * 5, [0] * 14])
    mask = torch.tensor([[0] * 3 + [1] * 11, [1] * 6 + [0] * 2 + [1] * 4 + [0] * 2], dtype=torch.bool)
    for module in modules_of(memory(kind, branches=branches)).values():
        hidden, ids = inputs(2, 14, module, branches)
        for numbers, real in [(None, None), (documents, None), (None, mask), (documents, mask)]:
            state, updates, at = module.init_state(2), [], 0
            for size in chunks:
                now = slice(at, at + size)
                by_token = (None if x is None else x[:, now] for x in (numbers, real))
                update, state = module.step(hidden[:, now], ids[:, now], state, *by_token)
                updates.append(update)
                at += size
            torch.testing.assert_close(torch.cat(updates, 1), module(hidden, ids, numbers, real))


@pytest.mark.parametrize("kind", KINDS)
def test_rejected_tokens_are_undone_by_keeping_the_old_state(kind: MemoryKind) -> None:
    for module in modules_of(memory(kind)).values():
        hidden, ids = inputs(1, 8)
        _, state = module.step(hidden[:, :5], ids[:, :5], module.init_state(1))
        before = [x.clone() for x in tensors_of(state)]
        module.step(*inputs(1, 3), state)
        assert all(torch.equal(now, old) for now, old in zip(tensors_of(state), before, strict=True))
        update, _ = module.step(hidden[:, 5:], ids[:, 5:], state)
        torch.testing.assert_close(update, module(hidden, ids)[:, 5:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("taken_back", [[0, 0], [2, 2], [3, 0], [1, 4]], ids=str)
def test_tokens_taken_back_by_each_sequence_leave_no_trace(kind: MemoryKind, taken_back: list[int]) -> None:
    mask = torch.tensor([[0, 0, 0] + [1] * 9, [1] * 12], dtype=torch.bool)
    for module in modules_of(memory(kind)).values():
        hidden, ids = inputs(2, 12)
        state = module.init_state(2, slack=4)
        for now in (slice(0, 6), slice(6, 7), slice(7, 12)):
            _, state = module.step(hidden[:, now], ids[:, now], state, None, mask[:, now])
        state = module.rollback(state, torch.tensor(taken_back))
        for row, n in enumerate(taken_back):
            new_hidden, new_ids = inputs(1, 5)
            update, _ = module.step(new_hidden, new_ids, _row(state, row))
            kept = slice(3 if row == 0 else 0, 12 - n)
            whole = torch.cat([hidden[row : row + 1, kept], new_hidden], 1)
            whole_ids = torch.cat([ids[row : row + 1, kept], new_ids], 1)
            torch.testing.assert_close(update, module(whole, whole_ids)[:, -5:])


def _row(part: Any, row: int) -> Any:
    """One sequence of a state, or of a part of one."""
    return part[row : row + 1] if isinstance(part, Tensor) else type(part)(*(_row(x, row) for x in part))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_gets_no_update_and_what_stands_there_does_not_matter(kind: MemoryKind) -> None:
    hidden, ids = inputs(2, 10)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    other_hidden, other_ids = inputs(2, 10)
    for module in modules_of(memory(kind)).values():
        update = module(hidden, ids, padding_mask=mask)
        changed = module(
            hidden.where(mask[..., None], other_hidden), ids.where(mask, other_ids), None, padding_mask=mask
        )
        assert torch.equal(update, changed)
        assert (update[~mask] == 0).all()
        assert (update[mask] != 0).all()


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"shuffled"}))
def test_no_kind_reads_across_documents(kind: MemoryKind) -> None:
    lengths = [4, 1, 6]
    hidden, ids = inputs(2, 11)
    numbers = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).expand(2, -1)
    for module in modules_of(memory(kind)).values():
        alone = [module(h, i) for h, i in zip(hidden.split(lengths, 1), ids.split(lengths, 1), strict=True)]
        torch.testing.assert_close(module(hidden, ids, numbers), torch.cat(alone, 1))


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"shuffled", "capacity_one"}))
def test_ids_with_one_canonical_id_are_one_to_every_kind(kind: MemoryKind) -> None:
    lookup = torch.arange(V) // 2
    hidden, ids = inputs(2, 9)
    twins = ids ^ 1
    compressed, raw = (modules_of(memory(kind, compress=compress), lookup) for compress in (True, False))
    for one, two in zip(compressed.values(), raw.values(), strict=True):
        assert torch.equal(one(hidden, ids), one(hidden, twins))
        assert not torch.equal(two(hidden, ids), two(hidden, twins))


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"frozen_random"}))
def test_every_kind_trains_the_rows_it_reads_alone(kind: MemoryKind) -> None:
    modules = modules_of(memory(kind))
    hidden, ids = inputs(2, 5)
    sum((m(hidden, ids).square().sum() for m in modules.values()), torch.zeros(())).backward()
    owners = [m for m in modules.values() if any(isinstance(part, MemoryTable) for part in m.children())]
    assert len(owners) == (2 if isinstance(owners[0], Engram) else 1)
    for owner in cast(list[Engram], owners):
        gradient = owner.table.weight.grad
        assert gradient is not None
        assert gradient.is_sparse
        assert set(gradient.coalesce().indices()[0].tolist()) == set(owner.reader(ids).flatten().tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_builds_on_the_meta_device(kind: MemoryKind) -> None:
    def parameters() -> dict[str, nn.Parameter]:
        built = build_memory(memory(kind), N_LAYERS)
        modules = [built.at_input] if built.at_input is not None else list(built.at_block.values())
        return {f"{i}.{name}": p for i, module in enumerate(modules) for name, p in module.named_parameters()}

    with torch.device("meta"):
        planned = parameters()
    real = parameters()
    assert all(p.is_meta for p in planned.values())
    assert {n: (p.shape, p.requires_grad) for n, p in planned.items()} == {
        n: (p.shape, p.requires_grad) for n, p in real.items()
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rows": (0, 0)}, r"memory\.rows is \(0, 0\)"),
        ({"vocab_size": 0}, r"memory\.vocab_size is 0"),
        ({"d_model": 0}, r"memory\.d_model is 0"),
        ({"branches": 0}, r"memory\.branches is 0"),
    ],
)
def test_no_kind_is_built_from_a_config_that_makes_no_layer(
    kind: MemoryKind, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        build_memory(memory(kind, **changes), N_LAYERS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [-1, V])
@pytest.mark.parametrize("compress", [False, True])
def test_a_token_id_outside_the_vocabulary_is_named_by_every_kind(kind: MemoryKind, bad: int, compress: bool) -> None:
    hidden, ids = inputs(2, 5)
    ids[1, 3] = bad
    for module in modules_of(memory(kind, compress=compress), torch.arange(V) // 2).values():
        with pytest.raises(ConfigError, match=f"token id is {bad}: allowed is 0 to {V - 1}"):
            module(hidden, ids)
        with pytest.raises(ConfigError, match=f"token id is {bad}: allowed is 0 to {V - 1}"):
            module.step(hidden, ids, module.init_state(2))


@pytest.mark.parametrize("kind", ["capacity_one", "shuffled", "frozen_random"])
def test_controls_have_engrams_parameters(kind: MemoryKind) -> None:
    shapes = [{n: p.shape for n, p in only(memory(k)).named_parameters()} for k in ("engram", kind)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("kind", ["capacity_one", "shuffled"])
def test_updates_of_these_controls_do_not_depend_on_the_tokens(kind: MemoryKind) -> None:
    hidden, ids = inputs(3, 20)
    others = torch.randint(0, V, (3, 20))
    controls, engrams = modules_of(memory(kind)), modules_of(memory("engram"))
    for documents in (None, (torch.arange(20) // 8).expand(3, -1)):
        for control, engram in zip(controls.values(), engrams.values(), strict=True):
            assert torch.equal(control(hidden, ids, documents), control(hidden, others, documents))
            assert not torch.equal(engram(hidden, ids, documents), engram(hidden, others, documents))


def test_capacity_one_trains_one_row_for_each_head() -> None:
    module = cast(Engram, modules_of(memory("capacity_one"))["1"])
    module(*inputs(3, 20)).square().sum().backward()
    assert module.table.weight.grad is not None
    rows = module.table.weight.grad.coalesce().indices()[0]
    # The primes from 101 and from 103 on: 101, 103 for order 2 and then 107, 109 for order 3.
    assert rows.tolist() == [0, 101, 204, 311]


def test_shuffled_rows_are_fixed_by_position_and_document_in_every_model() -> None:
    first, second = (only(memory("shuffled")).reader for _ in range(2))
    _, ids = inputs(2, 30)
    documents = (torch.arange(30) // 11).expand(2, -1)
    rows = first(ids, documents)
    assert torch.equal(rows, second(torch.zeros_like(ids), documents))
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(first(ids), first(ids, torch.zeros_like(ids)))
    assert (rows[:, 11:] != first(ids)[:, 11:]).float().mean() > 0.9


def test_shuffled_reads_spread_over_the_rows() -> None:
    rows = only(memory("shuffled", rows=(31, 37))).reader(torch.zeros(1, 400, dtype=torch.int64))
    assert all(len(rows[..., head].unique()) > 25 for head in range(4))


def test_frozen_rows_are_random_depend_on_the_tokens_and_keep_their_values() -> None:
    assert only(memory("frozen_random")).table.weight.std() > 0
    module = cast(Engram, modules_of(memory("frozen_random"))["1"])
    hidden, ids = inputs(2, 12)
    assert not torch.equal(module(hidden, ids), module(hidden, (ids + 1) % V))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    module(hidden, ids).square().sum().backward()
    optimizer.step()
    assert module.table.weight.grad is None
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(before) - {"table.weight"}


def test_over_encoding_makes_the_embedding_an_average() -> None:
    layer = build_memory(memory("over_encoding"), N_LAYERS).at_input
    assert isinstance(layer, OverEncoding)
    ids, x = torch.randint(0, V, (2, 7)), torch.randn(2, 7, D)
    rows = layer.reader(ids)
    expected = x.clone()
    for head in range(4):
        expected += layer.table.weight[rows[..., head]] @ layer.project.weight[:, 4 * head : 4 * head + 4].T
    torch.testing.assert_close(x + layer(x, ids), expected / 5)


ONE_WHOLE_ROW: dict[str, Any] = {"layers": (0,), "orders": (2,), "n_heads": 1, "row_width": D, "rows": (31,)}


@pytest.mark.parametrize("branches", [1, 4])
@pytest.mark.parametrize("layout", [ONE_WHOLE_ROW, {}], ids=["one whole row", "four rows"])
def test_additive_bigram_adds_scaled_rows_before_every_block(branches: int, layout: dict[str, Any]) -> None:
    modules = build_memory(memory("additive_bigram", branches=branches, **layout), 3).at_block
    assert sorted(modules) == [0, 1, 2]
    assert sum(isinstance(m, MemoryTable) for block in modules.values() for m in block.modules()) == 1
    ids = torch.randint(0, V, (2, 7))
    hidden = torch.randn((2, 7, D) if branches == 1 else (2, 7, branches, D))
    assert all((block(hidden, ids) == 0).all() for block in modules.values())
    owner = modules[0]
    assert isinstance(owner, AdditiveBigram)
    torch.nn.init.normal_(owner.table.weight)
    rows = owner.table.weight[owner.reader(ids)].flatten(2)
    for layer, block in modules.items():
        assert block.scale.weight.item() == pytest.approx(0.1)
        torch.nn.init.constant_(block.scale.weight, 0.1 * (layer + 1))
        update = block(hidden, ids)
        assert update.shape == hidden.shape
        expected = 0.1 * (layer + 1) * rows
        torch.testing.assert_close(update, expected if branches == 1 else expected.unsqueeze(2).expand_as(hidden))


def test_every_block_trains_the_bigrams_shared_rows() -> None:
    modules = modules_of(memory("additive_bigram"))
    table = cast(AdditiveBigram, modules["0"]).table.weight
    hidden, ids = inputs(1, 6)
    for module in modules.values():
        (gradient,) = torch.autograd.grad(module(hidden, ids).sum(), table)
        values = gradient.coalesce().values()
        torch.testing.assert_close(values, (values / module.scale.weight).round() * module.scale.weight)
        assert (values != 0).all()


def test_the_bigrams_shared_table_stands_once_in_a_state_dict() -> None:
    modules = modules_of(memory("additive_bigram", **ONE_WHOLE_ROW))
    assert [name for name in modules.state_dict() if "table" in name] == ["0.table.weight"]
    table = cast(AdditiveBigram, modules["0"]).table.weight
    assert sum(p.numel() for p in modules.parameters()) == table.numel() + N_LAYERS


def test_the_bigrams_shared_table_survives_safetensors(tmp_path: Path) -> None:
    modules, fresh = modules_of(memory("additive_bigram")), modules_of(memory("additive_bigram"))
    save_file(modules.state_dict(), tmp_path / "memory.safetensors")  # refuses tensors that share storage
    fresh.load_state_dict(load_file(tmp_path / "memory.safetensors"))
    hidden, ids = inputs(2, 7)
    for module, other in zip(modules.values(), fresh.values(), strict=True):
        assert torch.equal(module(hidden, ids), other(hidden, ids))


def test_a_copy_of_a_model_has_a_bigram_table_of_its_own() -> None:
    modules = modules_of(memory("additive_bigram"))
    hidden, ids = inputs(2, 7)
    copied = copy.deepcopy(modules)
    nn.init.zeros_(cast(AdditiveBigram, copied["0"]).table.weight)
    for name in modules:
        assert (copied[name](hidden, ids) == 0).all()
        assert (modules[name](hidden, ids) != 0).all()
