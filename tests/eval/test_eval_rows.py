import argparse
import dataclasses
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asking import answer_of, suffixes

from engram.backbone import EngramLM
from engram.backbone.initialize import materialize
from engram.config import MemoryConfig
from engram.inference.offload import quantize
from eval.rows import NgramCounts, layers_of, measure
from eval.shared.command import plain, run
from eval.shared.question import Asked
from eval.shared.subjects import Subject, open_subjects

STEPS, WINDOWS = 12, 24
KINDS: dict[str, dict[str, Any]] = {
    "engram": {},
    "over_encoding": {},
    "additive_bigram": {"orders": (2,), "rows": (1009,), "n_heads": 1, "row_width": 48},
    "capacity_one": {},
    "shuffled": {},
    "frozen_random": {},
}


def _asked(subject: Subject, batch_size: int = 0, steps: int = STEPS) -> Asked:
    """As on the command line, of a model that was trained for a few steps of the run alone."""
    run = dataclasses.replace(subject.run, samples=steps * 16)
    options = argparse.Namespace(
        data=None, tokens=WINDOWS * 64, batch_size=batch_size, train_tokens=0, device="cpu", bf16=False
    )
    return Asked([dataclasses.replace(subject, run=run)], options)


def _answer(subject: Subject, batch_size: int = 0) -> list[dict[str, Any]]:
    (answer,) = plain(measure(_asked(subject, batch_size)))["checkpoints"].values()
    return answer["layers"]


def _with(memory_run: Path, **changes: Any) -> Subject:
    """The trained run with another memory, as drawn at the start."""
    (subject,) = open_subjects([memory_run])
    config = subject.model.config
    memory = dataclasses.replace(config.memory, **{"rows": (1009, 1009), **changes})
    lookup = subject.run.data.compressor().lookup
    model = EngramLM(dataclasses.replace(config, memory=memory), lookup)
    return dataclasses.replace(subject, model=model)


def _primes(base: int, used: set[int]) -> Any:
    number = base
    while True:
        if number not in used and all(number % d for d in range(2, int(number**0.5) + 1)):
            used.add(number)
            yield number
        number += 1


class ByHand:
    """What plain loops over the same windows find, with rows by the formula of the paper in Python's integers."""

    def __init__(self, subject: Subject, layer: int) -> None:
        memory: MemoryConfig = subject.model.config.memory
        lookup = subject.run.data.compressor().lookup.numpy()
        bound = max(1, (2**63 - 1) // (int(lookup.max()) + 1) // 2)
        drawn = np.random.default_rng(memory.seed + 10007 * layer).integers(0, bound, size=max(memory.orders))
        multipliers = [2 * int(r) + 1 for r in drawn]
        used: set[int] = set()
        for each in memory.layers:
            sizes = []
            for base in memory.rows:
                primes = _primes(base, used)
                sizes.append([next(primes) for _ in range(memory.n_heads)])
            if each == layer:
                self.sizes = dict(zip(memory.orders, sizes, strict=True))

        def row(gram: tuple[int, ...], size: int) -> int:
            mix = 0
            for back, i in enumerate(reversed(gram)):
                mix ^= i * multipliers[back]
            return mix % size

        data, pad = subject.run.data, int(lookup[memory.pad_id])
        self.grams: dict[int, Counter[tuple[int, ...]]] = {order: Counter() for order in memory.orders}
        self.now: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        batches = [data.train_batch(step) for step in range(STEPS)]
        held_out = data.val_windows(np.arange(WINDOWS))
        for order in memory.orders:
            for batch in batches:
                for ids, documents in zip(batch["tokens"].numpy(), batch["document_ids"].numpy(), strict=True):
                    self.grams[order].update(suffixes(ids, documents, order, pad, lookup))
            for ids, documents in zip(held_out["tokens"].numpy(), held_out["document_ids"].numpy(), strict=True):
                self.now[order] += suffixes(ids, documents, order, pad, lookup)
        self.rows = {
            (order, k): {gram: row(gram, size) for gram in [*self.grams[order], *self.now[order]]}
            for order, sizes in self.sizes.items()
            for k, size in enumerate(sizes)
        }


def _check_head(head: dict[str, Any], hand: ByHand) -> Counter[int]:
    order, k = head["order"], head["head"]
    grams, row_of = hand.grams[order], hand.rows[order, k]
    reads, members, most = Counter[int](), defaultdict(set), Counter[int]()
    for gram, count in grams.items():
        reads[row_of[gram]] += count
        members[row_of[gram]].add(gram)
        most[row_of[gram]] = max(most[row_of[gram]], count)
    now = Counter(row_of[gram] for gram in hand.now[order])
    assert head["rows"] == hand.sizes[order][k]
    assert (head["read"], head["read_held_out"]) == (len(reads), len(now))
    sharing = [gram for gram in grams if len(members[row_of[gram]]) > 1]
    assert head["shared_ngrams"]["value"] == pytest.approx(len(sharing) / len(grams))
    assert head["shared_reads"]["value"] == pytest.approx(sum(grams[gram] for gram in sharing) / grams.total())
    assert head["minor_reads"] == pytest.approx(1 - most.total() / grams.total())
    untrained = sum(count for row, count in now.items() if row not in reads)
    assert head["held_out_reads_of_untrained"] == pytest.approx(untrained / now.total())
    by_rank = sorted(reads.values(), reverse=True)
    assert head["zipf"]["reads"] == [by_rank[rank - 1] for rank in head["zipf"]["ranks"]]
    return reads


@pytest.mark.parametrize("layer", [0, 2])
def test_reads_and_sharing_are_those_of_plain_loops(branches_run: Path, layer: int) -> None:
    (subject,) = open_subjects([branches_run])
    hand = ByHand(subject, layer)
    answer = next(each for each in _answer(subject) if each["layer"] == f"block {layer}")
    norms = subject.model.memory[str(layer)].table.weight.detach().double().norm(dim=1).tolist()
    start, by_bin, never = 0, defaultdict(list), []
    for head in answer["heads"]:
        reads = _check_head(head, hand)
        for row in range(head["rows"]):
            bin_of = reads[row].bit_length()
            by_bin[head["order"], bin_of].append(norms[start + row])
            never += [norms[start + row]] if not bin_of else []
        start += head["rows"]
    assert start == answer["rows"]
    assert answer["reads"] == STEPS * 16 * 64 * 4
    for order in answer["orders"]:
        n, grams, now = order["order"], hand.grams[order["order"]], hand.now[order["order"]]
        assert order["ngrams"] == len(grams)
        new = [gram for gram in now if gram not in grams]
        assert order["new_in_held_out"] == pytest.approx(len(new) / len(now))
        tables = [hand.rows[n, k] for k in range(2)]
        trained = [{table[gram] for gram in grams} for table in tables]
        landed = [table[gram] in rows for table, rows in zip(tables, trained, strict=True) for gram in new]
        assert order["new_on_trained_rows"] == pytest.approx(np.mean(landed))
        pairs = Counter((tables[0][gram], tables[1][gram]) for gram in grams)
        assert order["told_apart_by_no_head"] == sum(count for count in pairs.values() if count > 1)
        alone = [Counter(table[gram] for gram in grams) for table in tables]
        everywhere = [g for g in grams if all(c[t[g]] > 1 for c, t in zip(alone, tables, strict=True))]
        assert order["shared_in_all"]["value"] == pytest.approx(len(everywhere) / len(grams))
        assert order["reads_shared_in_all"]["value"] == pytest.approx(sum(grams[g] for g in everywhere) / grams.total())
    for known in answer["norms"]:
        values = by_bin.pop((known["order"], known["bin"]))
        assert known["rows"] == len(values)
        assert known["median"] == pytest.approx(np.median(values), rel=1e-6)
    assert not by_bin
    assert answer["never_read"]["mean_norm"] == pytest.approx(np.mean(never))


def test_caches_serve_what_ones_that_are_played_serve(memory_run: Path) -> None:
    (subject,) = open_subjects([memory_run])
    (answer,), hand = _answer(subject), ByHand(subject, 1)
    cache = answer["cache"]
    heads = [(order, k) for order in (2, 3) for k in range(2)]
    reads, now = Counter(), Counter()
    for order, k in heads:
        for gram, count in hand.grams[order].items():
            reads[order, k, hand.rows[order, k][gram]] += count
        now.update((order, k, hand.rows[order, k][gram]) for gram in hand.now[order])
    at = len(cache["rows"]) // 2
    size = cache["rows"][at]
    best = sum(count for _, count in now.most_common(size)) / now.total()
    assert cache["held_out"][at] == pytest.approx(best)
    # Which of the rows that were read as often as the last one kept are kept is not said.
    last = sorted(reads.values(), reverse=True)[size - 1]
    least = sum(now[row] for row, count in reads.items() if count > last) / now.total()
    most = sum(now[row] for row, count in reads.items() if count >= last) / now.total()
    assert least <= cache["training"][at] <= most < 1
    assert 0.1 < cache["training"][at] <= cache["held_out"][at]
    assert cache["rows"][-1] == answer["rows"]
    assert cache["training"][-1] == cache["held_out"][-1] == 1
    assert cache["recent"][-1] == pytest.approx(1 - len(now) / now.total())


def test_rows_that_the_replay_reads_are_the_ones_that_training_changed(memory_run: Path) -> None:
    (subject,) = open_subjects([memory_run])
    with torch.device("meta"):
        first = EngramLM(subject.model.config, None)
    materialize(first, torch.device("cpu"), subject.run.result["seed"])
    changed = (first.memory["1"].table.weight != subject.model.memory["1"].table.weight).any(1).numpy()
    options = argparse.Namespace(data=None, tokens=64, batch_size=0, train_tokens=0, device="cpu", bf16=False)
    (answer,) = plain(measure(Asked([subject], options)))["checkpoints"][subject.name]["layers"]
    start = 0
    for head in answer["heads"]:
        assert head["read"] == changed[start : start + head["rows"]].sum()
        start += head["rows"]
    assert answer["reads"] == 300 * 16 * 64 * 4
    never = answer["never_read"]
    assert never["rows"] == (~changed).sum() > 100
    assert abs(never["mean_norm"] - never["expected"]) < 4 * never["sd"]
    assert answer["norms"][0]["reads"] == "0"
    assert answer["norms"][-1]["median"] > 10 * never["mean_norm"]


def test_sharing_is_that_of_balls_in_bins(memory_run: Path, branches_run: Path) -> None:
    checked = 0
    for path in (memory_run, branches_run):
        (subject,) = open_subjects([path])
        for layer in _answer(subject):
            for head in layer["heads"]:
                for key in ("shared_ngrams", "shared_reads"):
                    assert abs(head[key]["value"] - head[key]["expected"]) < 4 * head[key]["sd"]
                    checked += 0.2 < head[key]["expected"] < 0.999
                assert head["read"] == pytest.approx(head["read_expected"], rel=0.05)
    assert checked >= 12


def test_windows_of_a_second_epoch_are_read_twice(memory_run: Path) -> None:
    (subject,) = open_subjects([memory_run])
    steps = subject.run.data.n_train_windows // 16 + 100
    (answers,) = measure(_asked(subject, steps=steps))["checkpoints"].values()
    (answer,), reader = answers["layers"], subject.model.memory["1"].reader
    reads = np.zeros(reader.n_rows, np.int64)
    for step in range(steps):
        batch = subject.run.data.train_batch(step)
        reads += np.bincount(reader(batch["tokens"], batch["document_ids"]).ravel().numpy(), minlength=len(reads))
    start = 0
    for head in answer["heads"]:
        by_rank = np.sort(reads[start : start + head["rows"]])[::-1]
        assert head["zipf"].reads.tolist() == by_rank[head["zipf"].ranks - 1].tolist()
        start += head["rows"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_memory_is_read_as_its_model_reads_it(memory_run: Path, kind: str) -> None:
    subject = _with(memory_run, kind=kind, **KINDS[kind])
    (layer,), (answer,) = layers_of(subject.model), _answer(subject)
    labels = {"over_encoding": "input", "additive_bigram": "all blocks"}
    assert answer["layer"] == labels.get(kind, "block 1")
    rows = Counter[int]()
    for step in range(STEPS):
        batch = subject.run.data.train_batch(step)
        reading = next(iter(subject.model.memories().values())).look_up(batch["tokens"], batch["document_ids"])
        rows.update(reading.rows.flatten().tolist())
    assert answer["reads"] == rows.total()
    assert sum(head["read"] for head in answer["heads"]) == len(rows)
    assert sorted(rows.values())[-1] == max(head["zipf"]["reads"][0] for head in answer["heads"])
    if kind == "shuffled":
        assert all("shared_ngrams" not in head for head in answer["heads"])
    elif kind == "capacity_one":
        assert all(head["read"] == 1 and head["shared_ngrams"]["value"] == 1 for head in answer["heads"])
    else:
        _check_head(answer["heads"][0], ByHand(subject, 1))
    untouched = answer["never_read"]
    if kind == "additive_bigram":  # its rows start at zero
        assert (untouched["mean_norm"], untouched["expected"]) == (0, 0)
    else:
        assert abs(untouched["mean_norm"] - untouched["expected"]) < 4 * untouched["sd"]
    assert layer.table is next(iter(subject.model.memories().values())).table


@pytest.mark.parametrize("hash_family", ["deepseek", "qwen"])
def test_n_grams_are_counted_as_the_hash_sees_them(memory_run: Path, hash_family: str) -> None:
    subject = _with(memory_run, hash=hash_family, compress=hash_family == "deepseek", eos_id=79)  # 79 is no rare token
    (layer,) = layers_of(subject.model)
    data = subject.run.data
    grams = {order: NgramCounts(layer.reader, order) for order in (2, 3)}
    reads = np.zeros(layer.reader.n_rows, np.int64)
    times = np.arange(1, 17)  # as if some windows had been trained on in more epochs than others
    for step in range(2):
        batch = data.train_batch(step)
        assert (batch["tokens"] == 79).any()
        for counted in grams.values():
            counted.add(batch["tokens"].numpy(), batch["document_ids"].numpy(), times)
        np.add.at(reads, layer.rows(batch["tokens"], batch["document_ids"]), times[:, None, None])
    by_grams = np.zeros_like(reads)
    for h, (order, _, _) in enumerate(layer.heads):
        np.add.at(by_grams, layer.rows(torch.cat([*grams[order].raw_ids()]))[:, -1, h], grams[order].counts)
    assert by_grams.tolist() == reads.tolist()


def test_numbers_are_the_same_at_any_batch_size(branches_run: Path) -> None:
    (subject,) = open_subjects([branches_run])
    np.testing.assert_equal(_rounded(_answer(subject, 5)), _rounded(_answer(subject)))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, 9) if isinstance(value, float) else value


def test_a_table_of_quantized_rows_is_told_of_too(memory_run: Path) -> None:
    subject = _with(memory_run)
    whole = _answer(subject)[0]
    quantize(subject.model, "int8")
    answer = _answer(subject)[0]
    assert answer["never_read"]["expected"] is None
    assert answer["never_read"]["mean_norm"] == pytest.approx(whole["never_read"]["mean_norm"], rel=0.01)
    assert answer["heads"] == whole["heads"]


def test_the_command_tells_of_all_checkpoints_and_refuses_in_a_line(
    memory_run: Path, experts_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--against", experts_run, "--names", "hybrid", "<b>", "--tokens", "1024"]
    answer = answer_of("rows", tmp_path, memory_run, *more)["result"]
    assert answer["held_out_tokens"] == 1024
    assert answer["checkpoints"]["<b>"]["layers"] == []
    page = (tmp_path / "report.html").read_text()
    assert "Without a memory: &lt;b&gt;." in page
    assert "rows were never read" in page
    assert len(json.dumps(answer)) < 50_000
    assert run("rows", ["--checkpoint", str(experts_run)]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told == f"error: none of the checkpoints has a memory: {experts_run.name}"
