"""Checkpoints of a run: when they are saved, and files that are whole or absent and read without pickled code.

A checkpoint holds all that the rest of a run depends on, so that a resumed run equals one that never stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from engram.config import ConfigError
from engram.training.atomic import atomic_file

LAST = "last.ckpt"


class AtomicCheckpointIO(CheckpointIO):
    """`torch.save` files, renamed into place when whole: a save that is killed or meets a full disk leaves the old
    file. Read with `weights_only=True`: a checkpoint from elsewhere can run no code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save atomically: tensors on the CPU are written from where they lie, those elsewhere fetched one at a time.

        Raises `ConfigError` naming the file when the disk refuses.
        """
        with atomic_file(Path(path)) as draft, draft.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> Any:
        """All of a checkpoint; its tensors lie in the mapped file, for their owners to copy.

        Raises `ConfigError` naming the file if it is not one of this trainer.
        """
        try:
            checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # of any kind: the file may hold anything
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"checkpoint {str(path)!r} cannot be read: {reason}") from error
        if not isinstance(checkpoint, dict) or not {"pytorch-lightning_version", "tokenizer"} <= checkpoint.keys():
            raise ConfigError(f"checkpoint {str(path)!r} was not saved by this package's trainer")
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint if it is there."""
        Path(path).unlink(missing_ok=True)


class LastCheckpoint(Checkpoint):
    """Saves `last.ckpt` every so many steps, and after the validation of a step that has one.

    Saved before it, as Lightning's own callback does, the validation would be missing from a resumed run.

    Args:
        folder: where to save.
        every: steps between checkpoints.
    """

    def __init__(self, folder: str | Path, every: int) -> None:
        self.path, self.every = Path(folder) / LAST, every
        self.saved_step = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Note where training goes on from: that step is saved already."""
        self.saved_step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save if it is time and no validation follows."""
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        if not trainer.enable_validation or batches % trainer.val_check_batch:
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Save if it is time."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._save_if_due(trainer)

    def _save_if_due(self, trainer: Any) -> None:
        step = trainer.global_step
        # Between the steps of accumulated gradients `global_step` stays, and nothing may be saved.
        if step % self.every == 0 and step != self.saved_step:
            self.saved_step = step
            trainer.save_checkpoint(self.path)
