"""Batches: the same tokens in the same order for every seed and step, on any number of ranks, after any stop."""

import json
import math
import subprocess
import sys
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import TEXTS, write_texts
from torch import Tensor

from engram.config import ConfigError, build_config
from engram.training.cache import build_once
from engram.training.data import Batch, DataConfig, TokenData, repeats
from engram.training.tokenizer import train_bpe
from engram.training.tokens import TokenFile

T = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("data"), "abc")


def config(folder: Path, **changes: object) -> DataConfig:
    plain = {"source": "files", "files": [str(folder / "all.jsonl")], "domain_column": "kind", "vocab_size": 300}
    sizes = {"seq_len": T, "batch_size": 8, "cache_dir": str(folder / "cache")}
    return build_config(DataConfig, plain | sizes | changes)


@pytest.fixture(scope="module")
def data(folder: Path) -> TokenData:
    return TokenData(config(folder))


def equal(one: Batch, two: Batch) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_batch_is_windows_of_the_token_file_with_the_next_tokens_as_targets(data: TokenData) -> None:
    stream = TokenFile.open(data.folder, "train").tokens.astype(np.int64)
    windows = {tuple(stream[i : i + T + 1].tolist()) for i in range(0, len(stream) - T, T)}
    for step in range(3):
        batch = data.train_batch(step)
        assert {(name, x.dtype, tuple(x.shape)) for name, x in batch.items()} == {
            (name, torch.int64, (8, T)) for name in ("tokens", "targets", "document_ids")
        }
        for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
            assert (*tokens.tolist(), targets[-1].item()) in windows
            assert torch.equal(tokens[1:], targets[:-1])


def test_an_epoch_meets_every_window_once(data: TokenData, folder: Path) -> None:
    n = data.n_train_windows
    size = max(d for d in range(1, 20) if n % d == 0)
    whole = TokenData(config(folder, batch_size=size))
    firsts = torch.cat([whole.train_batch(step)["tokens"] for step in range(n // size)])
    stream = TokenFile.open(data.folder, "train").tokens.astype(np.int64)
    assert sorted(map(tuple, firsts.tolist())) == sorted(map(tuple, stream[: n * T].reshape(n, T).tolist()))


def test_document_ids_number_the_documents_of_the_whole_split(data: TokenData) -> None:
    stream = TokenFile.open(data.folder, "validation").tokens
    number = np.cumsum(np.concatenate([[False], stream == data.eos_id]))  # ends of text before each token
    at = 0
    for batch in data.val_dataloader():
        for documents in batch["document_ids"].numpy():
            assert documents.tolist() == number[at : at + T].tolist()
            at += T
    assert number[at - 1] > 1


def test_training_windows_start_a_document_after_each_end_of_text(data: TokenData) -> None:
    numbers: set[int] = set()
    for step in range(6):
        batch = data.train_batch(step)
        for tokens, documents in zip(batch["tokens"].tolist(), batch["document_ids"].tolist(), strict=True):
            assert [d - documents[0] for d in documents] == [tokens[:t].count(data.eos_id) for t in range(T)]
            numbers.update(documents)
    assert len(numbers) > 6


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), ids=st.integers(1, 12))
def test_repeated_pairs_are_those_seen_before_in_their_document(seed: int, ids: int) -> None:
    generator = np.random.default_rng(seed)
    tokens, targets = generator.integers(0, ids, (2, 3, 20))
    documents = np.sort(generator.integers(5, 8, (3, 20)), axis=1)
    found = repeats(tokens, targets, documents)
    for row in range(3):
        seen: set[tuple[int, int, int]] = set()
        for t in range(20):
            pair = (int(documents[row, t]), int(tokens[row, t]), int(targets[row, t]))
            assert found[row, t] == (pair in seen)
            seen.add(pair)


def test_the_order_depends_on_seed_and_step_alone(data: TokenData, folder: Path) -> None:
    fresh = TokenData(config(folder))
    for step in (7, 0, 5000, 7):
        assert equal(data.train_batch(step), fresh.train_batch(step))
    assert not equal(data.train_batch(0), data.train_batch(1))
    assert not equal(data.train_batch(0), TokenData(config(folder, seed=1)).train_batch(0))


@settings(max_examples=25, deadline=None)
@given(step=st.integers(0, 10**6), world_size=st.sampled_from([1, 2, 4, 8]))
def test_the_ranks_rows_in_order_are_the_rows_of_a_single_process(data: TokenData, step: int, world_size: int) -> None:
    whole = data.train_batch(step)
    parts = [data.train_batch(step, rank, world_size) for rank in range(world_size)]
    assert equal(whole, {name: torch.cat([part[name] for part in parts]) for name in whole})
    whole = data.val_batch(0)
    parts = [data.val_batch(0, rank, world_size) for rank in range(world_size)]
    assert equal(whole, {name: torch.cat([part[name] for part in parts]) for name in whole})


def test_ranks_that_cannot_share_a_batch_evenly_are_refused(data: TokenData) -> None:
    with pytest.raises(ConfigError, match=r"data\.batch_size is 8: allowed is a multiple of the number of ranks \(3\)"):
        data.train_batch(0, 0, 3)


def test_validation_scores_the_held_out_text_in_order_with_its_bytes_and_domains(data: TokenData) -> None:
    file = TokenFile.open(data.folder, "validation")
    batches = list(data.val_dataloader())
    assert len(batches) == len(data.val_dataloader())
    scored = torch.cat([batch["targets"].flatten() for batch in batches]).numpy()
    n = len(scored)
    assert n == data.n_val_windows * T
    assert n > len(file.tokens) - 1 - 8 * T - T  # what is left out is less than one batch and one window
    assert scored.tolist() == file.tokens[1 : n + 1].tolist()
    # Bytes and domains, from the text of each document in turn.
    lengths, domains = [], []
    for i, domain in enumerate(file.domains):
        ids = file.tokens[file.starts[i] : file.starts[i + 1] - 1].tolist()
        text = data.tokenizer.decode(ids, skip_special_tokens=False)
        lengths += [len(part) for part in data.tokenizer.decode_batch([[token] for token in ids])] + [0]
        assert sum(lengths[len(domains) :]) == len(text.encode())
        domains += [int(domain)] * (len(ids) + 1)
    assert torch.cat([batch["target_bytes"].flatten() for batch in batches]).tolist() == lengths[1 : n + 1]
    assert torch.cat([batch["domains"].flatten() for batch in batches]).tolist() == domains[1 : n + 1]
    assert data.domains == ("a", "b", "c")


def test_bits_per_byte_of_a_uniform_guess_are_exact(data: TokenData) -> None:
    """ln V nats a token over the bytes of those tokens: every batch's parts add up to the text's own size."""
    batches = list(data.val_dataloader())
    nats = sum(batch["targets"].numel() * math.log(data.vocab_size) for batch in batches)
    n_bytes = sum(int(batch["target_bytes"].sum()) for batch in batches)
    n_targets = sum(batch["targets"].numel() for batch in batches)
    stream = TokenFile.open(data.folder, "validation").tokens[: n_targets + 1].tolist()
    text = data.tokenizer.decode(stream[1:], skip_special_tokens=True)
    assert n_bytes == len(text.encode())
    assert nats / math.log(2) / n_bytes == pytest.approx(n_targets * math.log2(300) / len(text.encode()))


def test_val_tokens_takes_whole_batches_of_the_first_tokens(data: TokenData, folder: Path) -> None:
    part = TokenData(config(folder, val_tokens=8 * T + 5))
    assert part.n_val_windows == 8
    assert equal(part.val_batch(0), data.val_batch(0))
    tiny = TokenData(config(folder, val_tokens=1))
    assert [batch["tokens"].shape for batch in tiny.val_dataloader()] == [(1, T)]
    assert part.folder == data.folder  # how much is scored changes no file


def test_every_batch_holds_the_same_number_of_windows(folder: Path) -> None:
    for size in (3, 5, 7, 1000):
        shapes = {batch["tokens"].shape for batch in TokenData(config(folder, batch_size=size)).val_dataloader()}
        assert len(shapes) == 1


class Recorder(lightning.LightningModule):
    """Keeps what it was given to train on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []

    def training_step(self, batch: Batch, index: int) -> Tensor:
        self.seen.append(batch["tokens"])
        return self.weight * batch["tokens"].float().mean()

    def validation_step(self, batch: Batch, index: int) -> None:
        assert "target_bytes" in batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trained(data: TokenData, where: Path, steps: int, resume: Path | None = None, **options: object) -> list[Tensor]:
    module = Recorder()
    checkpoints = lightning.pytorch.callbacks.ModelCheckpoint(
        where, filename="{step}", every_n_train_steps=1, save_top_k=-1
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[checkpoints],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,  # type: ignore[arg-type]
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return module.seen


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "error:.*not resumable.*")
@pytest.mark.parametrize(
    "options", [{}, {"val_check_interval": 2, "check_val_every_n_epoch": None}, {"limit_train_batches": 3}]
)
def test_a_resumed_run_sees_exactly_the_batches_that_were_left(
    folder: Path, data: TokenData, tmp_path: Path, options: dict[str, object]
) -> None:
    expected = [data.train_batch(step)["tokens"] for step in range(9)]
    whole = trained(TokenData(config(folder)), tmp_path / "whole", 9, **options)
    assert len(whole) == 9
    assert all(map(torch.equal, whole, expected))
    for stop in (1, 4, 6):
        rest = trained(
            TokenData(config(folder)), tmp_path / f"from{stop}", 9, tmp_path / "whole" / f"step={stop}.ckpt", **options
        )
        assert len(rest) == 9 - stop
        assert all(map(torch.equal, rest, expected[stop:]))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_with_accumulated_gradients_a_resumed_run_still_goes_on_at_the_next_batch(
    folder: Path, data: TokenData, tmp_path: Path
) -> None:
    trained(TokenData(config(folder)), tmp_path / "whole", 3, accumulate_grad_batches=2)
    rest = trained(
        TokenData(config(folder)), tmp_path / "rest", 3, tmp_path / "whole" / "step=2.ckpt", accumulate_grad_batches=2
    )
    assert all(map(torch.equal, rest, [data.train_batch(step)["tokens"] for step in (4, 5)]))
    assert len(rest) == 2


@pytest.mark.parametrize("change", [{"seed": 5}, {"batch_size": 4}, {"seq_len": 8}, {"max_bytes": 3000}])
def test_resuming_on_other_data_is_refused(folder: Path, data: TokenData, change: dict[str, int]) -> None:
    other = TokenData(config(folder, **change))
    with pytest.raises(ConfigError, match=r"data \w+ is .*: allowed is that of the checkpoint, "):
        other.load_state_dict(data.state_dict())


def test_state_without_a_trainer_comes_back(folder: Path, data: TokenData) -> None:
    state = data.state_dict() | {"step": 3}
    other = TokenData(config(folder))
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert equal(next(iter(other.train_dataloader())), data.train_batch(3))


def test_processes_that_start_together_share_one_build(folder: Path, tmp_path: Path) -> None:
    program = (
        "import json, sys; from engram.training.prepare import DataConfig, prepared\n"
        "print((prepared(DataConfig(**json.loads(sys.argv[1]))) / 'meta.json').read_text())"
    )
    settings = {"source": "files", "files": [str(folder / "all.jsonl")], "vocab_size": 300, "seq_len": T}
    command = [sys.executable, "-c", program, json.dumps(settings | {"cache_dir": str(tmp_path)})]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1] != b""
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".lock"]


def test_files_are_made_once_and_found_again_by_content(folder: Path, tmp_path: Path, data: TokenData) -> None:
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((folder / "all.jsonl").read_bytes())
    assert TokenData(config(folder, files=[str(copy)])).folder == data.folder
    copy.write_text(copy.read_text().replace("document 7 ", "document seven "))
    others = [{"files": [str(copy)]}, {"vocab_size": 299}, {"max_bytes": 500}, {"domain_column": ""}]
    folders = {TokenData(config(folder, **other)).folder for other in others}
    assert len(folders | {data.folder}) == 5
    hashes = {TokenData(config(folder, **other)).corpus_hash == data.corpus_hash for other in others[:1] + others[2:]}
    assert hashes == {False}


def test_the_description_names_the_corpus_and_counts_it(data: TokenData) -> None:
    said = data.describe()
    assert len(said["corpus_hash"]) == 64
    total = {name: sum(split[domain][name] for split in said["splits"].values() for domain in "abc") for name in
             ("documents", "bytes")}  # fmt: skip
    assert total == {"documents": 300, "bytes": sum(len(text.encode()) for text in TEXTS)}
    assert json.loads(json.dumps(said)) == said


def test_a_given_tokenizer_is_used_and_the_compressor_covers_the_models_vocabulary(
    folder: Path, tmp_path: Path
) -> None:
    tokenizer = train_bpe(iter(["some other text entirely"]), 270)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    data = TokenData(config(folder, tokenizer=str(tmp_path), vocab_size=512))
    assert data.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert data.vocab_size == 512
    assert len(data.compressor().lookup) == 512
    assert (data.pad_id, data.eos_id) == (0, 1)
    with pytest.raises(
        ConfigError, match=r"data\.vocab_size is 259: allowed is 2\d\d, the number of ids of the tokenizer"
    ):
        _ = TokenData(config(folder, tokenizer=str(tmp_path), vocab_size=259)).folder


def test_a_window_longer_than_the_text_is_refused(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.seq_len is 100000: allowed is below the \d+ tokens of the train split"
    ):
        TokenData(config(folder, seq_len=100_000)).train_batch(0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"source": "files"}, "data.files is ()"),
        ({"files": ["a.txt"]}, "data.files is ('a.txt',)"),
        ({"val_files": ["a.txt"]}, "data.val_files is ('a.txt',)"),
        ({"source": ""}, "data.source is ''"),
        ({"seq_len": 0}, "data.seq_len is 0: allowed is 1 or more"),
        ({"max_bytes": -1}, "data.max_bytes is -1: allowed is 0 or more"),
        ({"text_column": ""}, "data.text_column is ''"),
        ({"batch": 3}, "unknown setting batch is 3"),
        ({"seed": "x"}, "seed is 'x': allowed is a whole number"),
    ],
)
def test_settings_that_cannot_be_are_named(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config(DataConfig, setting)
    assert str(caught.value).startswith(message)


def test_a_batch_costs_less_than_a_fiftieth_of_a_training_step(folder: Path, tmp_path: Path) -> None:
    """At 20,000 tokens/s a step of 8,192 tokens takes 0.41 s; a batch of that size must take less than 8 ms."""
    import time

    rng = np.random.default_rng(0)
    n = 4_000_000

    def build(folder: Path) -> None:
        rng.integers(1, 300, n).astype(np.uint16).tofile(folder / "train.bin")
        np.save(folder / "train.starts.npy", np.arange(0, n + 1, 1000))
        np.save(folder / "train.domains.npy", np.zeros(n // 1000, np.uint8))
        (folder / "meta.json").write_text(json.dumps({"dtype": "uint16", "eos_id": 1}))

    data = TokenData(config(folder, seq_len=256, batch_size=32))
    data.__dict__["folder"] = build_once(tmp_path / "large", build)
    data.train_batch(0)
    times = []
    for step in range(20):
        start = time.perf_counter()
        data.train_batch(step)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.008
