import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from asking import answer_of, held_out_suffixes, seen_in_training
from stepping import held_out_batch, stepped

from engram.backbone import EngramLM
from engram.cli import main as engram
from engram.config import ModelConfig
from engram.training.weights import save_model
from eval.shared.subjects import Subject, open_subjects

TOKENS = 4096
WINDOWS = TOKENS // 64


@pytest.fixture(scope="module")
def output(memory_run: Path, branches_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lens")
    answer_of(
        "lens", folder, memory_run, "--against", branches_run, "--names", "plain", "branches", "--tokens", str(TOKENS)
    )
    return folder


def _result(output: Path) -> dict:
    return json.loads((output / "lens.json").read_text())["result"]


@torch.no_grad()
def _by_hand(subject: Subject) -> tuple[np.ndarray, np.ndarray]:
    """Divergences and agreements `[places, windows, T]` in float64, of all logits at once."""
    batch = held_out_batch(subject, WINDOWS)
    states = stepped(subject.model, batch["tokens"], batch["document_ids"])
    scale, eps = subject.model.norm.weight.double(), subject.model.config.norm_eps
    log_probs = []
    for state in states.values():
        h = state.double()
        h = h.mean(2) if h.ndim == 4 else h
        h = h / (h.pow(2).mean(-1, keepdim=True) + eps).sqrt() * scale
        log_probs.append((h @ subject.model.head_weight.double().T).log_softmax(-1))
    last = log_probs[-1]
    kl = [F.kl_div(each, last, log_target=True, reduction="none").sum(-1).numpy() for each in log_probs]
    agreement = [(each.argmax(-1) == last.argmax(-1)).double().numpy() for each in log_probs]
    return np.stack(kl), np.stack(agreement)


def test_divergences_of_all_places_and_strata_are_those_of_a_float64_computation(
    output: Path, memory_run: Path, branches_run: Path
) -> None:
    result = _result(output)
    subjects = dict(zip(("plain", "branches"), open_subjects([memory_run, branches_run]), strict=True))
    seen = seen_in_training(subjects["plain"], 3)
    counts = np.array([[seen[g] for g in window] for window in held_out_suffixes(subjects["plain"], WINDOWS, 3)])
    strata = {"all": counts >= 0, "cold": counts == 0, "warm": (counts > 0) & (counts < 10), "hot": counts >= 10}
    assert [group["name"].split()[0].strip(":") for group in result["groups"]] == list(strata)
    by_hand = {name: _by_hand(subject) for name, subject in subjects.items()}
    for group, who in zip(result["groups"], strata.values(), strict=True):
        assert group["tokens"] == who.sum() > 0
        for name, (kl, agreement) in by_hand.items():
            answer = result["checkpoints"][name]
            told = [known["value"] for known in answer["kl"][group["name"]]]
            np.testing.assert_allclose(told, kl[:, who].mean(1), rtol=1e-4, atol=1e-6)
            told = [known["value"] for known in answer["agreement"][group["name"]]]
            np.testing.assert_allclose(told, agreement[:, who].mean(1), atol=1.5 / who.sum())  # a tie may turn
        less = result["checkpoints"]["branches"]["difference"]
        assert [place["name"] for place in less["places"]] == ["embedding", "block 0", "block 1", "block 2"]
        expected = by_hand["branches"][0][[0, 2, 3, 5]] - by_hand["plain"][0][[0, 1, 3, 4]]
        told = [known["value"] for known in less["kl"][group["name"]]]
        np.testing.assert_allclose(told, expected[:, who].mean(1), rtol=1e-4, atol=2e-5)


def test_the_last_block_is_the_answer_itself(output: Path) -> None:
    for answer in _result(output)["checkpoints"].values():
        assert answer["kl"]["all tokens"][-1] == {"value": 0, "low": 0, "high": 0}
        assert answer["agreement"]["all tokens"][-1]["value"] == 1
        earlier = [known["low"] for known in answer["kl"]["all tokens"][:-1]]
        assert min(earlier) > 0.05


def test_numbers_are_the_same_at_any_batch_size(output: Path, memory_run: Path, tmp_path: Path) -> None:
    other = answer_of("lens", tmp_path, memory_run, "--tokens", str(TOKENS), "--batch-size", "7")
    (own,) = other["result"]["checkpoints"].values()
    for what in ("kl", "agreement"):
        for group, known in _result(output)["checkpoints"]["plain"][what].items():
            for one, two in zip(known, own[what][group], strict=True):
                assert two == pytest.approx(one, rel=1e-5, abs=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_gives_what_the_cpu_gives(memory_run: Path, tmp_path: Path) -> None:
    answers = [
        answer_of("lens", tmp_path / device, memory_run, "--tokens", "4096", "--device", device)["result"]
        for device in ("cpu", "cuda")
    ]
    one, other = (next(iter(answer["checkpoints"].values()))["kl"]["all tokens"] for answer in answers)
    np.testing.assert_allclose([k["value"] for k in one], [k["value"] for k in other], rtol=1e-3, atol=1e-6)


def test_models_of_other_depths_stand_side_by_side_without_differences(experts_run: Path, tmp_path: Path) -> None:
    config = open_subjects([experts_run])[0].model.config.to_dict()
    shallow = save_model(EngramLM(ModelConfig.from_dict({**config, "n_layers": 2})), tmp_path / "shallow")
    args = ["--checkpoint", experts_run, "--against", shallow, "--names", "three", "two", "--tokens", "1024"]
    assert engram(["eval", "lens", *map(str, args), "--output", str(tmp_path)]) == 0
    answers = _result(tmp_path)["checkpoints"]
    assert [len(answers[name]["places"]) for name in ("three", "two")] == [4, 3]
    assert answers["two"]["difference"] is None
    page = (tmp_path / "report.html").read_text()
    assert all(told in page for told in ("three: KL", "two: KL"))
    assert "two less three" not in page
    assert (tmp_path / "lens.png").stat().st_size > 10_000


def test_bad_settings_end_in_one_line(memory_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for setting, value, allowed in (("hot-from", "1", "2 or more"), ("order", "-1", "1 or more")):
        args = ["--checkpoint", str(memory_run), "--output", str(tmp_path), f"--{setting}", value]
        assert engram(["eval", "lens", *args]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {setting} is {value}: allowed is {allowed}")
    assert not any(tmp_path.iterdir())
