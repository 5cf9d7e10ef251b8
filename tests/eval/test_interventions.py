"""A memory that is suppressed: against models built without, rows that were read, and itself afterwards."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from engram.backbone import EngramLM
from engram.config import ConfigError, MemoryKind, ModelConfig
from engram.memory import MemoryTable
from eval.shared.interventions import CHANGES, Change, suppressed

KINDS: tuple[MemoryKind, ...] = get_args(MemoryKind)
V, B, T = 60, 3, 14


def model_of(kind: MemoryKind = "engram", branches: int = 1, **memory: Any) -> EngramLM:
    """A random model in which every weight matters, with memories before blocks 0 and 2 or where the kind has them."""
    width = {"n_heads": 1, "orders": [2], "rows": [101], "row_width": 16} if kind == "additive_bigram" else {}
    sizes = {"layers": [0, 2], "n_heads": 2, "row_width": 4, "rows": [101, 103], **width, **memory}
    config = ModelConfig.from_dict(
        {
            "vocab_size": V,
            "d_model": 16,
            "n_layers": 3,
            "dense_width": 24,
            "max_seq_len": T,
            "branches": branches,
            "attention": {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8},
            "experts": {"n_experts": 4, "top_k": 2, "width": 8},
            "memory": {"kind": kind, **sizes},
        }
    )
    torch.manual_seed(0)
    model = EngramLM(config, torch.arange(V) // 2)
    with torch.no_grad():
        for parameter in model.memory.parameters():
            parameter.normal_(std=0.5)
        if model.input_memory is not None:
            for parameter in model.input_memory.parameters():
                parameter.normal_(std=0.5)
    return model.double().eval()


def text() -> tuple[Tensor, Tensor]:
    """Ids, and documents of which one begins amid the windows."""
    torch.manual_seed(1)
    return torch.randint(0, V, (B, T)), (torch.arange(T) >= 5).long().expand(B, T)


@contextmanager
def rows_read(model: EngramLM) -> Iterator[list[Tensor]]:
    """The rows that tables are asked for, call by call."""
    read: list[Tensor] = []
    start = MemoryTable.start

    def spy(table: MemoryTable, rows: Tensor) -> Any:
        read.append(rows)
        return start(table, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryTable, "start", spy)
        yield read


def without_memory(model: EngramLM) -> EngramLM:
    """A model of the same weights that was built without memory."""
    config = model.config.to_dict()
    config["memory"]["rows"] = [0 for _ in config["memory"]["rows"]]
    bare = EngramLM(ModelConfig.from_dict(config)).double().eval()
    missing = bare.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys
    assert all("memory" in name for name in missing.unexpected_keys)
    assert missing.unexpected_keys
    return bare


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "over_encoding"])
def test_zeroed_is_the_model_that_was_built_without_memory(kind: MemoryKind, branches: int) -> None:
    model, (ids, documents) = model_of(kind, branches), text()
    normal = model.run(ids, documents)
    with suppressed(model, "zeroed"):
        zeroed = model.run(ids, documents)
    bare = without_memory(model).run(ids, documents)
    assert torch.equal(zeroed.hidden, bare.hidden)
    assert not zeroed.gates
    assert not torch.allclose(normal.hidden, bare.hidden, atol=1e-2)


def test_over_encoding_that_is_zeroed_still_divides_the_embedding() -> None:
    """By one more than there are heads."""
    model, (ids, documents) = model_of("over_encoding"), text()
    with suppressed(model, "zeroed"):
        zeroed = model.run(ids, documents).hidden
    bare = without_memory(model)
    with torch.no_grad():
        bare.embed.weight /= 5
    torch.testing.assert_close(zeroed, bare.run(ids, documents).hidden)


@pytest.mark.parametrize("kind", KINDS)
def test_shuffled_reads_other_rows_of_the_same_heads_one_for_one(kind: MemoryKind) -> None:
    model, (ids, documents) = model_of(kind), text()
    torch.manual_seed(2)
    ids = torch.randint(0, V, (40, T))  # so that N-grams come again
    documents = documents[:1].expand(40, T)
    with rows_read(model) as right:
        normal = model.run(ids, documents).hidden
    with suppressed(model, "shuffled"), rows_read(model) as wrong:
        shuffled = model.run(ids, documents).hidden
    assert not torch.allclose(normal, shuffled, atol=1e-3)
    readers = [getattr(m, "source", m).reader for m in model.memories().values()]
    assert len(right) == len(wrong) == len(readers)
    for reader, before, after in zip(readers, right, wrong, strict=True):
        at = reader.hasher.layers.index(reader.layer)
        for h, (first, size) in enumerate(
            zip(reader.hasher.offsets[at].tolist(), reader.hasher.moduli[at].tolist(), strict=True)
        ):
            moved: dict[int, int] = {}
            for old, new in zip(before[..., h].flatten().tolist(), after[..., h].flatten().tolist(), strict=True):
                assert moved.setdefault(old, new) == new  # an N-gram's wrong row is always the same
                assert first <= new < first + size
                assert new != old
            assert len(set(moved.values())) == len(moved)  # no two of them become one


def test_all_rows_of_a_head_change_places_and_heads_differ() -> None:
    model = model_of()
    memory = model.memories()["2"]
    sizes, offsets = memory.reader.hasher.moduli[1], memory.reader.hasher.offsets[1]
    n = int(sizes.max())
    places = torch.arange(n).unsqueeze(1) % sizes
    with suppressed(model, "shuffled"), rows_read(model) as read, pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(memory.reader), "forward", lambda self, ids, documents=None: (places + offsets).unsqueeze(0))
        model.memories()["2"].look_up(torch.zeros(1, n, dtype=torch.int64))
    images = read[0][0]
    for h, size in enumerate(sizes.tolist()):
        assert sorted((images[:size, h] - offsets[h]).tolist()) == list(range(size))
    assert len(set((images - offsets)[0].tolist())) == len(sizes)

    # A copy whose rows have changed places, one by one.
    ids, documents = text()
    moved = copy.deepcopy(model)
    for h, (first, size) in enumerate(zip(offsets.tolist(), sizes.tolist(), strict=True)):
        for place in range(size):
            moved.memories()["2"].table.weight.data[first + place] = memory.table.weight.data[images[place, h]]
    with suppressed(model, "shuffled", ["2"]):
        torch.testing.assert_close(model.run(ids, documents).hidden, moved.run(ids, documents).hidden)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_afterwards_all_is_as_it_was_also_after_an_exception(kind: MemoryKind, change: Change) -> None:
    model, (ids, documents) = model_of(kind), text()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    before = model.run(ids, documents).hidden
    with pytest.raises(RuntimeError, match="amid"), suppressed(model, change):  # noqa: PT012
        model.run(ids, documents)
        raise RuntimeError("amid")
    assert dict(model.named_modules()) == modules
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model.run(ids, documents).hidden, before)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_in_chunks_equals_the_whole_inside_too(kind: MemoryKind, change: Change) -> None:
    model, (ids, _) = model_of(kind), text()
    with suppressed(model, change):
        whole = model.run(ids).hidden
        state = model.init_state(B, T + 2, slack=2)
        model.step(ids[:, :4], state)
        model.step(ids[:, :2], state)  # to be taken back
        state.rollback(2)
        chunks = [model.step(part, state).hidden for part in (ids[:, 4:5], ids[:, 5:])]
    torch.testing.assert_close(torch.cat(chunks, 1), whole[:, 4:])
    assert not torch.allclose(model.run(ids).hidden, whole, atol=1e-3)


@pytest.mark.parametrize("kind", ["engram", "additive_bigram"])
def test_one_memory_alone_is_suppressed(kind: MemoryKind) -> None:
    model, (ids, documents) = model_of(kind), text()
    for change in CHANGES:
        with rows_read(model) as right:
            model.run(ids, documents)
        with suppressed(model, change, ["2"]), rows_read(model) as read:
            one = model.run(ids, documents)
        with suppressed(model, change):
            all_of_them = model.run(ids, documents)
        assert not torch.allclose(one.hidden, all_of_them.hidden, atol=1e-3)
        assert torch.equal(read[0], right[0])
        if kind == "engram":
            assert list(one.gates) == ([0] if change == "zeroed" else [0, 2])
            torch.testing.assert_close(one.gates[0], model.run(ids, documents).gates[0])


def test_what_cannot_be_suppressed_is_named() -> None:
    model = model_of()
    with (
        pytest.raises(ConfigError, match=r"layers is '1': allowed is one of the memories of the model: 0, 2"),
        suppressed(model, "zeroed", ["1"]),
    ):
        pass
    with pytest.raises(ConfigError, match="has no memory"), suppressed(without_memory(model), "zeroed"):
        pass
