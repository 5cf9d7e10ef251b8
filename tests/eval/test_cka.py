import json
from pathlib import Path

import numpy as np
import pytest
import torch
from asking import answer_of
from numpy.typing import NDArray
from stepping import held_out_batch, stepped

from engram.cli import main as engram
from eval.cka import alignment, centred_grams, hsic, similarity
from eval.shared.subjects import open_subjects

Floats = NDArray[np.float64]


def _textbook_hsic(x: Floats, y: Floats) -> float:
    """HSIC_1 of `[n, width]` with linear kernels: Song et al. 2012, equation 5, as printed."""
    n = len(x)
    K, L = x @ x.T, y @ y.T
    np.fill_diagonal(K, 0)
    np.fill_diagonal(L, 0)
    one = np.ones(n)
    product = (one @ K @ one) * (one @ L @ one)
    terms = np.trace(K @ L) + product / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ K @ L @ one)
    return float(terms / (n * (n - 3)))


def _textbook_cka(xs: list[Floats], ys: list[Floats]) -> Floats:
    between = np.array([[_textbook_hsic(x, y) for y in ys] for x in xs])
    one, other = (np.array([_textbook_hsic(x, x) for x in each]) for each in (xs, ys))
    return between / np.sqrt(np.outer(one, other))


def _cka(x: Floats, y: Floats) -> Floats:
    """Of `[n, L, width]` each."""
    a, b = (centred_grams(torch.from_numpy(each)) for each in (x, y))
    return similarity(hsic(a, b), hsic(a, a), hsic(b, b))


def _related(n: int, layers: int, noise: float) -> tuple[Floats, Floats]:
    """States `[n, layers, 12]` of two models: 4 numbers that they share, each layer's way to say them, and noise."""
    random = np.random.default_rng(0)
    common, maps = random.normal(size=(n, 4)), random.normal(size=(2, layers, 4, 12))
    x, y = np.einsum("nk,mlkw->mnlw", common, maps) + noise * random.normal(size=(2, n, layers, 12))
    return x, y


def test_hsic_is_the_textbooks_also_far_from_the_origin() -> None:
    x, y = _related(40, 3, 0.5)
    for shift in (0.0, 50.0):
        a, b = (centred_grams(torch.from_numpy(each + shift)) for each in (x, y))
        expected = [[_textbook_hsic(x[:, i], y[:, j]) for j in range(3)] for i in range(3)]
        np.testing.assert_allclose(hsic(a, b), expected, rtol=1e-9)


def test_the_mean_over_minibatches_is_the_hsic_of_all_tokens_and_the_biased_one_is_not() -> None:
    N, n, m = 200, 8, 4000
    x, y = (each[:, 0] for each in _related(N, 1, 2.0))
    random = np.random.default_rng(1)
    drawn = np.stack([random.permutation(N)[:n] for _ in range(m)], 1)  # [n, m]
    a, b = (centred_grams(torch.from_numpy(each[drawn])) for each in (x, y))
    each = (a * b).sum((1, 2)).numpy() / (n * (n - 3))
    np.testing.assert_allclose(each[:5], [_textbook_hsic(x[rows], y[rows]) for rows in drawn.T[:5]], rtol=1e-9)
    whole, error = _textbook_hsic(x, y), each.std() / np.sqrt(m)
    assert error < 0.1 * whole
    assert abs(each.mean() - whole) < 4 * error
    centre = np.eye(n) - 1 / n
    biased = [np.trace(centre @ x[r] @ x[r].T @ centre @ y[r] @ y[r].T) / (n - 1) ** 2 for r in drawn.T]
    assert abs(np.mean(biased) - whole) > 10 * np.std(biased) / np.sqrt(m)


def test_rotations_scales_and_shifts_change_nothing_and_other_linear_maps_do() -> None:
    x, y = _related(60, 2, 0.5)
    random = np.random.default_rng(2)
    turned = x @ np.linalg.qr(random.normal(size=(12, 12)))[0] * 37.0 + random.normal(size=12)
    np.testing.assert_allclose(_cka(turned, y), _cka(x, y), rtol=1e-9)
    assert np.abs(_cka(x * np.geomspace(0.01, 1, 12), y) - _cka(x, y)).max() > 0.01


def test_cka_is_symmetric_and_one_with_itself() -> None:
    x, y = _related(60, 3, 0.5)
    np.testing.assert_allclose(_cka(x, y), _cka(y, x).T, rtol=1e-9)
    itself = _cka(x, x)
    np.testing.assert_allclose(np.diag(itself), 1, rtol=1e-9)
    assert itself[0, 1] < 0.999


def test_independent_states_are_at_zero_where_biased_cka_is_not() -> None:
    random = np.random.default_rng(3)
    x, y = random.normal(size=(2, 64, 20, 256))
    values = _cka(x, y)
    assert abs(values.mean()) < 0.005
    assert np.abs(values).max() < 0.1
    p, q = (each[:, 0] - each[:, 0].mean(0) for each in (x, y))
    biased = np.linalg.norm(p.T @ q) ** 2 / (np.linalg.norm(p.T @ p) * np.linalg.norm(q.T @ q))
    assert biased > 0.7


def test_alignment_is_the_weighted_centre_of_the_most_similar() -> None:
    values = np.array([[0.1, 0.9, 0.3, 0.6, 0.2, 0.0], [0.5, -0.1, -0.2, -0.3, 0.5, -0.4]])
    assert alignment(values, 1).tolist() == [1, 0]
    assert alignment(values, 2) == pytest.approx([(0.9 + 1.8) / 1.5, 2])
    assert alignment(values, 3) == pytest.approx([(0.9 + 1.8 + 0.6) / 1.8, 2])  # below zero weighs nothing
    whole = (0.9 + 0.6 + 1.8 + 0.8) / 2.1
    assert alignment(values, 6)[0] == alignment(values, 99)[0] == pytest.approx(whole)
    assert np.isnan(alignment(-np.ones((1, 3)), 5)).all()


def test_one_minibatch_of_all_tokens_is_the_full_cka_of_states_by_hand(
    branches_run: Path, experts_run: Path, tmp_path: Path
) -> None:
    record = answer_of(
        "cka", tmp_path, branches_run, "--against", experts_run, "--tokens", "512", "--minibatch", "512"
    )["result"]
    states = []
    for subject in open_subjects([branches_run, experts_run]):
        batch = held_out_batch(subject, 512 // 64)
        found = stepped(subject.model, batch["tokens"], batch["document_ids"])
        states.append([found[f"block {i}"].flatten(0, 1).flatten(1).double().numpy() for i in range(3)])
    assert [each[0].shape for each in states] == [(512, 2 * 48), (512, 48)]
    expected = _textbook_cka(*states)
    assert record["minibatches"] == 1
    np.testing.assert_allclose(record["cka"], expected, rtol=1e-5)
    centres = [float(row @ np.arange(3) / row.sum()) for row in expected]
    assert [known["value"] for known in record["alignment"]] == pytest.approx(centres, rel=1e-5)
    assert all(known["low"] is None for known in record["alignment"])


@pytest.fixture(scope="module")
def compared(memory_run: Path, experts_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cka")
    answer_of("cka", folder, memory_run, "--against", experts_run, "--names", "memory", "experts", "--minibatch", "128")
    return folder


def _result(folder: Path) -> dict:
    return json.loads((folder / "cka.json").read_text())["result"]


def test_numbers_are_the_same_at_any_batch_size(
    compared: Path, memory_run: Path, experts_run: Path, tmp_path: Path
) -> None:
    own = answer_of("cka", tmp_path, memory_run, "--against", experts_run, "--minibatch", "128", "--batch-size", "37")[
        "result"
    ]
    np.testing.assert_allclose(own["cka"], _result(compared)["cka"], rtol=1e-5)
    for what in ("alignment", "second_with_itself"):
        for one, two in zip(own[what], _result(compared)[what], strict=True):
            assert one == pytest.approx(two, rel=1e-5)
            assert one["low"] < one["value"] < one["high"]


def test_the_size_of_minibatches_moves_the_estimate_by_its_noise_alone(
    compared: Path, memory_run: Path, experts_run: Path, tmp_path: Path
) -> None:
    pair = (memory_run, "--against", experts_run)
    whole = answer_of("cka", tmp_path / "all", *pair, "--tokens", "2048", "--minibatch", "2048")["result"]
    small = answer_of("cka", tmp_path / "16", *pair, "--tokens", "2048", "--minibatch", "16", "--minibatches", "0")
    assert small["result"]["minibatches"] == 128
    np.testing.assert_allclose(small["result"]["cka"], whole["cka"], atol=0.03)


def test_the_other_way_round_is_the_transpose_and_a_model_is_like_itself(
    compared: Path, memory_run: Path, experts_run: Path, tmp_path: Path
) -> None:
    turned = answer_of("cka", tmp_path / "turned", experts_run, "--against", memory_run, "--minibatch", "128")["result"]
    np.testing.assert_allclose(np.transpose(turned["cka"]), _result(compared)["cka"], rtol=1e-9)
    own = answer_of("cka", tmp_path / "own", experts_run, "--minibatch", "128")["result"]
    np.testing.assert_allclose(np.diag(own["cka"]), 1, rtol=1e-12)
    np.testing.assert_allclose(own["cka"], np.transpose(own["cka"]), rtol=1e-12)
    assert own["alignment"] == own["second_with_itself"]
    told = [known["value"] for known in _result(compared)["second_with_itself"]]
    assert [known["value"] for known in own["alignment"]] == pytest.approx(told, rel=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_gives_what_the_cpu_gives(memory_run: Path, experts_run: Path, tmp_path: Path) -> None:
    pair = (memory_run, "--against", experts_run, "--tokens", "4096", "--device")
    one, other = (answer_of("cka", tmp_path / device, *pair, device)["result"] for device in ("cpu", "cuda"))
    np.testing.assert_allclose(one["cka"], other["cka"], rtol=1e-3)


def test_the_page_names_the_blocks_that_belong_together(compared: Path) -> None:
    page = (compared / "report.html").read_text()
    for told in ("block of memory", "alignment with experts", "64 minibatches of 128 tokens"):
        assert told in page
    assert (compared / "cka.png").stat().st_size > 10_000


def test_bad_settings_end_in_one_line(
    memory_run: Path, experts_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*more: str) -> str:
        args = ["--checkpoint", str(memory_run), "--output", str(tmp_path), "--tokens", "1024", *more]
        assert engram(["eval", "cka", *args]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert told("--minibatch", "3").startswith("error: minibatch is 3: allowed is 4 to 1024")
    assert told("--minibatch", "1025").startswith("error: minibatch is 1025: allowed is 4 to 1024")
    assert told("--minibatches", "-1").startswith("error: minibatches is -1: allowed is 1 or more")
    assert told("--top-k", "0").startswith("error: top-k is 0: allowed is 1 or more")
    assert "number of checkpoints is 3: allowed is 1 to 2" in told(
        "--against", str(experts_run), str(experts_run), "--names", "a", "b", "c"
    )
    assert not any(tmp_path.iterdir())
