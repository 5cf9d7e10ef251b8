import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from asking import answer_of, held_out_suffixes, seen_in_training

from engram.backbone.positions import positions_of
from eval.shared.command import run
from eval.shared.subjects import open_subjects

TOKENS = 4096


@pytest.fixture(scope="module")
def output(branches_run: Path, memory_run: Path, experts_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gates")
    more = ["--tokens", TOKENS, "--names", "branches", "memory", "experts", "--excerpts", 3, "--seed", 7, "--lists", 8]
    answer_of("gates", folder, branches_run, "--against", memory_run, experts_run, *map(str, more))
    return folder


@pytest.fixture(scope="module")
def result(output: Path) -> dict:
    return json.loads((output / "gates.json").read_text())["result"]


@pytest.fixture(scope="module")
def by_equations(branches_run: Path) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Gates, and lengths of updates over those of hidden states, of each memory `[windows, T, M]`: SPEC's gate on what
    the blocks before give, and the layer's own update asked for by itself."""
    (subject,) = open_subjects([branches_run])
    model, found = subject.model.double(), {}
    batch = subject.run.data.val_windows(np.arange(TOKENS // 64))
    ids, documents = batch["tokens"], batch["document_ids"]
    with torch.no_grad():
        h = model.embed(ids).unsqueeze(2).expand(-1, -1, 2, -1)
        for layer, block in enumerate(model.blocks):
            if str(layer) in model.memory:
                memory = model.memory[str(layer)]
                e = memory.table.weight[memory.reader(ids, documents)].flatten(2)
                keys = (e @ memory.project.weight.T + memory.project.bias)[..., : 2 * 48].unflatten(-1, (2, 48))
                q, k = (
                    x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w
                    for x, w in ((h, memory.fusion.query_norm), (keys, memory.fusion.key_norm))
                )
                g = (q * k).sum(-1) / 48**0.5
                gate = torch.sigmoid(g.sign() * g.abs().clamp(min=1e-6).sqrt())
                update = memory(h, ids, documents)
                found[layer] = gate.numpy(), (update.norm(dim=-1) / h.norm(dim=-1)).numpy()
                h = h + update
            h, _ = block(h, positions_of(ids, documents, model.config.attention))
    return found


def test_gates_and_updates_of_excerpts_are_those_of_the_equations(result: dict, by_equations: dict) -> None:
    drawn = result["excerpts"]["windows"]
    assert len(set(drawn)) == 3
    cells = result["checkpoints"]["branches"]["gates"]
    assert [(cell["layer"], cell["branch"]) for cell in cells] == [(0, 0), (0, 1), (2, 0), (2, 1)]
    for cell in cells:
        gate, update = (values[drawn][..., cell["branch"]] for values in by_equations[cell["layer"]])
        np.testing.assert_allclose(cell["excerpts"], gate, atol=2e-4)
        np.testing.assert_allclose(cell["updates"], update, atol=5e-4)
    assert np.ptp(gate) > 0.3


def test_means_by_stratum_and_quantiles_are_those_of_plain_numbers(
    result: dict, by_equations: dict, branches_run: Path
) -> None:
    (subject,) = open_subjects([branches_run])
    seen = seen_in_training(subject, 3)
    counts = np.array([[seen[gram] for gram in w] for w in held_out_suffixes(subject, TOKENS // 64, 3)])
    members = {
        "all tokens": counts >= 0,
        "cold: never seen": counts == 0,
        "warm: seen 1 to 9 times": (counts > 0) & (counts < 10),
        "hot: 10 times or more": counts >= 10,
        "8 to 15": (counts >= 8) & (counts < 16),
    }
    names = [group["name"] for group in result["groups"]]
    for cell in result["checkpoints"]["branches"]["gates"]:
        gate, update = (values[..., cell["branch"]] for values in by_equations[cell["layer"]])
        for name, who in members.items():
            at = names.index(name)
            assert result["groups"][at]["tokens"] == who.sum() > 0
            assert cell["gate"][at]["value"] == pytest.approx(gate[who].mean(), abs=2e-5)
            assert cell["update"][at]["value"] == pytest.approx(update[who].mean(), rel=1e-4)
            assert cell["gate"][at]["low"] < cell["gate"][at]["value"] < cell["gate"][at]["high"]
        for q, value in cell["quantiles"].items():
            assert (gate < value - 1e-4).mean() < float(q) + 1e-3
            assert (gate < value + 1e-4).mean() > float(q) - 1e-3


def test_lists_hold_the_n_grams_with_the_most_open_and_most_shut_gates(
    result: dict, by_equations: dict, branches_run: Path
) -> None:
    (subject,) = open_subjects([branches_run])
    seen = seen_in_training(subject, 3)
    grams = held_out_suffixes(subject, TOKENS // 64, 3)
    for listed in result["checkpoints"]["branches"]["ngrams"]:
        gates = defaultdict(list)
        for window, values in zip(grams, by_equations[listed["layer"]][0].mean(-1), strict=True):
            for gram, value in zip(window, values, strict=True):
                gates[gram].append(value)
        means = {gram: sum(values) / len(values) for gram, values in gates.items() if len(values) >= 5}
        assert listed["ngrams"] == len(means) > 16
        for key, sign in (("open", -1), ("shut", 1)):
            wanted = sorted(means, key=lambda gram: sign * means[gram])[:8]
            assert [row["mean"] for row in listed[key]] == pytest.approx([means[gram] for gram in wanted], abs=1e-4)
            # Two of nearly the same mean may change places.
            assert sorted(row["times"] for row in listed[key]) == sorted(len(gates[gram]) for gram in wanted)
            assert sorted(row["seen"] for row in listed[key]) == sorted(seen[gram] for gram in wanted)
            spread = [np.std(gates[gram]) for gram in wanted]
            assert [row["spread"] for row in listed[key]] == pytest.approx(spread, abs=2e-3)
    texts = ["".join(row["tokens"]) for row in listed["open"] + listed["shut"]]
    batch = subject.run.data.val_windows(np.arange(TOKENS // 64))
    whole = [subject.tokenizer.decode(ids, skip_special_tokens=False) for ids in batch["tokens"].tolist()]
    assert all(any(text in window for window in whole) for text in texts)


def test_excerpts_are_drawn_by_the_seed_alone_and_show_the_text(result: dict, branches_run: Path) -> None:
    drawn = result["excerpts"]["windows"]
    assert drawn == np.random.default_rng(7).permutation(TOKENS // 64)[:3].tolist()
    (subject,) = open_subjects([branches_run])
    batch = subject.run.data.val_windows(np.array(drawn))
    for pieces, ids in zip(result["excerpts"]["pieces"], batch["tokens"].tolist(), strict=True):
        assert "".join(pieces) == subject.tokenizer.decode(ids, skip_special_tokens=False)


def test_numbers_are_the_same_at_any_batch_size(result: dict, memory_run: Path, tmp_path: Path) -> None:
    options = ["--tokens", str(TOKENS), "--batch-size", "7", "--seed", "7", "--excerpts", "3", "--lists", "8"]
    other = answer_of("gates", tmp_path, memory_run, *options)["result"]
    (own,), first = other["checkpoints"].values(), result["checkpoints"]["memory"]
    for here, there in zip(own["gates"], first["gates"], strict=True):
        for key in ("gate", "update"):
            np.testing.assert_allclose([v["value"] for v in here[key]], [v["value"] for v in there[key]], rtol=1e-5)
        np.testing.assert_allclose(here["excerpts"], there["excerpts"], atol=2e-4)
    assert [row["tokens"] for row in own["ngrams"][0]["shut"]] == [row["tokens"] for row in first["ngrams"][0]["shut"]]


def test_the_page_shows_all_checkpoints_and_says_which_has_no_gates(output: Path) -> None:
    page = (output / "report.html").read_text()
    assert "Without gates: experts (no memory)." in page
    assert "<script" not in page
    ids = re.findall(r"<input type=radio name=\S+ id=(\S+?)(?: checked)?>", page)
    assert len(ids) == len(set(ids)) == 4 + 1
    assert all(f"for={name}>" in page and f"#{name}:checked" in page for name in ids)


def test_what_cannot_be_is_refused_in_a_line(
    memory_run: Path, experts_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for checkpoint, options, told in (
        (experts_run, ["--names", "pure"], "none of the checkpoints has gates: pure (no memory)"),
        (memory_run, ["--excerpts", "10000"], "excerpts is 10000"),
        (memory_run, ["--least", "0"], "least is 0"),
        (memory_run, ["--hot-from", "1"], "hot-from is 1"),
    ):
        assert run("gates", ["--checkpoint", str(checkpoint), *options]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert told in error
