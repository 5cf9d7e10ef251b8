"""What is told of routing: against counts one by one over the routers' outputs, scipy, and planted dependence."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from asking import answer_of, held_out_suffixes, seen_in_training
from scipy.spatial.distance import jensenshannon

from engram.backbone import EngramLM
from engram.cli import main as engram
from engram.config import ModelConfig
from engram.training.weights import save_model
from eval.routing import quarters
from eval.shared.contrasts import Contrast, Turned, compared, divergence
from eval.shared.pairs import pairs_by_load, pairs_chosen
from eval.shared.subjects import Subject, open_subjects

TOKENS = 4096


def without_memory(model: EngramLM) -> EngramLM:
    config = model.config.to_dict()
    config["memory"]["rows"] = [0 for _ in config["memory"]["rows"]]
    bare = EngramLM(ModelConfig.from_dict(config)).eval()
    assert not bare.load_state_dict(model.state_dict(), strict=False).missing_keys
    return bare


@torch.no_grad()
def routed(model: EngramLM, subject: Subject) -> tuple[list[list[tuple[int, ...]]], list[float], dict[int, Any]]:
    """Of each block with experts the experts of each token, and the entropy of scores; gates by block. One window at a
    time, the scores anew from the router's weights."""
    chosen: list[list[tuple[int, ...]]] = [[] for _ in model.moe_layers()]
    entropies: list[list[float]] = [[] for _ in chosen]
    gates: dict[int, list[float]] = {}
    batch = subject.run.data.val_windows(np.arange(TOKENS // 64))
    for ids, documents in zip(batch["tokens"], batch["document_ids"], strict=True):
        inputs: list[torch.Tensor] = []
        hooks = [
            m.router.register_forward_pre_hook(lambda _, args, to=inputs: to.append(args[0]))
            for m in model.moe_layers()
        ]
        opened = model.run(ids[None], documents[None]).gates
        for hook in hooks:
            hook.remove()
        for layer, alpha in opened.items():
            gates.setdefault(layer, []).extend(alpha[0].mean(-1).tolist())
        for i, (moe, x) in enumerate(zip(model.moe_layers(), inputs, strict=True)):
            scores = torch.sigmoid(x[0].double() @ moe.router.weight.double().T)
            share = scores / scores.sum(-1, keepdim=True)
            entropies[i] += (-(share * share.log()).sum(-1)).tolist()
            chosen[i] += [tuple(row) for row in (scores + moe.router.bias).topk(2).indices.tolist()]
    return chosen, [float(np.mean(each)) for each in entropies], gates


@pytest.fixture(scope="module")
def output(memory_run: Path, experts_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routing")
    more = ("--names", "memory", "experts", "--tokens", str(TOKENS))
    answer_of("routing", folder, memory_run, "--against", experts_run, *more)
    return folder


@pytest.fixture(scope="module")
def result(output: Path) -> dict[str, Any]:
    return json.loads((output / "routing.json").read_text())["result"]


@pytest.fixture(scope="module")
def subject(memory_run: Path) -> Subject:
    return open_subjects([memory_run], ["memory"])[0]


@pytest.fixture(scope="module")
def by_hand(subject: Subject) -> Any:
    return routed(subject.model, subject)


@pytest.fixture(scope="module")
def counts(subject: Subject) -> Any:
    """How often the suffix of each token was seen in training."""
    seen = seen_in_training(subject, 3)
    return np.array([seen[gram] for window in held_out_suffixes(subject, TOKENS // 64, 3) for gram in window])


def test_loads_and_pairs_are_those_counted_one_by_one(result: dict[str, Any], by_hand: Any) -> None:
    layers = result["checkpoints"]["memory"]["layers"]
    chosen, entropies, _ = by_hand
    assert [layer["block"] for layer in layers] == [1, 2]
    for layer, tokens, doubt in zip(layers, chosen, entropies, strict=True):
        load = Counter(expert for token in tokens for expert in token)
        pairs = Counter(pair for token in tokens for pair in itertools.permutations(token, 2))
        assert layer["load"] == pytest.approx([load[e] for e in range(16)], abs=2)  # ties apart
        assert sum(layer["load"]) == 2 * TOKENS
        found = pairs_chosen(np.array(tokens), 16)
        assert found.tolist() == [[pairs[e, f] for f in range(16)] for e in range(16)]
        if layer["block"] == result["checkpoints"]["memory"]["pairs"]["block"]:
            np.testing.assert_allclose(result["checkpoints"]["memory"]["pairs"]["chosen"], found, atol=2)
        assert layer["score_entropy"] == pytest.approx(doubt, abs=1e-5)
        share = np.array(layer["load"]) / (2 * TOKENS)
        assert layer["load_entropy"] == pytest.approx(-sum(p * np.log(p) for p in share if p))
        assert layer["max_over_mean"] == pytest.approx(16 * share.max())
        assert layer["variation"] == pytest.approx(np.std(share) * 16)
        assert layer["never_used"] == sum(load[e] == 0 for e in range(16))
        expected = pairs_by_load(np.array(layer["load"]), 2)
        np.testing.assert_allclose(expected.sum(1), layer["load"], rtol=1e-6)  # K - 1 = 1 partner for each choice
        apart = sum(max(a - b, 0) for a, b in zip(found.ravel(), expected.ravel(), strict=True)) / found.sum()
        assert layer["pairs_apart"] == pytest.approx(apart, rel=1e-2)
        e, f = layer["team"]["experts"]
        often = {pair: count / expected[pair] for pair, count in pairs.items() if expected[pair] >= 10}
        assert layer["team"]["times"] == pytest.approx(max(often.values()), rel=1e-2)
        assert often[e, f] == pytest.approx(max(often.values()), rel=1e-2)
        assert 0.05 < apart < 1


@pytest.mark.parametrize("top_k", [2, 3])
def test_pairs_by_load_are_those_of_experts_drawn_without_attraction(top_k: int) -> None:
    """For K = 2, of sets drawn in proportion to the product of their experts' factors; for more, all pairs add up."""
    factors, n = np.array([1.0, 2.0, 0.5, 3.0, 0.0, 1.5]), 10_000
    sets = list(itertools.combinations(range(6), top_k))
    chance = np.array([np.prod(factors[list(each)]) for each in sets])
    chance /= chance.sum()
    load, pairs = np.zeros(6), np.zeros((6, 6))
    for each, p in zip(sets, chance, strict=True):
        for e in each:
            load[e] += n * p
        for e, f in itertools.permutations(each, 2):
            pairs[e, f] += n * p
    found = pairs_by_load(load, top_k)
    np.testing.assert_allclose(found.sum(1), (top_k - 1) * load, rtol=1e-6, atol=1e-9)
    # For K = 3 three sets of five experts are left out by none; the two models differ a little.
    np.testing.assert_allclose(found, pairs, rtol=1e-6 if top_k == 2 else 0.1, atol=1e-9)


def test_where_all_experts_always_run_pairs_are_even_and_one_expert_has_none() -> None:
    np.testing.assert_allclose(pairs_by_load(np.full(4, 50), 4), 50 * (1 - np.eye(4)))
    assert not pairs_by_load(np.array([10, 20, 30]), 1).any()


def test_divergences_are_those_of_scipy_over_tokens_told_apart_by_hand(
    result: dict[str, Any], by_hand: Any, counts: Any
) -> None:
    chosen, _, gates = by_hand
    alpha = np.array(gates[1])

    def bits(tokens: list[tuple[int, ...]], first: Any, second: Any) -> float:
        loads = [np.zeros(16), np.zeros(16)]
        for token, *sides in zip(tokens, first, second, strict=True):
            for load, inside in zip(loads, sides, strict=True):
                for expert in token:
                    load[expert] += inside
        return float(jensenshannon(*loads, base=2) ** 2)

    strata = {"cold": counts == 0, "warm": (counts > 0) & (counts < 10), "hot": counts >= 10}
    for layer, tokens in zip(result["checkpoints"]["memory"]["layers"], chosen, strict=True):
        assert layer["gates_of"] == 1
        told = layer["contrasts"]
        low, high = np.quantile(alpha, [0.25, 0.75])
        assert told["gates"]["bits"] == pytest.approx(bits(tokens, alpha > high, alpha <= low), rel=2e-2)
        assert told["gates"]["first"] == pytest.approx(TOKENS / 4, abs=2)
        assert told["hot against cold"]["bits"] == pytest.approx(bits(tokens, strata["hot"], strata["cold"]), rel=2e-2)
        assert told["hot against cold"]["first"] == strata["hot"].sum()
        for name, who in strata.items():
            low, high = np.quantile(alpha[who], [0.25, 0.75])
            expected = bits(tokens, who & (alpha > high), who & (alpha <= low))
            assert told[f"gates, {name}"]["bits"] == pytest.approx(expected, rel=5e-2)
        assert told["gates"]["bits"] > told["gates"]["null"]["high"] > told["gates"]["null"]["mean"] > 0
        assert told["gates"]["p"] < 0.01


def test_labels_are_turned_within_their_documents() -> None:
    documents = np.repeat([3, 7, 8], [5, 1, 9])
    seen = set()
    for source in Turned(documents).sources(np.arange(15)):
        assert sorted(source) == list(range(15))
        assert (documents[source] == documents).all()
        for document in (3, 7, 8):
            own = source[documents == document]
            assert (np.diff(own) % len(own) == 1 % len(own)).all()  # neighbours stay neighbours
        seen.add(tuple(source))
    assert len(seen) > 30  # of 45


def test_only_what_labels_and_routing_share_within_documents_is_beyond_chance() -> None:
    random = np.random.default_rng(0)
    documents = np.repeat(np.arange(20), 100)
    side = random.choice([1, -1, 0], 2000).astype(np.int8)
    everything = np.arange(2000)
    by_document = np.where(documents % 2 == 0, 1, -1).astype(np.int8)
    free = random.integers(0, 8, (2000, 2))
    follows_label = free % 4 + 4 * (side[:, None] == 1)
    follows_document = free % 4 + 4 * (documents[:, None] % 2)
    experts = np.stack([free, follows_label, follows_document], 1).astype(np.uint8)
    of_label = compared(experts, 8, documents, Contrast(everything, side), [0, 1, 2])
    assert of_label[0]["p"] > 0.05
    assert of_label[1]["p"] < 0.01
    assert of_label[1]["bits"] == pytest.approx(1)
    assert of_label[2]["p"] > 0.05
    of_document = compared(experts, 8, documents, Contrast(everything, by_document), [0, 1, 2])
    assert of_document[2]["bits"] == pytest.approx(1)
    assert [found["p"] for found in of_document] == [
        1,
        1,
        1,
    ]  # turning labels that a whole document shares does nothing
    assert divergence(np.array([0, 3, 1]), np.array([2, 0, 0])) == pytest.approx(1)


def test_the_product_of_labels_and_choices_gives_what_counting_each_draw_gives() -> None:
    random = np.random.default_rng(3)
    documents = np.repeat([2, 5, 6], [9000, 1, 4000])  # more than one product
    experts = random.integers(0, 6, (13_001, 3, 2)).astype(np.uint8)
    tokens = np.flatnonzero(random.random(13_001) < 0.9)
    side = random.choice([1, -1, 0], len(tokens)).astype(np.int8)
    at = [2, 0]
    sources = Turned(documents[tokens]).sources(np.arange(len(tokens)))
    for layer, found in zip(at, compared(experts, 6, documents, Contrast(tokens, side), at), strict=True):
        bits = []
        for labels in (side, *(side[source] for source in sources)):
            sides = (experts[tokens[labels == which], layer].ravel() for which in (1, -1))
            loads = [np.bincount(choices, minlength=6) for choices in sides]
            bits.append(jensenshannon(*loads, base=2) ** 2)
        assert found["bits"] == pytest.approx(bits[0])
        assert found["null"]["mean"] == pytest.approx(np.mean(bits[1:]))
        assert found["null"]["high"] == pytest.approx(np.quantile(bits[1:], 0.95))
        assert found["p"] == (1 + sum(each >= bits[0] - 1e-12 for each in bits[1:])) / 201


def test_equal_gates_fire_nowhere() -> None:
    """As those of a memory that reads one row."""
    assert not quarters(np.full(10, 0.5)).any()
    assert quarters(np.arange(8.0)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    experts = np.zeros((10, 1, 2), np.int32)
    (found,) = compared(experts, 4, np.zeros(10, np.int64), Contrast(np.arange(10), np.full(10, -1, np.int8)), [0])
    assert (found["bits"], found["p"], found["second"]) == (None, None, 10)


def test_choices_that_change_are_those_of_a_model_without_the_memory(
    result: dict[str, Any], subject: Subject, by_hand: Any, counts: Any
) -> None:
    chosen, _, gates = by_hand
    bare, _, _ = routed(without_memory(subject.model), subject)
    quarter = np.searchsorted(np.quantile(gates[1], [0.25, 0.5, 0.75]), gates[1])
    groups = {"all": counts >= 0, "cold": counts == 0, "hot": counts >= 10, "gates, quarter 4": quarter == 3}
    for layer, own, other in zip(result["checkpoints"]["memory"]["layers"], chosen, bare, strict=True):
        lost = np.array([len(set(a) - set(b)) / 2 for a, b in zip(own, other, strict=True)])
        for name, who in groups.items():
            assert layer["changed"][name]["value"] == pytest.approx(lost[who].mean(), abs=2e-3)
        assert layer["changed"]["gates, quarter 1"]["value"] < layer["changed"]["gates, quarter 4"]["value"]
    assert "changed" not in result["checkpoints"]["experts"]["layers"][0]


def test_nothing_changes_below_the_memory_and_numbers_are_the_same_at_any_batch_size(
    branches_run: Path, tmp_path: Path
) -> None:
    some = ("--tokens", str(TOKENS), "--layers", "2", "--names", "here")
    records = [
        answer_of("routing", tmp_path / size, branches_run, *some, "--batch-size", size)["result"]
        for size in ("64", "7")
    ]
    first, second = (record["checkpoints"]["here"]["layers"] for record in records)
    for below, above in (first, second):
        assert (below["block"], above["block"]) == (1, 2)
        assert (below["gates_of"], above["gates_of"]) == (0, 2)
        assert all(each == {"value": 0, "low": 0, "high": 0} for each in below["changed"].values())
        assert above["changed"]["all"]["low"] > 0.05
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a["load"], b["load"], atol=2)
        assert a["score_entropy"] == pytest.approx(b["score_entropy"], abs=1e-6)
        assert a["pairs_apart"] == pytest.approx(b["pairs_apart"], abs=1e-3)
        for name, found in a["contrasts"].items():
            assert found["bits"] == pytest.approx(b["contrasts"][name]["bits"], rel=1e-2)
        for name, found in a["changed"].items():
            assert found["value"] == pytest.approx(b["changed"][name]["value"], abs=1e-3)


def test_the_page_sets_checkpoints_side_by_side(output: Path) -> None:
    page = (output / "report.html").read_text()
    for told in ("memory: 16 experts, 2 for a token", "experts: 32 experts", "hot against cold", "memory zeroed"):
        assert told in page


@pytest.fixture(scope="module")
def dense(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {**subject.model.config.to_dict(), "experts": None, "n_dense_layers": 3}
    model = EngramLM(ModelConfig.from_dict(config))
    return save_model(model, tmp_path_factory.mktemp("dense") / "dense", None, subject.tokenizer)


def test_a_checkpoint_without_experts_is_told_of_beside_one_that_has_some(
    dense: Path, memory_run: Path, tmp_path: Path
) -> None:
    settings = yaml.safe_load((memory_run / "config.yaml").read_text())["data"]["config"]
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(settings))
    more = ("--names", "dense <&>", "hybrid", "--tokens", "256", "--data", tmp_path / "data.yaml")
    result = answer_of("routing", tmp_path, dense, "--against", memory_run, *more)["result"]
    assert result["without_experts"] == ["dense <&>"]
    assert list(result["checkpoints"]) == ["hybrid"]
    assert "nothing is routed: dense &lt;&amp;&gt;." in (tmp_path / "report.html").read_text()


def test_models_without_experts_and_bad_options_are_named(
    dense: Path, memory_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*args: str | Path) -> str:
        command = ["eval", "routing", "--output", tmp_path / "out", "--names", "a", "--checkpoint", *args]
        assert engram(list(map(str, command))) == 2
        told = capsys.readouterr().err.strip().splitlines()[-1]
        assert told.startswith("error: ")
        return told

    assert "none of the checkpoints has experts: 'a'" in refused(dense)
    assert "layers is '2': allowed is one of the memories of 'a': 1" in refused(memory_run, "--layers", "2")
    assert "hot-from is 1" in refused(memory_run, "--hot-from", "1")
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_routing_is_the_same_on_a_gpu_and_still_nothing_changes_below_the_memory(
    branches_run: Path, tmp_path: Path
) -> None:
    some = ("--tokens", str(TOKENS), "--layers", "2", "--names", "here")
    one, other = (
        answer_of("routing", tmp_path / device, branches_run, *some, "--device", device)["result"]["checkpoints"][
            "here"
        ]
        for device in ("cpu", "cuda")
    )
    for a, b in zip(one["layers"], other["layers"], strict=True):
        np.testing.assert_allclose(a["load"], b["load"], atol=10)  # near ties
        assert a["changed"]["all"]["value"] == pytest.approx(b["changed"]["all"]["value"], abs=5e-3)
    assert other["layers"][0]["changed"]["all"]["value"] == 0
