"""Row ids against published integers, a numpy restatement of the demonstration code, and transformers' Qwen4-Exp."""

import shutil
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.config import ConfigError, MemoryConfig
from engram.memory.hashing import NgramHasher, qwen_multipliers, table_sizes
from engram.memory.primes import is_prime, next_primes
from engram.memory.readers import RowReader


def memory(**changes: object) -> MemoryConfig:
    base: dict = {"layers": (1, 4), "orders": (2, 3), "n_heads": 4, "row_width": 4, "rows": (997, 1200), "seed": 3}
    base["compress"] = changes.get("hash") != "qwen"
    return MemoryConfig(**{**base, **changes})


def test_published_prime_layouts() -> None:
    primes = next_primes(16_000_000, 48)
    assert sum(primes[:24]) == 384_006_168  # DeepSeek-V4.1, first memory layer
    assert sum(primes[24:]) == 384_016_682  # and its second
    assert sum(next_primes(20_000_000, 16)) == 320_001_446  # Qwen4-Exp


def test_v41_layout_comes_out_of_a_config() -> None:
    sizes = table_sizes(memory(layers=(1, 14), orders=(2, 3, 4), n_heads=8, rows=(16_000_000,) * 3))
    assert {layer: sum(heads) for layer, heads in sizes.items()} == {1: 384_006_168, 14: 384_016_682}


def test_published_qwen_multipliers() -> None:
    assert qwen_multipliers(0, 248_320, 3, 1234) == (23703573157769, 20109073645365, 8052911324071)


def sieve_of_eratosthenes(end: int) -> list[int]:
    sieve = np.ones(end, dtype=bool)
    sieve[:2] = False
    for i in range(2, int(end**0.5) + 1):
        if sieve[i]:
            sieve[i * i :: i] = False
    return np.flatnonzero(sieve).tolist()


def test_primes_agree_with_a_sieve() -> None:
    assert [n for n in range(20_000) if is_prime(n)] == sieve_of_eratosthenes(20_000)


def test_strong_pseudoprimes_are_not_prime() -> None:
    # Composites that pass Miller-Rabin to the bases 2; 2 and 3; 2, 3, 5 and 7; and up to 37.
    for number in (2047, 1_373_653, 3_215_031_751, 318_665_857_834_031_151_167_461):
        assert not is_prime(number)


@settings(max_examples=30, deadline=None)
@given(
    bases=st.lists(st.one_of(st.integers(1, 60), st.integers(1000, 1060)), min_size=1, max_size=4),
    n_heads=st.integers(1, 5),
    n_layers=st.integers(1, 4),
)
def test_moduli_are_those_of_the_demonstrations_search(bases: list[int], n_heads: int, n_layers: int) -> None:
    """SPEC 1.2 read literally: from `base - 1` upwards, head by head, the next prime that no head has taken."""
    primes, taken, expected = sieve_of_eratosthenes(4000), set(), {}
    for layer in range(n_layers):
        heads = []
        for base in bases:
            at = base - 1
            for _ in range(n_heads):
                at = next(p for p in primes if p > at and p not in taken)
                taken.add(at)
                heads.append(at)
        expected[layer] = tuple(heads)
    orders = tuple(range(1, len(bases) + 1))
    config = memory(layers=tuple(range(n_layers)), orders=orders, rows=tuple(bases), n_heads=n_heads)
    assert table_sizes(config) == expected


def test_dozens_of_large_tables_are_sized_in_no_time() -> None:
    config = memory(layers=tuple(range(30)), orders=(2, 3, 4), n_heads=16, rows=(20_000_000,) * 3)
    began = time.process_time()
    sizes = table_sizes(config)
    assert time.process_time() - began < 1.0  # 0.03 s where this was written
    assert len({size for heads in sizes.values() for size in heads}) == 30 * 3 * 16


def reference_rows(
    ids: Sequence[int],
    documents: Sequence[int],
    multipliers: Sequence[int],
    sizes: Sequence[int],
    orders: Sequence[int],
    n_heads: int,
    pad: int,
    eos: int | None = None,
) -> np.ndarray:
    """SPEC 1.2 for one row of ids, position by position, in plain Python integers; offsets added.

    An N-gram holds the pad from the first position back that belongs to another document, or, with `eos`, is one.
    """
    out = []
    for t in range(len(ids)):
        window, outside = [ids[t]], False
        for i in range(t - 1, t - max(orders), -1):
            outside = outside or i < 0 or documents[i] != documents[t] or ids[i] == eos
            window.append(pad if outside else ids[i])
        row: list[int] = []
        for n in orders:
            mix = 0
            for token, multiplier in zip(window[:n], multipliers[:n], strict=True):
                mix ^= int(token) * multiplier
            for _ in range(n_heads):
                row.append(mix % sizes[len(row)] + sum(sizes[: len(row)]))
        out.append(row)
    return np.array(out)


def demonstration_multipliers(layer: int, vocabulary: int, order: int, seed: int) -> list[int]:
    drawn = np.random.default_rng(seed + 10007 * layer).integers(
        0, max(1, (np.iinfo(np.int64).max // vocabulary) // 2), size=order
    )
    return [2 * int(r) + 1 for r in drawn]


@pytest.mark.parametrize(
    ("orders", "rows", "n_heads", "layers", "seed"),
    [
        ((2, 3), (646_400, 646_400), 8, (1, 15), 0),  # the demonstration's own sizes
        ((2, 3, 4), (500, 600, 700), 4, (1, 4), 3),
        ((1,), (500,), 1, (0, 2), 0),
        ((3,), (500,), 4, (0, 2), 1),
        ((1, 2, 5), (2, 1, 700), 3, (7,), 2),
    ],
)
def test_rows_are_those_of_the_demonstration_code(
    orders: tuple[int, ...], rows: tuple[int, ...], n_heads: int, layers: tuple[int, ...], seed: int
) -> None:
    config = memory(orders=orders, rows=rows, n_heads=n_heads, layers=layers, seed=seed)
    V, pad = 129_280, 2
    hasher = NgramHasher(config, V, pad)
    ids = np.random.default_rng(0).integers(0, V, size=(2, 40))
    for layer in layers:
        found = hasher(torch.from_numpy(ids), layer).numpy()
        multipliers = demonstration_multipliers(layer, V, orders[-1], seed)
        for row, row_ids in zip(found, ids, strict=True):
            expected = reference_rows(
                row_ids.tolist(), [0] * 40, multipliers, table_sizes(config)[layer], orders, n_heads, pad
            )
            np.testing.assert_array_equal(row, expected)


@pytest.mark.parametrize("layer", [1, 4])
def test_ids_are_made_canonical_before_they_are_hashed(layer: int) -> None:
    """Padding is the pad's canonical id, and |V'| bounds the multipliers; the raw pad and |V| would be valid too."""
    V, pad = 40, 7
    lookup = [i // 3 % 11 for i in range(V)]  # 11 canonical ids, each of three raw ones or more
    config = memory(orders=(2, 3, 4), rows=(101, 211, 307), vocab_size=V, pad_id=pad)
    ids = np.random.default_rng(0).integers(0, V, size=(3, 25))
    documents = np.array([[0] * 25, [0] * 9 + [1] * 16, [0, 1, 1, 2] + [5] * 7 + [6] * 14])
    reader = RowReader(config, layer, torch.tensor(lookup))
    found = reader(torch.from_numpy(ids), torch.from_numpy(documents)).numpy()
    multipliers = demonstration_multipliers(layer, 11, 4, config.seed)
    for row, row_ids, row_documents in zip(found, ids, documents, strict=True):
        canonical = [lookup[i] for i in row_ids]
        expected = reference_rows(
            canonical, row_documents, multipliers, table_sizes(config)[layer], (2, 3, 4), 4, pad=lookup[pad]
        )
        np.testing.assert_array_equal(row, expected)


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=24),
    orders=st.sets(st.integers(1, 5), min_size=1).map(sorted),
    family=st.sampled_from(["deepseek", "qwen"]),
)
def test_ngrams_end_at_documents_and_in_the_qwen_family_at_eos(
    tokens: list[tuple[int, int]], orders: list[int], family: str
) -> None:
    ids = [token for token, _ in tokens]
    documents = np.cumsum([step == 0 for _, step in tokens]).tolist()  # a new document at every fourth token or so
    config = memory(hash=family, orders=orders, rows=(101,) * len(orders), n_heads=2)
    qwen = family == "qwen"
    multipliers = qwen_multipliers(1, 10, orders[-1], 3) if qwen else demonstration_multipliers(4, 10, orders[-1], 3)
    expected = reference_rows(
        ids, documents, multipliers, table_sizes(config)[4], orders, 2, pad=5 if qwen else 2, eos=5 if qwen else None
    )
    hasher = NgramHasher(config, 10, pad_id=2, eos_id=5)
    rows = hasher(torch.tensor([ids]), 4, torch.tensor([documents]))
    np.testing.assert_array_equal(rows[0].numpy(), expected)


@pytest.fixture(scope="module")
def qwen() -> Any:
    pytest.importorskip("transformers.models.qwen4_exp.configuration_qwen4_exp")
    return pytest.importorskip("transformers.models.qwen4_exp.modeling_qwen4_exp")


@pytest.mark.parametrize(
    ("B", "T", "share_of_eos"), [(1, 1, 0.0), (3, 2, 0.5), (4, 60, 0.1), (2, 33, 0.6), (2, 9, 1.0)]
)
@pytest.mark.parametrize(("ngram_size", "n_heads"), [(2, 3), (3, 4), (4, 2)])
def test_rows_equal_transformers_qwen_embedding(
    qwen: Any, B: int, T: int, share_of_eos: float, ngram_size: int, n_heads: int
) -> None:
    width = (ngram_size - 1) * n_heads
    text = qwen.Qwen4ExpTextConfig(
        vocab_size=500,
        hidden_size=width,
        ple_layer_ids=[1, 2],
        ple_embed_dim=width,
        ngram_size=ngram_size,
        heads_per_ngram=n_heads,
        ngram_vocab_size_base=1000,
        eos_token_id=7,
        seed=1234,
        num_hidden_layers=4,
    )
    orders = tuple(range(2, ngram_size + 1))
    rows = (1000,) * len(orders)
    config = memory(hash="qwen", orders=orders, rows=rows, n_heads=n_heads, layers=(0, 1), seed=1234)
    hasher = NgramHasher(config, 500, eos_id=7)
    ids = torch.randint(0, 500, (B, T)).masked_fill(torch.rand(B, T) < share_of_eos, 7)
    for ordinal, layer in enumerate((0, 1)):
        theirs = qwen.Qwen4ExpTextNGramEmbedding(text, width, layer, ordinal)
        seen: list[torch.Tensor] = []
        theirs.ngram_embedding.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        theirs(ids, None)
        assert torch.equal(hasher(ids, layer), seen[0])
        assert theirs.ngram_embedding.num_embeddings - hasher.n_rows[layer] in range(128)  # theirs is padded to 128


@settings(max_examples=40, deadline=None)
@given(data=st.data(), family=st.sampled_from(["deepseek", "qwen"]))
def test_streaming_gives_the_rows_of_the_whole(data: st.DataObject, family: str) -> None:
    config = memory(hash=family, orders=(2, 4), rows=(101, 211))
    ids = torch.tensor(data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=30)))[None]
    documents = torch.tensor(data.draw(st.lists(st.booleans(), min_size=ids.shape[1], max_size=ids.shape[1])))
    documents = documents.long().cumsum(0)[None]
    hasher = NgramHasher(config, 10, pad_id=2, eos_id=5)
    whole = hasher(ids, 4, documents)
    state, parts, at = hasher.init_state(1), [], 0
    while at < ids.shape[1]:
        size = data.draw(st.integers(1, 7))
        rows, state = hasher.step(ids[:, at : at + size], 4, state, documents[:, at : at + size])
        parts.append(rows)
        at += size
    assert torch.equal(torch.cat(parts, 1), whole)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6), family=st.sampled_from(["deepseek", "qwen"]))
def test_rows_of_different_documents_never_mix(lengths: list[int], family: str) -> None:
    """The rows of a document in a packed window are those of the document alone."""
    hasher = NgramHasher(memory(hash=family, orders=(2, 3, 4), rows=(101, 103, 107)), 50, pad_id=2, eos_id=49)
    documents = [torch.randint(0, 49, (1, n)) for n in lengths]
    ids = torch.cat(documents, 1)
    numbers = torch.cat([torch.full((1, n), i) for i, n in enumerate(lengths)], 1)
    alone = torch.cat([hasher(d, 1) for d in documents], 1)
    assert torch.equal(hasher(ids, 1, numbers), alone)


def test_a_state_keeps_the_last_ids_and_no_more() -> None:
    hasher = NgramHasher(memory(orders=(2, 4)), 1000)
    ids = torch.randint(0, 1000, (2, 500))
    _, state = hasher.step(ids, 1, hasher.init_state(2))
    assert torch.equal(state.ids, ids[:, -3:])
    assert state.ids.untyped_storage().nbytes() == 2 * 3 * 8


@pytest.mark.parametrize("family", ["deepseek", "qwen"])
def test_compiled_rows_equal_eager_rows(family: str) -> None:
    hasher = NgramHasher(memory(hash=family, orders=(1, 3)), 50, pad_id=2, eos_id=5)
    ids = torch.randint(0, 50, (2, 33))
    documents = torch.randint(0, 4, (2, 33)).sort(dim=1).values
    compiled = torch.compile(hasher, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids, 1, documents), hasher(ids, 1, documents))
    step = torch.compile(hasher.step, fullgraph=True, backend="aot_eager", dynamic=True)
    state, parts = hasher.init_state(2), []
    for begin, end in ((0, 7), (7, 9), (9, 33)):
        rows, state = step(ids[:, begin:end], 1, state, documents[:, begin:end])
        parts.append(rows)
    assert torch.equal(torch.cat(parts, 1), hasher(ids, 1, documents))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's inductor needs a C++ compiler")
def test_generated_code_computes_the_same_rows() -> None:
    hasher = NgramHasher(memory(), 129_280)
    ids = torch.randint(0, 129_280, (2, 33))
    documents = torch.randint(0, 4, (2, 33)).sort(dim=1).values
    assert torch.equal(torch.compile(hasher, fullgraph=True)(ids, 1, documents), hasher(ids, 1, documents))


def test_rows_stay_inside_their_heads_table() -> None:
    config = memory()
    rows = NgramHasher(config, 10**6)(torch.randint(0, 10**6, (4, 200)), 1)
    ends = np.cumsum(table_sizes(config)[1])
    starts = ends - table_sizes(config)[1]
    for head in range(8):
        assert rows[..., head].min() >= starts[head]
        assert rows[..., head].max() < ends[head]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["deepseek", "qwen"])
def test_rows_are_the_same_on_the_gpu(family: str) -> None:
    hasher = NgramHasher(memory(hash=family, rows=(16_000_000, 20_000_000)), 129_280, pad_id=2, eos_id=5)
    ids = torch.randint(0, 129_280, (4, 257)).masked_fill(torch.rand(4, 257) < 0.1, 5)
    documents = torch.randint(0, 9, (4, 257)).sort(dim=1).values
    expected = hasher(ids, 4, documents)
    on_gpu = hasher.cuda()
    assert torch.equal(on_gpu(ids.cuda(), 4, documents.cuda()).cpu(), expected)
    compiled = torch.compile(on_gpu, fullgraph=True)
    assert torch.equal(compiled(ids.cuda(), 4, documents.cuda()).cpu(), expected)
    state, parts = on_gpu.init_state(4), []
    for part, part_documents in zip(ids.cuda().split(100, 1), documents.cuda().split(100, 1), strict=True):
        rows, state = on_gpu.step(part, 4, state, part_documents)
        parts.append(rows)
    assert torch.equal(torch.cat(parts, 1).cpu(), expected)


def test_pad_and_eos_are_the_configs_unless_named() -> None:
    ids = torch.randint(0, 50, (2, 9))
    for family in ("deepseek", "qwen"):
        own = NgramHasher(memory(hash=family, pad_id=11, eos_id=12), 50)
        named = NgramHasher(memory(hash=family), 50, pad_id=11, eos_id=12)
        other = NgramHasher(memory(hash=family), 50, pad_id=13, eos_id=14)
        assert torch.equal(own(ids, 1), named(ids, 1))
        assert not torch.equal(own(ids, 1), other(ids, 1))


def test_what_cannot_be_hashed_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"memory\.rows is \(0, 0\): allowed is 1 or more"):
        NgramHasher(memory(rows=(0, 0)), 10)
    with pytest.raises(ConfigError, match="pad_id is 10: allowed is a canonical id, 0 to 9"):
        NgramHasher(memory(), 10, pad_id=10)
    with pytest.raises(ConfigError, match="eos_id is 10: allowed is a canonical id, 0 to 9"):
        NgramHasher(memory(hash="qwen"), 10, eos_id=10)
    with pytest.raises(ConfigError, match=r"layer is 2: allowed is one of memory.layers \(1, 4\)"):
        NgramHasher(memory(), 10)(torch.zeros(1, 3, dtype=torch.int64), 2)


@pytest.mark.parametrize("bad", [-1, 10])
def test_an_id_that_is_not_canonical_is_named(bad: int) -> None:
    hasher, ids = NgramHasher(memory(), 10), torch.tensor([[3, bad, 9]])
    with pytest.raises(ConfigError, match=f"token id is {bad}: allowed is 0 to 9"):
        hasher(ids, 1)
    with pytest.raises(ConfigError, match=f"token id is {bad}: allowed is 0 to 9"):
        hasher.step(ids, 1, hasher.init_state(1))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("row", "at"), [(0, 0), (0, 2), (1, 0), (1, 2)])
def test_the_worst_id_is_named_wherever_it_stands(row: int, at: int, dtype: torch.dtype) -> None:
    hasher, ids = NgramHasher(memory(), 10), torch.full((2, 3), 10, dtype=dtype)
    for bad in (12, -2):
        ids[row, at] = bad
        with pytest.raises(ConfigError, match=f"token id is {bad}: allowed is 0 to 9"):
            hasher(ids, 1)
        with pytest.raises(ConfigError, match=f"token id is {bad}: allowed is 0 to 9"):
            hasher.step(ids, 4, hasher.init_state(2))


def test_compiled_code_refuses_an_id_that_is_not_canonical() -> None:
    hasher, ids = NgramHasher(memory(), 10), torch.tensor([[3, 5, 9]])
    compiled = torch.compile(hasher, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids, 1), hasher(ids, 1))
    for bad in (-1, 10):
        with pytest.raises(ValueError, match=f"token id is {bad}: allowed is 0 to 9"):
            compiled(ids.masked_fill(ids == 9, bad), 1)


def test_no_ids_are_no_error() -> None:
    hasher = NgramHasher(memory(), 10)
    for B, T in ((0, 3), (2, 0)):
        ids = torch.empty(B, T, dtype=torch.int64)
        assert hasher(ids, 1).shape[:2] == (B, T)
        assert hasher.step(ids, 1, hasher.init_state(B))[0].shape[:2] == (B, T)


@pytest.mark.parametrize("bad", [-1, 10])
@pytest.mark.parametrize("lookup", [None, torch.arange(10) // 2], ids=["raw", "compressed"])
def test_an_id_outside_the_vocabulary_is_named(bad: int, lookup: torch.Tensor | None) -> None:
    reader = RowReader(memory(vocab_size=10), 1, lookup)
    with pytest.raises(ConfigError, match=f"token id is {bad}: allowed is 0 to 9"):
        reader(torch.tensor([[3, bad, 9]]))


@pytest.mark.parametrize("name", ["pad_id", "eos_id"])
def test_a_config_refuses_a_special_id_outside_its_vocabulary(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"memory\.{name} is 10: allowed is an id below vocab_size \(10\)"):
        memory(vocab_size=10, **{name: 10})
    assert getattr(memory(vocab_size=10, **{name: 9}), name) == 9
    assert getattr(memory(**{name: 10}), name) == 10  # the model's vocabulary is not known yet


def test_a_config_refuses_to_compress_for_the_qwen_family() -> None:
    with pytest.raises(ConfigError, match=r"memory\.compress is True: allowed is false with hash qwen"):
        memory(hash="qwen", compress=True)
