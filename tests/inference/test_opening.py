"""Whatever a path leads to is the same model, wherever its tables are kept."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engram import ConfigError, EngramLM, ModelConfig
from engram.inference import generate, offloaded_tables
from engram.inference.opening import open_model
from engram.memory import DiskTable, HostTable
from engram.parallel.checkpoint import CheckpointWriter
from engram.training.tokenizer import train_bpe
from engram.training.weights import save_model

LOOKUP = torch.arange(300) // 2
TOKENIZER = train_bpe(["some text to learn from"], 300)


def saved(folder: Path, **changes: Any) -> EngramLM:
    """A run's folder as training leaves it: a model and a checkpoint."""
    config = ModelConfig.from_dict(
        {
            "vocab_size": 300,
            "d_model": 24,
            "n_layers": 2,
            "attention": {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1, "head_dim": 12},
            "dense_width": 32,
            "n_dense_layers": 2,
            "memory": {"layers": [1], "rows": [31, 37], "n_heads": 2, "row_width": 8},
            **changes,
        }
    )
    model = EngramLM(config, LOOKUP)
    for name, parameter in model.named_parameters():
        if "table" in name:
            torch.nn.init.normal_(parameter)
    save_model(model, folder / "model", LOOKUP, TOKENIZER)
    run = {"model_config": config.to_dict(), "token_lookup": LOOKUP, "tokenizer_json": TOKENIZER.to_str()}
    CheckpointWriter().save(folder / "checkpoints" / "step-00000007", model, [], run)
    return model.eval()


def test_a_run_its_model_and_its_checkpoint_are_the_same_model_with_its_tokenizer(tmp_path: Path) -> None:
    model = saved(tmp_path / "run")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "unfinished" / "checkpoints")
    ids = torch.randint(300, (2, 9))
    for path in ("run", "run/model", "unfinished", "unfinished/checkpoints/step-00000007"):
        drawn = torch.get_rng_state()
        opened, tokenizer = open_model(tmp_path / path)
        assert torch.equal(torch.get_rng_state(), drawn)  # nothing is drawn from the caller's generator
        assert not opened.training
        assert torch.equal(opened(ids), model(ids))
        assert tokenizer is not None
        assert tokenizer.to_str() == TOKENIZER.to_str()
    (tmp_path / "run" / "model" / "tokenizer.json").unlink()
    assert open_model(tmp_path / "run")[1] is None


def test_a_tokenizer_other_than_the_models_is_refused_also_where_it_has_none(tmp_path: Path) -> None:
    saved(tmp_path)
    other = train_bpe(["quite another text"], 300)
    checkpoint = tmp_path / "checkpoints" / "step-00000007"
    for path in (tmp_path / "model", checkpoint, tmp_path / "model"):
        assert open_model(path, tokenizer=TOKENIZER)[1] is TOKENIZER
        with pytest.raises(
            ConfigError, match=r"the tokenizer given has sha256 \w+: the weights were trained with sha256"
        ):
            open_model(path, tokenizer=other)
        (tmp_path / "model" / "tokenizer.json").unlink(missing_ok=True)
    save_model(EngramLM(open_model(tmp_path)[0].config, LOOKUP), tmp_path / "model", LOOKUP)  # trained with none
    assert open_model(tmp_path, tokenizer=other)[1] is other


def test_a_model_says_the_same_with_its_tables_on_the_host_or_on_disk(tmp_path: Path) -> None:
    model = saved(tmp_path)
    for tables, kind in (("host", HostTable), ("disk", DiskTable)):
        opened, _ = open_model(tmp_path, tables, cache_rows=20)  # type: ignore[arg-type]
        assert [type(table) for table in offloaded_tables(opened).values()] == [kind]
        assert generate(opened, [[3, 4], [5]], 30) == generate(model, [[3, 4], [5]], 30)
        assert sum(p.numel() for p in opened.parameters()) < sum(p.numel() for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("tables", ["device", "host"])
@pytest.mark.parametrize("rows", ["int8", "fp8_block32"])
def test_rows_of_8_bits_change_what_a_model_says_a_little(tmp_path: Path, tables: Any, rows: Any) -> None:
    model, ids = saved(tmp_path), torch.randint(300, (2, 9))
    opened, _ = open_model(tmp_path, tables, rows=rows)
    difference = (opened(ids) - model(ids)).abs().max() / model(ids).abs().max()
    assert 0 < difference < 0.02


def test_a_model_without_memory_opens_wherever_its_tables_would_be(tmp_path: Path) -> None:
    model, ids = saved(tmp_path, memory=None), torch.randint(300, (2, 9))
    for tables in ("device", "host", "disk"):
        assert torch.equal(open_model(tmp_path, tables)[0](ids), model(ids))  # type: ignore[arg-type]


def test_what_cannot_be_opened_so_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    refused: list[tuple[str, Any]] = [
        ("is no model's folder, no run's, and no checkpoint's", lambda: open_model(tmp_path / "nowhere")),
        ("tables is 'cloud'", lambda: open_model(tmp_path, "cloud")),  # type: ignore[arg-type]
        ("cache_rows is 5", lambda: open_model(tmp_path, cache_rows=5)),
        ("rows is 'int8': allowed is float", lambda: open_model(tmp_path, "disk", rows="int8")),
        ("tables is 'disk'", lambda: open_model(tmp_path / "checkpoints" / "step-00000007", "disk")),
        ("row format is 'int3'", lambda: open_model(tmp_path, rows="int3")),  # type: ignore[arg-type]
    ]
    for message, call in refused:
        with pytest.raises(ConfigError, match=message):
            call()
