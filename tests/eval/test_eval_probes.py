import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from asking import answer_of
from trained import FACTS_BYTES, MIXTURE, OFTEN

from engram.cli import main as engram
from engram.synthetic.facts import Facts
from engram.training import probes
from eval.shared.exposures import questions_about, times_told
from eval.shared.subjects import open_subjects


@pytest.fixture(scope="module")
def output(told_run: Path, memory_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Asked of the run and of one on the same text without the mixture."""
    folder = tmp_path_factory.mktemp("probes")
    answer_of("probes", folder, told_run, "--against", memory_run, "--names", "told", "untold", "--examples", "200")
    return folder


def _result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "probes.json").read_text())["result"]


def _at(result: dict[str, Any], task: str, **values: str) -> int:
    return [group["values"] for group in result["tasks"][task]["groups"]].index(values)


def test_accuracies_and_nats_are_those_that_the_run_recorded(output: Path, told_run: Path) -> None:
    result, recorded = _result(output), json.loads((told_run / "result.json").read_text())["val"]
    assert list(result["tasks"]) == sorted(MIXTURE)
    for task in MIXTURE:
        own = result["checkpoints"]["told"][task]
        assert own["accuracy"][0]["value"] == pytest.approx(recorded[f"probe_{task}"], rel=1e-6)
        assert own["nats"][0]["value"] == pytest.approx(recorded[f"probe_nats_{task}"], rel=1e-5)


def test_what_was_told_often_is_known_and_controls_are_not(output: Path) -> None:
    result = _result(output)
    facts, untold = (result["checkpoints"][name]["facts"] for name in ("told", "untold"))
    often, control = (_at(result, "facts", exposures=n) for n in (str(OFTEN), "0"))
    assert facts["accuracy"][often]["low"] > facts["accuracy"][control]["high"]
    assert facts["accuracy"][control]["low"] <= 1 / 16
    assert untold["accuracy"][often]["high"] < facts["accuracy"][often]["low"]
    assert untold["difference"][often]["high"] < 0 <= facts["difference"][often]["value"]
    assert facts["nats"][often]["high"] < facts["nats"][control]["low"]
    at = _at(result, "brackets")
    assert result["checkpoints"]["told"]["brackets"]["accuracy"][at]["low"] > 0.25


def test_groups_and_differences_are_those_of_plain_loops(output: Path, told_run: Path, memory_run: Path) -> None:
    result = _result(output)
    subjects = open_subjects([told_run, memory_run], ["told", "untold"])
    data = subjects[0].run.data
    for task, portion in data.config.portions().items():
        examples = portion.examples(200, 0)
        rights: dict[str, list[tuple[dict[str, str], bool, bool]]] = {}
        for subject in subjects:
            found = probes.ask(subject.model, probes.questions_of(examples, data.tokenizer, 1), 16)
            rights[subject.name] = [
                ({k: str(v) for k, v in examples[q].group}, examples[q].control, bool(right))
                for q, right in zip(found.question, found.right, strict=True)
            ]
        for i, group in enumerate(result["tasks"][task]["groups"]):
            wanted = group["values"].items()
            if "really told" in group["values"]:
                continue
            means = {}
            for name, answers in rights.items():
                own = [
                    right
                    for values, control, right in answers
                    if wanted <= values.items() and (not control or "exposures" in group["values"])
                ]
                assert group["answers"] == len(own) > 0
                means[name] = np.mean(own)
                assert result["checkpoints"][name][task]["accuracy"][i]["value"] == pytest.approx(means[name])
            difference = result["checkpoints"]["untold"][task]["difference"][i]
            assert difference["value"] == pytest.approx(means["untold"] - means["told"])
            assert set(result["checkpoints"]["told"][task]["difference"][i].values()) <= {0.0, None}


def test_times_told_are_those_of_the_texts_of_all_batches(output: Path, told_run: Path) -> None:
    (subject,) = open_subjects([told_run])
    assert subject.run is not None
    data, said = subject.run.data, Counter[str]()
    facts = Facts(exposures=(1, OFTEN)).facts(FACTS_BYTES, 0)
    sentences = {text for fact in facts for text in questions_about(fact)}
    for step in range(subject.run.samples // data.config.batch_size):
        batch = data.train_batch(step)
        ids = torch.cat([batch["tokens"], batch["targets"][:, -1:]], 1).tolist()
        for text in data.tokenizer.decode_batch(ids, skip_special_tokens=False):
            said.update(text for text in re.split(r"[.\n]|<[|]eos[|]>", text) if text in sentences)
    expected = [sum(said[text] for text in questions_about(fact)) for fact in facts]
    assert times_told(data, facts, subject.run.windows()) == expected
    often = [n for n, fact in zip(expected, facts, strict=True) if fact.exposures == OFTEN]
    epochs = subject.run.samples / data.n_train_windows
    assert 0.2 * epochs < np.mean(often) / OFTEN < 0.8 * epochs  # windows cut many sentences
    groups = _result(output)["tasks"]["facts"]["groups"]
    really = [group for group in groups if "really told" in group["values"]]
    assert sum(group["answers"] for group in really) == len(facts)
    assert {group["values"]["really told"] for group in really} >= {"0", "1"}


def test_a_run_on_another_text_was_told_nothing_of_it(told_run: Path, memory_run: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load((told_run / "config.yaml").read_text())["data"]["config"]
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(settings))
    more = ("--data", tmp_path / "data.yaml", "--examples", "20", "--tasks", "facts")
    groups = answer_of("probes", tmp_path, memory_run, *more)["result"]["tasks"]["facts"]["groups"]
    assert {"exposures": str(OFTEN)} in [group["values"] for group in groups]
    assert not any("really told" in group["values"] for group in groups)


def test_numbers_are_the_same_at_any_batch_size(output: Path, told_run: Path, tmp_path: Path) -> None:
    more = ("--names", "told", "--examples", "200", "--tasks", "recall", "--batch-size", "3")
    other = answer_of("probes", tmp_path, told_run, *more)["result"]["checkpoints"]["told"]
    own = _result(output)["checkpoints"]["told"]["recall"]
    assert list(other) == ["recall"]
    assert other["recall"]["accuracy"] == own["accuracy"]
    values = [[each["value"] for each in answer["nats"]] for answer in (other["recall"], own)]
    np.testing.assert_allclose(*values, rtol=1e-5)


def test_the_page_tells_of_all_tasks_and_chance(output: Path) -> None:
    page = (output / "report.html").read_text()
    assert all(told in page for told in ("facts", "brackets", "recall", f"exposures: {OFTEN}", "really told", "0.062"))
    assert (output / "probes.png").stat().st_size > 20_000


def test_what_cannot_be_asked_is_refused(
    memory_run: Path, told_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, told in (
        ([memory_run], "data.mixture of the first checkpoint is {}: allowed is a mixture"),
        (
            [told_run, "--tasks", "facts", "induction"],
            "tasks is 'induction': allowed is some of the mixture's: br",
        ),
        ([told_run, "--examples", "0"], "examples is 0: allowed is 1 or more"),
    ):
        assert engram(["eval", "probes", "--output", str(tmp_path), "--checkpoint", *map(str, arguments)]) == 2
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"error: {told}")
