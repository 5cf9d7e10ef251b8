"""A small corpus, and training runs on it that take a second."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_run import MODEL, Run, merge, write_texts
from torch import Tensor

from engram.training.main import main
from engram.training.module import LitEngramLM
from engram.training.strategy import MeshStrategy


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("corpus"), ("code", "prose"))


@pytest.fixture(scope="session")
def settings(corpus: Path) -> dict[str, Any]:
    """A run of 8 steps of 4 x 16 tokens, validated twice."""
    return {
        "seed_everything": 3,
        "threads": 1,
        "checkpoint_every": 4,
        "trainer": {
            "max_steps": 8,
            "accelerator": "cpu",
            "val_check_interval": 4,
            "accumulate_grad_batches": 1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
        },
        "model": {"model": MODEL, "optim": {"lr": 0.003, "matrix_optimizer": "adamw"}},
        "data": {
            "config": {
                "source": "files",
                "files": [str(corpus / "all.jsonl")],
                "domain_column": "kind",
                "vocab_size": 300,
                "seq_len": 16,
                "batch_size": 4,
                "val_tokens": 320,
                "cache_dir": str(corpus / "cache"),
            }
        },
    }


Train = Callable[..., Run]


@pytest.fixture
def train(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Trains in `tmp_path / name` with settings changed by dotted keys; leaves a copy of each checkpoint there, as
    `step-N`."""
    save = MeshStrategy.save_checkpoint

    def save_and_keep(self: MeshStrategy, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save(self, checkpoint, path, storage_options)
        self.writer.wait()
        copy = Path(path).parent.parent / f"step-{checkpoint['global_step']}"
        shutil.copytree(path, copy, dirs_exist_ok=True)

    def run(name: str = "run", resume: Path | None = None, flags: tuple[str, ...] = (), **changes: Any) -> Run:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        changed = merge(settings, {key.replace("__", "."): value for key, value in changes.items()})
        changed["trainer"]["default_root_dir"] = str(folder)
        (folder / "run.yaml").write_text(yaml.safe_dump(changed))
        monkeypatch.setattr(MeshStrategy, "save_checkpoint", save_and_keep)
        monkeypatch.setattr("sys.argv", ["train.py"])
        more = ["--ckpt_path", str(resume)] if resume else []
        return Run(main(["fit", "--config", str(folder / "run.yaml"), *more, *flags]), folder)

    return run


@pytest.fixture
def in_batch(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[LitEngramLM], None]], None]:
    """Does something once, in the training step of a batch with that number."""

    def install(number: int, act: Callable[[LitEngramLM], None]) -> None:
        step, left = LitEngramLM.training_step, [act]

        def acting_step(self: LitEngramLM, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            if batch_idx == number and left:
                left.pop()(self)
            return step(self, batch, batch_idx)

        monkeypatch.setattr(LitEngramLM, "training_step", acting_step)

    return install
