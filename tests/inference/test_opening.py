"""A model is found by its folder, its run's, or a checkpoint's, with the tokenizer and token compression it has."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from engram import ConfigError, EngramLM, ModelConfig
from engram.inference.opening import open_model
from engram.parallel.checkpoint import CHECKPOINTS, CheckpointWriter, checkpoint_folder
from engram.training.tokenizer import train_bpe
from engram.training.weights import save_model

LOOKUP = torch.arange(290) // 2
CONFIG: dict[str, Any] = {
    "vocab_size": 290,
    "d_model": 24,
    "n_layers": 1,
    "attention": {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1, "head_dim": 12},
    "dense_width": 32,
    "n_dense_layers": 1,
    "memory": {"layers": [0], "rows": [31, 37], "n_heads": 2, "row_width": 4},
}


@pytest.fixture
def saved() -> tuple[EngramLM, Tokenizer]:
    return EngramLM(ModelConfig.from_dict(CONFIG), LOOKUP).eval(), train_bpe(["some text, and more of it"], 280)


def require_same(found: tuple[EngramLM, Tokenizer | None], saved: tuple[EngramLM, Tokenizer]) -> None:
    ids = torch.randint(0, 290, (2, 9))
    assert not found[0].training
    assert torch.equal(found[0](ids), saved[0](ids))
    assert found[1] is not None
    assert found[1].to_str() == saved[1].to_str()


def test_a_model_is_found_in_its_folder_and_in_its_runs(saved: tuple[EngramLM, Tokenizer], tmp_path: Path) -> None:
    save_model(saved[0], tmp_path / "model", tokenizer=saved[1])
    for path in (tmp_path, tmp_path / "model", str(tmp_path)):
        require_same(open_model(path), saved)
    (tmp_path / "model" / "tokenizer.json").unlink()
    assert open_model(tmp_path)[1] is None


def test_a_run_without_a_model_gives_its_last_checkpoint(saved: tuple[EngramLM, Tokenizer], tmp_path: Path) -> None:
    run = {"model_config": saved[0].config.to_dict(), "token_lookup": LOOKUP, "tokenizer_json": saved[1].to_str()}
    folder = checkpoint_folder(tmp_path / CHECKPOINTS, 7)
    CheckpointWriter().save(folder, saved[0], [], run)
    for path in (tmp_path, folder):
        before = torch.get_rng_state()
        found = open_model(path)
        assert torch.equal(torch.get_rng_state(), before)  # nothing is drawn from the caller's generator
        require_same(found, saved)


def test_what_holds_no_model_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=f"{path.name}' is no model's folder"):
            open_model(path)
