"""A mixture adds documents to the training split; all else, and all data without one, is as it was."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from small_run import TEXTS, write_texts

from engram.config import ConfigError, build_config
from engram.sweep.plan import SweepPlan
from engram.synthetic.facts import Facts
from engram.training.data import DataConfig, TokenData
from engram.training.tokens import TokenFile

MIXTURE = {"facts": 30_000, "recall": {"bytes": 3_000, "pairs": [3]}}
CONFIGS = Path(__file__).parents[2] / "configs"
# A plan of which version 0.1.0 made the points that a test names.
PLAN = {
    "name": "test",
    "model": {
        "vocab_size": 300,
        "d_model": 32,
        "n_layers": 2,
        "attention": {"kind": "gqa", "n_heads": 2, "n_kv_heads": 2, "head_dim": 16},
        "dense_width": 64,
        "max_seq_len": 32,
        "experts": {"n_experts": 32, "top_k": 2, "width": 16, "shared_width": 96},
        "memory": {"layers": [1], "n_heads": 2, "row_width": 8, "eos_id": 1},
    },
    "rho": [0.0, 0.5, 1.0],
    "seeds": [0, 1],
    "tokens": 1024,
    "evaluations": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("data"), "abc")


def data(folder: Path, **changes: object) -> TokenData:
    plain = {"source": "files", "files": [str(folder / "all.jsonl")], "domain_column": "kind", "vocab_size": 300}
    return TokenData(
        build_config(DataConfig, plain | {"seq_len": 16, "batch_size": 8, "cache_dir": str(folder / "cache")} | changes)
    )


def documents(data: TokenData, split: str) -> list[tuple[str, str]]:
    """Domain and text of each."""
    file = TokenFile.open(data.folder, split)
    pieces = [file.tokens[a:b].tolist() for a, b in zip(file.starts, file.starts[1:], strict=False)]
    texts = data.tokenizer.decode_batch([piece[:-1] for piece in pieces], skip_special_tokens=False)
    return [(data.domains[number], text) for number, text in zip(file.domains, texts, strict=True)]


def test_data_without_a_mixture_is_what_it_was_before_there_were_any(folder: Path) -> None:
    """Values of version 0.1.0; `{}` and portions of 0 bytes are no mixture."""
    for mixture in ({}, {"facts": 0}):
        plain = data(folder, mixture=mixture, mixture_seed=5)
        assert plain.corpus_hash == "14538b2fe0b3b08a5d9588fb41d960c8f3d9dead2511477c964ad5fc93be811f"
        assert plain.folder == data(folder).folder


def test_points_of_plans_without_a_mixture_keep_their_names() -> None:
    """Names of version 0.1.0."""
    plan = {**PLAN, "data": {"vocab_size": 300, "seq_len": 32, "batch_size": 4, "mixture": {}, "probe_examples": 7}}
    points = build_config(SweepPlan, {**plan, "variants": {}}).points()
    assert [point.fingerprint for point in points[:3]] == ["cdf2e3c9", "c01c0d41", "d65c5225"]
    assert not {"mixture", "mixture_seed", "probe_examples"} & points[0].run_settings["data"]["config"].keys()


def test_all_points_of_a_plan_with_a_mixture_share_its_documents_and_change_with_it(
    folder: Path, tmp_path: Path
) -> None:
    def names(**changes: object) -> list[str]:
        settings = {"vocab_size": 2048, "seq_len": 128, "batch_size": 32, "mixture": MIXTURE, **changes}
        plan = {"name": "x", "model": str(CONFIGS / "models/nano.yaml"), "rho": [0.5], "seeds": [0, 1], "tokens": 8192}
        (tmp_path / "plan.yaml").write_text(json.dumps({**plan, "data": settings, "evaluations": 1}))
        points = SweepPlan.load(tmp_path / "plan.yaml").points()
        for point in points:
            own = point.run_settings["data"]["config"]
            assert (own["mixture"] == MIXTURE, own["mixture_seed"]) == (
                "mixture" not in changes,
                changes.get("mixture_seed", 0),
            )
            assert own["seed"] == point.seed
        return [point.name for point in points]

    others: list[dict[str, object]] = [{}, {"mixture_seed": 1}, {"probe_examples": 9}, {"mixture": {"facts": 90_000}}]
    assert len({name for other in others for name in names(**other)}) == 8


def test_a_mixture_changes_the_training_split_alone(folder: Path) -> None:
    plain, mixed = data(folder), data(folder, mixture=MIXTURE)
    assert mixed.corpus_hash not in (plain.corpus_hash, data(folder, mixture=MIXTURE, mixture_seed=1).corpus_hash)
    for name in ("tokenizer.json", "validation.bin", "validation.bytes.bin", "validation.starts.npy"):
        assert (mixed.folder / name).read_bytes() == (plain.folder / name).read_bytes()
    assert documents(mixed, "validation") == documents(plain, "validation")
    assert [text for text in documents(mixed, "train") if text[0] in "abc"] == documents(plain, "train")
    assert mixed.domains == ("a", "b", "c", "facts", "recall")
    assert mixed.meta["splits"]["validation"]["facts"] == {"documents": 0, "tokens": 0, "bytes": 0}
    limited = [data(folder, mixture=mixture, max_bytes=3000) for mixture in ({}, MIXTURE)]
    assert all(limited[0].meta["splits"]["train"][name] == limited[1].meta["splits"]["train"][name] for name in "abc")


def test_the_documents_of_a_mixture_lie_evenly_among_the_others(folder: Path) -> None:
    found = documents(data(folder, mixture=MIXTURE), "train")
    added = np.array([domain not in "abc" for domain, _ in found])
    lengths = np.array([len(text) for _, text in found])
    base, rest = np.cumsum(lengths * ~added) / lengths[~added].sum(), np.cumsum(added) / added.sum()
    assert np.abs(base - rest).max() < 0.03
    assert {domain for domain, _ in found} == {*"abc", "facts", "recall"}


def test_the_token_file_tells_each_fact_its_number_of_times(folder: Path) -> None:
    mixed = data(folder, mixture=MIXTURE, mixture_seed=3)
    told = Counter(
        line for domain, text in documents(mixed, "train") if domain == "facts" for line in text.splitlines()
    )
    facts = Facts().facts(30_000, 3)
    assert {fact.exposures for fact in facts} == {0, 1, 4, 16, 64}
    for fact in facts:
        assert told[fact.sentence(0)] + told[fact.sentence(1)] == fact.exposures
    assert told.total() == sum(fact.exposures for fact in facts)


def test_a_corpus_whose_domain_is_called_like_a_task_is_refused(folder: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"text": text, "kind": "facts"}) for text in TEXTS]
    (tmp_path / "all.jsonl").write_text("\n".join(rows))
    with pytest.raises(
        ConfigError, match=r"domains of the corpus is \('facts',\): allowed is no names of data.mixture"
    ):
        _ = data(folder, files=[str(tmp_path / "all.jsonl")], mixture=MIXTURE).corpus_hash
