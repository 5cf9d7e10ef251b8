"""Documents from local files and data sets of the hub: what is read, held out, and refused."""

import json
import os
from pathlib import Path

import pytest
from datasets import Dataset

from engram.config import ConfigError
from engram.training.sources import open_source

TEXTS = [f"document number {i} about {word}\nof two lines" for i in range(80) for word in ("cats", "dogs", "ants")]
DOMAINS = ["pets" if "ants" not in text else "insects" for text in TEXTS]


@pytest.fixture(autouse=True)
def no_shared_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))


def jsonl(path: Path, texts: list[str], domains: list[str]) -> str:
    rows = [json.dumps({"body": text, "kind": kind}) for text, kind in zip(texts, domains, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


def parquet(path: Path, texts: list[str], domains: list[str]) -> str:
    Dataset.from_dict({"body": texts, "kind": domains}).to_parquet(str(path))
    return str(path)


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_tables_give_every_text_once_with_its_domain(tmp_path: Path, write: object) -> None:
    suffix = write.__name__  # type: ignore[attr-defined]
    path = write(tmp_path / f"data.{suffix}", TEXTS + TEXTS[:9], DOMAINS + DOMAINS[:9])  # type: ignore[operator]
    source = open_source("files", [path], text_column="body", domain_column="kind")
    training, validation = list(source.training()), list(source.validation())
    assert sorted((d.text, d.domain) for d in training + validation) == sorted(zip(TEXTS, DOMAINS, strict=True))
    assert source.domains == ("insects", "pets")
    assert 1 <= len(validation) <= 25  # 4 % of 240 by hash: 9.6 +- 3


def test_the_file_format_and_the_order_of_rows_change_nothing(tmp_path: Path) -> None:
    forwards = open_source("files", [jsonl(tmp_path / "a.jsonl", TEXTS, DOMAINS)], text_column="body")
    backwards = open_source("files", [parquet(tmp_path / "b.parquet", TEXTS[::-1], DOMAINS)], text_column="body")
    assert list(forwards.training()) == list(backwards.training())
    assert list(forwards.validation()) == list(backwards.validation())
    assert forwards.domains == ("text",)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
    source = open_source("files", [str(tmp_path / "*.txt")])
    assert sorted(d.text for d in [*source.training(), *source.validation()]) == sorted(TEXTS)


def test_given_validation_files_are_held_out_and_never_trained_on(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "train.jsonl", TEXTS, DOMAINS)
    val = jsonl(tmp_path / "val.jsonl", [*TEXTS[:7], "only here"], [*DOMAINS[:7], "pets"])
    source = open_source("files", [train], [val], text_column="body")
    assert sorted(d.text for d in source.validation()) == sorted([*TEXTS[:7], "only here"])
    assert sorted(d.text for d in source.training()) == sorted(TEXTS[7:])


def test_the_fingerprint_follows_content_and_columns_and_not_the_name(tmp_path: Path) -> None:
    def fingerprint(name: str, texts: list[str], column: str = "body") -> str:
        return open_source("files", [jsonl(tmp_path / name, texts, DOMAINS)], text_column=column).fingerprint

    first = fingerprint("a.jsonl", TEXTS)
    assert fingerprint("renamed.jsonl", TEXTS) == first
    assert len({first, fingerprint("b.jsonl", [*TEXTS[:-1], "x"]), fingerprint("c.jsonl", TEXTS, "kind")}) == 3


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_file_rewritten_within_its_size_and_time_is_read_anew(tmp_path: Path, split: str) -> None:
    paths = {name: jsonl(tmp_path / f"{name}.jsonl", [f"{name} one", f"{name} two"], ["pets"] * 2) for name in
             ("train", "validation")}  # fmt: skip

    def texts() -> set[str]:
        source = open_source("files", [paths["train"]], [paths["validation"]], text_column="body")
        return {document.text for document in _all(source)}

    before, file = texts(), Path(paths[split])
    status = file.stat()
    file.write_text(file.read_text().replace("two", "new"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert texts() == before - {f"{split} two"} | {f"{split} new"}


def test_a_column_names_256_domains_and_no_more(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(257)]
    path = jsonl(tmp_path / "a.jsonl", texts[:256], texts[:256])
    assert len(open_source("files", [path], text_column="body", domain_column="kind").domains) == 256
    path = jsonl(tmp_path / "b.jsonl", texts, texts)
    assert refusal("files", [path], text_column="body", domain_column="kind") == (
        "data.domain_column is 'kind': allowed is a column of at most 256 different values (it has 257)"
    )


def test_a_data_set_of_the_hub_is_loaded_with_its_own_splits(tmp_path: Path) -> None:
    """By the path of a local copy: the code of the library that loads a hub id, without the download."""
    jsonl(tmp_path / "set" / "train.jsonl", TEXTS, DOMAINS)
    jsonl(tmp_path / "set" / "validation.jsonl", ["held out"], ["pets"])
    source = open_source(str(tmp_path / "set"), text_column="body", domain_column="kind")
    assert [d.text for d in source.validation()] == ["held out"]
    assert sorted(d.text for d in source.training()) == sorted(TEXTS)
    again = open_source(str(tmp_path / "set"), text_column="body", domain_column="kind")
    assert again.fingerprint == source.fingerprint


def refusal(*args: object, **settings: object) -> str:
    with pytest.raises(ConfigError) as caught:
        open_source(*args, **settings)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("offset", [0, 5, 1_048_575, 1_048_577, 3_000_001])
def test_a_file_that_is_not_utf8_is_named_with_the_byte(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(b"a" * offset + b"\xe9 and more")
    assert refusal("files", [str(path)]) == f"{str(path)!r} is not UTF-8 text: bad byte at offset {offset}"


def test_a_character_cut_at_the_end_or_between_two_reads_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "cut.txt"
    path.write_bytes(b"a" * 1_048_574 + "é🚀".encode() + b"b")
    (tmp_path / "other.txt").write_text("other")
    source = open_source("files", [str(path), str(tmp_path / "other.txt")])
    assert {d.text[-3:] for d in _all(source)} == {"é🚀b", "her"}
    path.write_bytes(b"a" * 10 + "🚀".encode()[:3])
    assert refusal("files", [str(path)]).endswith("bad byte at offset 10")


def _all(source: object) -> list:  # type: ignore[type-arg]
    return [*source.training(), *source.validation()]  # type: ignore[attr-defined]


def test_empty_texts_are_no_documents_and_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ["", "one", " \n", "two"], ["pets"] * 4)
    assert sorted(d.text for d in _all(open_source("files", [path], text_column="body"))) == ["one", "two"]
    for name, texts in {"blank.jsonl": ["", ""], "single.jsonl": ["one", "one"]}.items():
        path = jsonl(tmp_path / name, texts, ["pets"] * 2)
        number = len(set(texts) - {""})
        assert refusal("files", [path], text_column="body") == (
            f"number of different documents in data.files {[path]} is {number}: "
            "allowed is 2 or more, or some in data.val_files"
        )
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "lines.jsonl").write_text("\n \n")
    for name in ("empty.txt", "empty.jsonl", "lines.jsonl"):
        blank = [str(tmp_path / name)]
        assert refusal("files", blank) == f"data.files {blank} hold no document"
    path = jsonl(tmp_path / "a.jsonl", TEXTS, DOMAINS)
    empty = str(tmp_path / "empty.jsonl")
    assert refusal("files", [path], [empty], text_column="body") == f"data.val_files {[empty]} hold no document"
    assert len(_all(open_source("files", [empty, path], text_column="body"))) == len(TEXTS)


def test_what_is_missing_or_unreadable_is_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", TEXTS, DOMAINS)
    assert refusal("files", [str(tmp_path / "none*.txt")]) == (
        f"data.files: there is no file {str(tmp_path / 'none*.txt')!r}"
    )
    assert refusal("files", [path], [str(tmp_path)]) == (
        f"data.val_files: '{tmp_path}' is a folder; name its files, by a glob such as '{tmp_path}/*.jsonl'"
    )
    assert refusal("files", [path]) == "data.text_column is 'text': allowed is one of body, kind"
    assert refusal("files", [path], text_column="body", domain_column="topic") == (
        "data.domain_column is 'topic': allowed is one of body, kind"
    )
    assert "files of one kind" in refusal("files", [path, parquet(tmp_path / "b.parquet", TEXTS, DOMAINS)])
    (tmp_path / "numbers.jsonl").write_text('{"text": 1}\n')
    assert refusal("files", [str(tmp_path / "numbers.jsonl")]) == (
        "data.text_column is 'text': allowed is a column of text (it is of int64)"
    )
    (tmp_path / "broken.jsonl").write_text('{"text": \n')
    assert str(tmp_path / "broken.jsonl") in refusal("files", [str(tmp_path / "broken.jsonl")])
    assert refusal("no-such-user/no-such-data").startswith("data.source 'no-such-user/no-such-data' cannot be loaded: ")
