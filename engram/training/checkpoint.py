"""When a run saves its checkpoints, and which one it goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from engram.config import require
from engram.parallel.checkpoint import CHECKPOINTS, checkpoint_folder, last_checkpoint
from engram.training.logs import CSVMetrics


def resume_path(asked: str | None, run_folder: Path) -> str | None:
    """The folder of the checkpoint to go on from.

    Args:
        asked: a checkpoint's folder; `last`, the run folder's latest; `auto`, the same, or None where there is none.
        run_folder: the run's.

    Raises `ConfigError` if it is not there: Lightning would train from the start where there is no last one.
    """
    path: str | Path | None = asked
    if asked in ("last", "auto"):
        path = last_checkpoint(run_folder / CHECKPOINTS)
        if path is None and asked == "auto":
            return None
        path = path or f"{run_folder / CHECKPOINTS} (last)"
    require(path is None or Path(path).is_dir(), "ckpt_path", str(path), "the folder of a checkpoint, last, or auto")
    return None if path is None else str(path)


class LastCheckpoint(Checkpoint):
    """Saves a checkpoint of a `LitEngramLM` every so many steps, and where it stops early: asked to, or out of time.

    Of a step that has a validation it is saved after that: saved before it, as Lightning's own callback does, the
    validation would be missing from a resumed run.

    Args:
        folder: where to save: `step-NNNNNNNN` inside, the latest alone.
        every: steps between checkpoints.
    """

    def __init__(self, folder: str | Path, every: int) -> None:
        self.folder, self.every = Path(folder), every
        self.saved_step = 0
        self._step_before = 0  # the batch

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Note where training goes on from: that step is saved already."""
        self.saved_step = trainer.global_step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note the step, to know whether the batch makes one."""
        self._step_before = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save if it is time and no validation follows."""
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        if not trainer.enable_validation or batches % trainer.val_check_batch:
            self._save_if_due(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Save if it is time."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._save_if_due(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Wait for what is still being written."""
        trainer.strategy.writer.wait()

    def _save_if_due(self, trainer: Any, module: Any) -> None:
        step = trainer.global_step
        if step in (self._step_before, self.saved_step):
            return  # while gradients are accumulated nothing may be saved
        if step % self.every == 0 or trainer.should_stop or module.stopping_at is not None:
            self.saved_step = step
            _write_metrics(trainer)
            trainer.save_checkpoint(checkpoint_folder(self.folder, step))


def _write_metrics(trainer: Any) -> None:
    """Write what is logged of all steps so far: a run that is killed and goes on from the checkpoint needs the rows."""
    for logger in trainer.loggers:
        if isinstance(logger, CSVMetrics):
            if trainer.global_step % trainer.log_every_n_steps == 0:  # Lightning logs the last step after this
                values = {name: float(value) for name, value in trainer.logged_metrics.items()}
                logger.log_metrics(values, trainer.global_step - 1)
            logger.write()
