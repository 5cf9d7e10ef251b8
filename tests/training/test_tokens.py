"""Token files: they hold the documents, whole and in order, and account for every byte of text."""

import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from engram.config import ConfigError
from engram.memory.compression import TokenCompressor
from engram.training.cache import build_once
from engram.training.corpus import Document
from engram.training.tokenizer import byte_counter, eos_id, load_tokenizer, pad_id, train_bpe
from engram.training.tokens import TokenFile, read_meta, write_tokens

TEXTS = [
    "def add(one, two):\n    return one + two\n",
    "Über die Straße — naïve café, 東京 🚀 and 12345678 more.\n",
    "A text that spells <|eos|> and <|pad|> means the letters.\n",
    "tabs\tand\r\nodd \x0b white \u00a0 space\n\n\n    end",
    "x",
] + [f"line {i} of {'many ' * (i % 7)}words\n" * (1 + i % 3) for i in range(60)]


class Texts:
    """A source of fixed documents, in two domains by turns; the last tenth is for validation."""

    domains: tuple[str, ...] = ("even", "odd")
    fingerprint = "fixed"

    def __init__(self, texts: list[str]) -> None:
        self.documents = [Document(text, self.domains[i % 2], "") for i, text in enumerate(texts)]

    def training(self) -> Iterator[Document]:
        return iter(self.documents[: -len(self.documents) // 10])

    def validation(self) -> Iterator[Document]:
        return iter(self.documents[-len(self.documents) // 10 :] + self.documents[:5])


def bpe(texts: Iterator[str]) -> Tokenizer:
    return train_bpe(texts, 300)


def written(folder: Path, **options: object) -> Path:
    folder.mkdir()
    settings = {"source": Texts(TEXTS), "make_tokenizer": bpe, "max_bytes": {"train": 0, "validation": 0}} | options
    write_tokens(folder, **settings)  # type: ignore[arg-type]
    return folder


def sentence_piece_like() -> Tokenizer:
    """Words behind U+2581 after lower-casing and accent folding, unknown for all else: no byte of it is literal."""
    words = sorted({word.lower() for text in TEXTS for word in text.split()})
    vocab = {"<unk>": 0, "</s>": 1} | {f"\u2581{word}": i + 2 for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def test_every_document_comes_back_with_its_domain_and_one_eos_after_it(tmp_path: Path) -> None:
    folder = written(tmp_path / "t")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for split, documents in (("train", Texts(TEXTS).training()), ("validation", Texts(TEXTS).validation())):
        file = TokenFile.open(folder, split)
        expected = list(documents)
        assert isinstance(file.tokens, np.memmap)
        assert file.tokens.dtype == np.uint16
        assert len(file.starts) == len(expected) + 1
        assert file.starts[-1] == len(file.tokens)
        for i, document in enumerate(expected):
            ids = file.tokens[file.starts[i] : file.starts[i + 1]]
            assert np.flatnonzero(ids == 1).tolist() == [len(ids) - 1]
            assert tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False) == document.text
            at = np.arange(file.starts[i], file.starts[i + 1])
            assert {("even", "odd")[domain] for domain in file.domain_of(file.document_at(at))} == {document.domain}


@pytest.mark.parametrize("make", [bpe, lambda texts: sentence_piece_like()], ids=["byte-level", "by offsets"])
def test_the_bytes_of_a_documents_tokens_are_the_bytes_of_its_text(tmp_path: Path, make: object) -> None:
    folder = written(tmp_path / "t", make_tokenizer=make)
    file = TokenFile.open(folder, "validation")
    assert file.n_bytes is not None
    assert len(file.n_bytes) == len(file.tokens)
    for i, document in enumerate(Texts(TEXTS).validation()):
        lengths = file.n_bytes[file.starts[i] : file.starts[i + 1]]
        assert lengths.sum() == len(document.text.encode())
        assert lengths[-1] == 0


def test_byte_level_tokens_have_the_bytes_they_stand_for() -> None:
    text = "Straße 🚀!"
    bytes_alone = train_bpe(iter(TEXTS), 258)
    assert byte_counter(bytes_alone)(bytes_alone.encode(text), text).tolist() == [1] * len(text.encode())
    merged = train_bpe(iter(TEXTS), 280)
    encoding = merged.encode("words words")
    texts = merged.decode_batch([[i] for i in encoding.ids])
    assert byte_counter(merged)(encoding, "words words").tolist() == [len(part) for part in texts]


def byte_level(prefix: bool, *added: str | AddedToken) -> Tokenizer:
    tokenizer = train_bpe(iter(TEXTS), 280)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.add_tokens(list(added))
    return tokenizer


def trained(model: models.Model, trainer: trainers.Trainer, words: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = words
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


@pytest.mark.parametrize(
    "make",
    [
        lambda: byte_level(False),
        lambda: byte_level(True),
        lambda: byte_level(False, "日本語", "words", "<tool>"),
        lambda: byte_level(True, "日本語", "words", "<tool>"),
        lambda: byte_level(False, AddedToken("日本語", lstrip=True, rstrip=True)),
        lambda: trained(
            models.Unigram(),
            trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False),
            pre_tokenizers.Metaspace(),
        ),
        lambda: trained(
            models.WordPiece(unk_token="[UNK]"),
            trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False),
            pre_tokenizers.BertPreTokenizer(),
        ),
    ],
    ids=["byte-level", "space before", "added", "added, space before", "added, strips", "unigram", "word pieces"],
)
def test_the_bytes_of_a_given_tokenizers_tokens_add_up_to_the_text(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    count = byte_counter(tokenizer)
    for text in [*TEXTS, "hello words", " 日本語 words", "日本語日本語 🚀", "a <tool> 日本語 ", "Ωunknown ω"]:
        counts = count(tokenizer.encode(text, add_special_tokens=False), text)
        assert counts.sum() == len(text.encode()), text
        assert counts.min() >= 0


def test_an_added_token_has_the_bytes_of_its_own_text() -> None:
    tokenizer = byte_level(False, "日本語")
    assert byte_counter(tokenizer)(tokenizer.encode("x日本語!"), "x日本語!").tolist() == [1, 9, 1]


def test_the_record_counts_what_the_files_hold(tmp_path: Path) -> None:
    meta = read_meta(written(tmp_path / "t"))
    for split, documents in (("train", Texts(TEXTS).training()), ("validation", Texts(TEXTS).validation())):
        expected = list(documents)
        for domain in ("even", "odd"):
            of_domain = [document.text for document in expected if document.domain == domain]
            counts = meta["splits"][split][domain]
            assert counts["documents"] == len(of_domain)
            assert counts["bytes"] == sum(len(text.encode()) for text in of_domain)
        file = TokenFile.open(tmp_path / "t", split)
        assert sum(counts["tokens"] for counts in meta["splits"][split].values()) == len(file.tokens)
    assert (meta["pad_id"], meta["eos_id"], meta["dtype"]) == (0, 1, "uint16")
    assert not (tmp_path / "t" / "scratch").exists()


def test_the_corpus_hash_follows_text_split_domain_and_order_and_not_the_tokenizer(tmp_path: Path) -> None:
    def hash_of(name: str, texts: list[str], **options: object) -> str:
        return str(read_meta(written(tmp_path / name, source=Texts(texts), **options))["corpus_hash"])

    first = hash_of("a", TEXTS)
    assert hash_of("b", TEXTS) == first
    assert hash_of("c", TEXTS, make_tokenizer=lambda texts: train_bpe(texts, 270)) == first
    others = [[*TEXTS[:-1], "changed"], [TEXTS[1], TEXTS[0], *TEXTS[2:]], TEXTS[1:]]
    hashes = {hash_of(f"other{i}", texts) for i, texts in enumerate(others)}
    hashes.add(hash_of("prefix", TEXTS, max_bytes={"train": 200, "validation": 0}))
    assert len(hashes | {first}) == 5


def test_max_bytes_takes_whole_documents_from_the_front(tmp_path: Path) -> None:
    whole = TokenFile.open(written(tmp_path / "whole"), "train")
    tokenizer = Tokenizer.from_file(str(tmp_path / "whole" / "tokenizer.json"))
    folder = written(
        tmp_path / "part", make_tokenizer=lambda texts: tokenizer, max_bytes={"train": 150, "validation": 1}
    )
    part = TokenFile.open(folder, "train")
    sizes = np.cumsum([len(text.encode()) for text in TEXTS])
    n = int(np.searchsorted(sizes, 150)) + 1
    assert len(part.starts) == n + 1
    assert part.tokens.tolist() == whole.tokens[: whole.starts[n]].tolist()
    assert len(TokenFile.open(folder, "validation").starts) == 2


def test_several_processes_write_the_same_files(tmp_path: Path) -> None:
    alone, together = written(tmp_path / "alone"), written(tmp_path / "together", num_proc=2)
    for path in alone.iterdir():
        assert (together / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_vocabulary_beyond_65536_is_stored_in_uint32(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "<|endoftext|>": 1} | {f"w{i}": i + 2 for i in range(70_000)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    texts = [f"w{i} w{69_999 - i}" for i in range(20)]
    folder = written(tmp_path / "t", source=Texts(texts), make_tokenizer=lambda texts: tokenizer)
    file = TokenFile.open(folder, "train")
    assert file.tokens.dtype == np.uint32
    assert file.tokens[:6].tolist() == [2, 70_001, 1, 3, 70_000, 1]
    assert read_meta(folder)["pad_id"] == 1  # it has no <|pad|>


def test_a_split_without_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the corpus has no train document"):
        written(tmp_path / "t", source=Texts([]))


def test_a_disk_that_takes_no_more_leaves_nothing_and_is_named(tmp_path: Path) -> None:
    """A real refusal by the kernel in the middle of a write: files may not grow beyond 20 kB here."""
    source = Texts([f"document {i} " * 50 for i in range(200)])

    def build(folder: Path) -> None:
        write_tokens(folder, source, bpe, {"train": 0, "validation": 0})

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ConfigError) as caught:
            build_once(tmp_path / "entry", build)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == f"cannot write '{tmp_path / 'entry'}': File too large"
    assert [path.name for path in tmp_path.iterdir()] == ["entry.lock"]


def test_training_a_tokenizer_twice_gives_the_same_one() -> None:
    assert train_bpe(iter(TEXTS), 400).to_str() == train_bpe(iter(TEXTS), 400).to_str()


def test_a_trained_tokenizer_has_pad_and_eos_first_and_every_byte() -> None:
    tokenizer = train_bpe(iter(TEXTS), 300)
    assert (tokenizer.token_to_id("<|pad|>"), tokenizer.token_to_id("<|eos|>")) == (0, 1)
    assert tokenizer.get_vocab_size() == 300
    every_byte = bytes(range(256)).decode("latin-1") + "\u07ff\uffff\U0010ffff"
    assert tokenizer.decode(tokenizer.encode(every_byte).ids) == every_byte
    assert TokenCompressor.from_tokenizer(tokenizer).reduction > 0


def test_a_vocabulary_that_cannot_hold_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.vocab_size is 257: allowed is 258"):
        train_bpe(iter(TEXTS), 257)


def test_a_tokenizer_loads_from_a_file_or_a_folder(tmp_path: Path) -> None:
    tokenizer = train_bpe(iter(TEXTS), 300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).to_str() == tokenizer.to_str()
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).to_str() == tokenizer.to_str()


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text(json.dumps({"model": 3}))
    for name in (str(tmp_path / "broken.json"), "no-such-user/no-such-tokenizer"):
        with pytest.raises(ConfigError, match=rf"data\.tokenizer '{name}' cannot be loaded: ") as caught:
            load_tokenizer(name)
        assert "\n" not in str(caught.value)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(str(tmp_path / "folder"))
    assert str(caught.value) == f"data.tokenizer '{tmp_path / 'folder'}' is a folder without a tokenizer.json"


def test_the_eos_token_is_the_named_one_or_a_usual_one() -> None:
    tokenizer = sentence_piece_like()
    assert eos_id(tokenizer) == 1
    assert eos_id(tokenizer, "<unk>") == 0
    assert pad_id(tokenizer, 1) == 1
    with pytest.raises(ConfigError, match=r"data\.eos_token is '<end>': the tokenizer has no token <end>"):
        eos_id(tokenizer, "<end>")
