import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asking import answer_of
from scipy.stats import binomtest
from trained import SEQ_LEN

from engram.backbone import extend_context
from engram.cli import main as engram
from engram.training import probes
from engram.training.weights import save_model
from eval.shared.proportions import proportion
from eval.shared.subjects import open_subjects

KINDS = ["single", "multi_key", "multi_value", "multi_query", "variable_tracking"]
SMALL = ("--examples", "9", "--lengths", "64", "160", "320")


@pytest.fixture(scope="module")
def output(memory_run: Path, experts_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("needle")
    answer_of("needle", folder, memory_run, "--against", experts_run, "--names", "memory", "experts", "--yarn", *SMALL)
    return folder


def _result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "needle.json").read_text())["result"]


def test_each_kind_is_asked_at_each_length_with_room_for_it(output: Path) -> None:
    result = _result(output)
    asked = {(asking["kind"], asking["length"]) for asking in result["askings"]}
    assert asked | {tuple(each) for each in result["too_short"]} == {(k, n) for k in KINDS for n in (64, 160, 320)}
    assert ("single", 64) in asked
    assert ("multi_query", 64) not in asked
    assert result["trained"] == {"memory": SEQ_LEN, "experts": SEQ_LEN}
    assert set(result["checkpoints"]) == {"memory", "experts", "memory, YaRN", "experts, YaRN"}
    for told in result["checkpoints"].values():
        for asking, answer in zip(result["askings"], told, strict=True):
            n = 9 * (1 if asking["kind"] in ("single", "multi_key") else 4)
            assert answer["all"]["n"] == n == sum(cell["n"] for cell in answer["by_depth"])
            assert max(cell["n"] for cell in answer["by_depth"]) - min(cell["n"] for cell in answer["by_depth"]) <= 1
            assert 1 < answer["nats"] < 60


def test_yarn_changes_nothing_at_the_trained_length_and_beyond_it_reads_by_an_extended_model(
    output: Path, memory_run: Path, tmp_path: Path
) -> None:
    result = _result(output)
    own, extended = result["checkpoints"]["memory"], result["checkpoints"]["memory, YaRN"]
    subject = open_subjects([memory_run])[0]
    made = save_model(extend_context(subject.model, 320 / SEQ_LEN, SEQ_LEN), tmp_path / "made", None, subject.tokenizer)
    again = answer_of("needle", tmp_path / "out", made, "--examples", "9", "--lengths", "320", "--names", "made")
    expected = again["result"]["checkpoints"]["made"]
    for asking, plain, yarn in zip(result["askings"], own, extended, strict=True):
        if asking["length"] == SEQ_LEN:
            assert plain == yarn
        if asking["length"] == 320:
            assert abs(plain["nats"] - yarn["nats"]) > 1e-3
            assert yarn["nats"] == pytest.approx(expected.pop(0)["nats"], rel=1e-6)
    assert not expected


def test_batches_change_no_number(output: Path, memory_run: Path, tmp_path: Path) -> None:
    whole = _result(output)["checkpoints"]["memory"]
    one_by_one = answer_of("needle", tmp_path, memory_run, "--names", "memory", "--batch-size", "2", *SMALL)
    for a, b in zip(whole, one_by_one["result"]["checkpoints"]["memory"], strict=True):
        assert a["nats"] == pytest.approx(b["nats"], rel=1e-5)
        assert a["all"] == b["all"]


def test_nats_are_those_of_a_text_read_alone(memory_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = open_subjects([memory_run])[0].model.double(), []
    ask = probes.ask
    monkeypatch.setattr(probes, "ask", lambda m, questions, size: seen.append(questions) or ask(m, questions, size))
    record = answer_of("needle", tmp_path, memory_run, "--names", "memory", "--lengths", "200", "--examples", "5")
    for questions, answer in zip(seen, record["result"]["checkpoints"]["memory"], strict=True):
        nats = []
        for ids, spans in questions:
            document = torch.tensor([[0] + [1] * (len(ids) - 1)])
            with torch.no_grad():
                logs = model(torch.tensor([ids]), document).log_softmax(-1)[0]
            nats += [-sum(float(logs[t - 1, ids[t]]) for t in range(*span)) for span in spans]
        assert answer["nats"] == pytest.approx(np.mean(nats), rel=1e-4)


def test_answers_are_counted_at_the_depth_of_their_needles(
    memory_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a model that finds only what lies in the first half of a haystack."""
    tokenizer = open_subjects([memory_run])[0].tokenizer

    def ask(model: Any, questions: list[probes.Question], size: int) -> probes.Answers:
        right, of = [], []
        for i, (ids, spans) in enumerate(questions):
            haystack = tokenizer.decode(ids).rsplit("\n", 1)[0]
            for span in spans:
                answer = tokenizer.decode([*ids, *[0] * 9][slice(*span)]).strip()
                right.append(re.search(rf"(Let {answer} be|is {answer})", haystack).start() < 0.5 * len(haystack))
                of.append(i)
        return probes.Answers(np.array(right), np.ones(len(right)), np.array(of))

    monkeypatch.setattr(probes, "ask", ask)
    more = ("--lengths", "600", "--examples", "12", "--depths", "4", "--names", "reader")
    record = answer_of("needle", tmp_path, memory_run, *more)
    for answer in record["result"]["checkpoints"]["reader"]:
        assert [cell["value"] for cell in answer["by_depth"]] == [1, 1, 0, 0]
        assert answer["all"]["value"] == 0.5


@pytest.mark.parametrize(("right", "n"), [(0, 20), (7, 20), (20, 20), (3, 1000)])
def test_intervals_are_scipys_wilson_intervals(right: int, n: int) -> None:
    expected = binomtest(right, n).proportion_ci(method="wilson")
    found = proportion(right, n)
    assert [found["low"], found["high"]] == pytest.approx([expected.low, expected.high], abs=1e-12)
    assert found["value"] == right / n


def test_fewer_independent_trials_are_known_less_well() -> None:
    assert proportion(20, 40, trials=10) == {**proportion(5, 10), "right": 20, "n": 40}
    assert proportion(0, 0)["value"] is None


def test_the_page_tells_what_was_asked_and_what_had_no_room(output: Path) -> None:
    page = (output / "report.html").read_text()
    assert "Retrieval from long contexts" in page
    assert "memory, YaRN" in page
    assert "No room for the question: " in page
    assert (output / "needle.png").stat().st_size > 10_000


def test_no_text_is_needed(memory_run: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(memory_run, tmp_path / "changed")
    text = (changed / "result.json").read_text()
    (changed / "result.json").write_text(text.replace('"max_bytes": 0', '"max_bytes": 100000'))
    record = answer_of("needle", tmp_path / "out", changed, "--examples", "2", "--kinds", "single")
    assert [asking["length"] for asking in record["result"]["askings"]] == [SEQ_LEN, 2 * SEQ_LEN, 4 * SEQ_LEN]
    assert record["checkpoints"][0]["tokens"] == 300 * 16 * 64


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--kinds", "double"), "needle.kinds is ('double',): allowed is some of single"),
        (("--kinds", "multi_query", "--lengths", "32"), "length of multi_query with 4 needles is 32"),
        (("--examples", "0"), "examples is 0: allowed is 1 or more"),
        (("--yarn", "0.5"), "yarn is 0.5: allowed is a factor of 1 or more"),
        (("--needles", "1"), "needle.needles is 1: allowed is 2 to 1000"),
        (("--batch-size", "-1"), "batch-size is -1: allowed is 0 or more"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    memory_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], told: str
) -> None:
    command = ["eval", "needle", "--checkpoint", str(memory_run), "--output", str(tmp_path), "--examples", "2", *args]
    assert engram(command) == 2
    assert told in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
