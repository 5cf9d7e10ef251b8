import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from asking import held_out_suffixes, seen_in_training, suffixes
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.config import ConfigError
from engram.training.data import TokenData
from eval.shared.held_out import HeldOut
from eval.shared.ngrams import Suffixes
from eval.shared.strata import count_suffixes
from eval.shared.subjects import TrainingRun, open_subjects

Windows = st.integers(1, 5).flatmap(
    lambda T: st.lists(
        st.tuples(st.lists(st.integers(0, 3), min_size=T, max_size=T), st.lists(st.booleans(), min_size=T, max_size=T)),
        min_size=1,
        max_size=6,
    )
)


def _arrays(windows: list[tuple[list[int], list[bool]]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([ids for ids, _ in windows]), np.cumsum([starts for _, starts in windows], 1)


def _plain(ids: np.ndarray, documents: np.ndarray, order: int) -> list[tuple[int, ...]]:
    identity = np.arange(10)
    return [gram for row, own in zip(ids, documents, strict=True) for gram in suffixes(row, own, order, 0, identity)]


@settings(max_examples=60, deadline=None)
@given(Windows, Windows, st.integers(1, 4))
def test_two_positions_have_one_number_just_if_their_n_grams_are_the_same(known, other, order) -> None:
    ids, documents = _arrays(known)
    known_suffixes = Suffixes(order, 0, 4)
    numbers = known_suffixes.add(ids, documents).ravel().tolist()
    names = dict(zip(_plain(ids, documents, order), numbers, strict=True))
    assert len(set(names.values())) == len(names) == len(known_suffixes)
    assert {tuple(gram): i for i, gram in enumerate(known_suffixes.ids().tolist())} == names
    other_ids, other_documents = _arrays(other)
    found = known_suffixes.find(other_ids, other_documents).ravel().tolist()
    assert found == [names.get(gram, -1) for gram in _plain(other_ids, other_documents, order)]


@settings(max_examples=40, deadline=None)
@given(Windows, Windows, st.integers(1, 4))
def test_a_text_that_grows_keeps_the_numbers_that_n_grams_have(first, more, order) -> None:
    grown, names = Suffixes(order, 0, 4), dict[tuple[int, ...], int]()
    assert (grown.find(*_arrays(first)) == -1).all()
    for part in (first, more):
        ids, documents = _arrays(part)
        found = dict(zip(_plain(ids, documents, order), grown.add(ids, documents).ravel().tolist(), strict=True))
        assert all(names.get(gram, number) == number for gram, number in found.items())
        names |= found
    assert sorted(names.values()) == list(range(len(grown)))
    assert [tuple(gram) for gram in grown.ids().tolist()] == sorted(names, key=names.__getitem__)
    assert grown.find(ids, documents).ravel().tolist() == [names[gram] for gram in _plain(ids, documents, order)]


def test_an_id_that_the_known_text_has_not_is_not_taken_for_another_n_gram() -> None:
    # As numbers in base 3, (1, 4) and (2, 1) are the same.
    one_document = np.zeros((1, 2), np.int64)
    known = Suffixes(2, 0, 3)
    known.add(np.array([[2, 1]]), one_document)
    assert (known.find(np.array([[1, 4]]), one_document) == -1).all()


@pytest.mark.parametrize("order", [1, 3])
def test_times_seen_are_those_of_the_batches_that_the_run_trained_on(memory_run: Path, order: int) -> None:
    (subject,) = open_subjects([memory_run])
    assert subject.run is not None
    held_out = HeldOut(subject.run.data, tokens=4096)
    found = count_suffixes(held_out, subject, order)
    seen: Counter[tuple[int, ...]] = seen_in_training(subject, order)
    wanted = [[seen[gram] for gram in window] for window in held_out_suffixes(subject, held_out.n_windows, order)]
    assert found.counts.tolist() == wanted
    assert found.counts.min() == 0 or order == 1
    assert found.counts.max() > 100


def test_times_seen_in_the_first_tokens_of_training_are_those_of_a_run_that_ended_there(memory_run: Path) -> None:
    (subject,) = open_subjects([memory_run])
    assert subject.run is not None
    held_out, batch = HeldOut(subject.run.data, tokens=1024), 16 * 64
    short = dataclasses.replace(subject, run=dataclasses.replace(subject.run, samples=10 * 16))
    found = count_suffixes(held_out, subject, 2, train_tokens=10 * batch)
    seen = seen_in_training(short, 2)
    wanted = [[seen[gram] for gram in window] for window in held_out_suffixes(subject, held_out.n_windows, 2)]
    assert found.counts.tolist() == wanted
    assert found.counts.max() < count_suffixes(held_out, subject, 2).counts.max()
    with pytest.raises(ConfigError, match="train-tokens is -1"):
        count_suffixes(held_out, subject, 2, train_tokens=-1)


def test_windows_of_a_run_are_those_of_its_batches_over_epochs(memory_run: Path) -> None:
    (subject,) = open_subjects([memory_run])
    assert subject.run is not None
    data = TokenData(dataclasses.replace(subject.run.data.config, batch_size=500))
    steps = data.n_train_windows * 5 // 2 // 500
    times = Counter[bytes]()
    for step in range(steps):
        times.update(row.tobytes() for row in data.train_batch(step)["tokens"].numpy())
    windows, often = TrainingRun(data, data.corpus_hash, steps * 500, {}).windows()
    assert set(often.tolist()) == {2, 3}
    own = Counter[bytes]()
    for row, n in zip(data.train_windows(windows)["tokens"].numpy(), often.tolist(), strict=True):
        own[row.tobytes()] += n
    assert own == times
