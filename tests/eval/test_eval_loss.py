import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from asking import answer_of, held_out_suffixes, seen_in_training

from eval.shared.subjects import open_subjects


@pytest.fixture(scope="module")
def output(memory_run: Path, experts_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loss")
    answer_of("loss", folder, memory_run, "--against", experts_run, "--names", "memory", "experts")
    return folder


def _answers(output: Path) -> dict:
    return json.loads((output / "loss.json").read_text())


def test_losses_are_those_that_the_run_recorded(output: Path, memory_run: Path, experts_run: Path) -> None:
    record = _answers(output)
    names = [f"{group['kind']} {group['name']}" for group in record["result"]["groups"]]
    for name, run in (("memory", memory_run), ("experts", experts_run)):
        recorded = json.loads((run / "result.json").read_text())["val"]
        answer = record["result"]["checkpoints"][name]
        for here, there in (
            ("all all tokens", ""),
            ("domain code", "_code"),
            ("domain prose", "_prose"),
            ("pair new pairs", "_new"),
            ("pair repeated pairs", "_repeated"),
        ):
            at = names.index(here)
            assert answer["nats"][at]["value"] == pytest.approx(recorded[f"nats{there}"], rel=1e-5)
            assert answer["bits_per_byte"][at]["value"] == pytest.approx(recorded[f"bits_per_byte{there}"], rel=1e-5)


def test_losses_of_strata_and_differences_are_those_of_plain_loops(
    memory_run: Path, experts_run: Path, output: Path
) -> None:
    result = _answers(output)["result"]
    subjects = open_subjects([memory_run, experts_run], ["memory", "experts"])
    data = subjects[0].run.data
    seen = seen_in_training(subjects[0], 3)
    counts = np.array([[seen[g] for g in window] for window in held_out_suffixes(subjects[0], data.n_val_windows, 3)])
    batch = data.val_windows(np.arange(data.n_val_windows))
    with torch.no_grad():
        nats = {
            subject.name: F.cross_entropy(
                subject.model(batch["tokens"], batch["document_ids"]).double().transpose(1, 2),
                batch["targets"],
                reduction="none",
            ).numpy()
            for subject in subjects
        }
    strata = {"cold": counts == 0, "warm": (counts > 0) & (counts < 10), "hot": counts >= 10}
    for at, group in enumerate(result["groups"]):
        if group["kind"] != "stratum":
            continue
        who = strata[group["name"].split(":")[0]]
        assert group["tokens"] == who.sum() > 0
        for name, values in nats.items():
            answer = result["checkpoints"][name]
            assert answer["nats"][at]["value"] == pytest.approx(values[who].mean(), abs=2e-5)
            less = (values - nats["memory"])[who].mean()
            assert answer["difference"][at]["value"] == pytest.approx(less, abs=4e-5)
    assert sum(group["tokens"] for group in result["groups"] if group["kind"] == "stratum") == counts.size


def test_paired_differences_are_better_known_than_losses(output: Path) -> None:
    answers = _answers(output)["result"]["checkpoints"]
    width = {
        what: answers["experts"][what][0]["high"] - answers["experts"][what][0]["low"]
        for what in ("nats", "difference")
    }
    assert width["difference"] < width["nats"]
    assert all(answers["memory"]["difference"][0][end] == 0 for end in ("low", "high"))


def test_numbers_are_the_same_at_any_batch_size(memory_run: Path, output: Path, tmp_path: Path) -> None:
    other = answer_of("loss", tmp_path, memory_run, "--batch-size", "7")
    (own,) = other["result"]["checkpoints"].values()
    np.testing.assert_allclose(
        [v["value"] for v in own["nats"]],
        [v["value"] for v in _answers(output)["result"]["checkpoints"]["memory"]["nats"]],
        rtol=1e-6,
    )


def test_the_page_needs_no_other_file_and_names_what_was_compared(output: Path) -> None:
    page = (output / "report.html").read_text()
    assert all(link.startswith(("#", "data:image/png")) for link in re.findall(r"(?:src|href)=['\"]?([^'\">]*)", page))
    for told in ("memory", "experts", "hot: 10 times or more", "307,200"):
        assert told in page
