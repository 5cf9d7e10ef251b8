"""What a run leaves for whoever started it: progress while it runs, its result when it ends.

`progress.json` says where the run is, about once a second. `result.json` and the trained model appear when the last
step is done and never before (those of an earlier run are removed when training starts): whoever finds the result knows
that the point is finished, and whoever finds the model that it is this run's.
"""

from __future__ import annotations

import dataclasses
import platform
import shutil
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning
import torch

from engram.budget import ParameterBudget
from engram.config import require
from engram.parallel.checkpoint import CheckpointWriter
from engram.training.atomic import write_json
from engram.training.logs import CSVMetrics
from engram.training.module import LitEngramLM
from engram.training.weights import remove_model, save_checkpoints_model, save_model

PROGRESS, RESULT, MODEL = "progress.json", "result.json", "model"
# How a run ended, if not well.
EXIT_BAD_SETTING, EXIT_NON_FINITE, EXIT_LOST_RANK, EXIT_STOPPED = 2, 3, 4, 130
_SECONDS_BETWEEN_WRITES = 1.0


class RunRecorder(lightning.Callback):
    """Measures speed, keeps every validation, and writes `progress.json`, `result.json` and the trained model.

    Speed is tokens over wall-clock time, fetching, logging and checkpoints included, validation and the first step
    left out.

    Args:
        seed: of the run, for the record.
        save_weights: write the trained model to `model/` in the run's folder.
    """

    def __init__(self, seed: int, save_weights: bool = True) -> None:
        self.seed = seed
        self.save_weights = save_weights
        self.history: list[dict[str, float]] = []
        self._seconds, self._timed_batches = 0.0, 0
        self._began: float | None = None
        self._last_write = 0.0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Count what the model costs."""
        self._budget = ParameterBudget.of(pl_module.model_config, pl_module.data.config.seq_len)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Clear the folder of what an earlier run left of the steps to come.

        Raises `ConfigError` if the last validation would not be that of the trained model.
        """
        if trainer.enable_validation:
            batches, every = trainer.max_steps * trainer.accumulate_grad_batches, trainer.val_check_batch
            allowed = f"a divisor of the run's {batches} batches, so that its end is validated"
            require(isinstance(every, int) and batches % every == 0, "trainer.val_check_interval", every, allowed)
        for logger in trainer.loggers:
            if isinstance(logger, CSVMetrics):
                logger.go_on_from(trainer.global_step)
        if trainer.is_global_zero:
            (Path(trainer.default_root_dir) / RESULT).unlink(missing_ok=True)
            remove_model(Path(trainer.default_root_dir) / MODEL)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the batch, log the speed, tell the progress."""
        now = time.perf_counter()
        if self._began is not None:  # the first batch also allocates and builds kernels
            self._seconds += now - self._began
            self._timed_batches += 1
        self._began = now
        if trainer.global_step % trainer.log_every_n_steps == 0 and self._timed_batches:
            rate = self.tokens_per_second(pl_module)
            flops = rate * self._budget.training_flops
            pl_module.log_dict({"speed/tokens_per_s": rate, "speed/flops_per_s": flops})
        if now - self._last_write > _SECONDS_BETWEEN_WRITES:
            self._last_write = now
            self._write_progress(trainer, pl_module)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Stop the clock."""
        if self._began is not None:
            self._seconds += time.perf_counter() - self._began

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep a validation's values with the tokens trained on by then, and start the clock."""
        if self._began is None:
            return  # before training, or without it
        values = {name[4:]: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
        self.history.append({"step": trainer.global_step, "tokens": self._tokens(trainer, pl_module), **values})
        self._began = time.perf_counter()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Tell the last progress; write the trained model if the run came to its last step."""
        self._write_progress(trainer, pl_module)
        if self.save_weights and trainer.global_step >= trainer.max_steps:
            self._save_model(trainer, pl_module, Path(trainer.default_root_dir) / MODEL)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the result if the run came to its last step."""
        if not trainer.is_global_zero or trainer.global_step < trainer.max_steps:
            return
        data, path = pl_module.data, Path(trainer.default_root_dir) / RESULT
        write_json(
            path,
            {
                "val": self.history[-1] if self.history else None,
                "history": self.history,
                "tokens": self._tokens(trainer, pl_module),
                "tokens_per_s": self.tokens_per_second(pl_module),
                "seed": self.seed,
                "budget": {
                    "total": self._budget.total,
                    "active": self._budget.active,
                    "rho": self._budget.rho,
                    "flops_per_token": self._budget.flops,
                },
                "model": pl_module.model_config.to_dict(),
                "optim": dataclasses.asdict(pl_module.optim_config),
                "precision": str(trainer.precision),
                "data": {**data.describe(), "config": dataclasses.asdict(data.config)},
                "tokenizer": pl_module.tokenizer_identity,
                "device": device_name(pl_module.device),
                "threads": torch.get_num_threads(),
                "versions": {
                    "engram": package_version(),
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                },
            },
        )
        print(f"result: {path}")

    def _save_model(self, trainer: Any, module: LitEngramLM, folder: Path) -> None:
        """Write the trained model; of one that is spread over processes each writes its part first."""
        if trainer.world_size == 1:
            save_model(module.model, folder, module.lookup, module.data.tokenizer)
            return
        run: dict[str, Any] = {}
        module.on_save_checkpoint(run)
        parts = folder.with_name(f".{folder.name}.parts") / "checkpoint"  # alone there: a save removes its neighbours
        CheckpointWriter().save(parts, module.model, [], run)
        if trainer.is_global_zero:
            save_checkpoints_model(parts, folder)
            shutil.rmtree(parts.parent)

    def tokens_per_second(self, module: LitEngramLM) -> float:
        """Training speed so far, over all ranks; 0 before the second step."""
        tokens = self._timed_batches * module.data.config.batch_size * module.data.config.seq_len
        return tokens / self._seconds if self._seconds else 0.0

    def _tokens(self, trainer: Any, module: LitEngramLM) -> int:
        sizes = module.data.config
        return trainer.global_step * trainer.accumulate_grad_batches * sizes.batch_size * sizes.seq_len

    def _write_progress(self, trainer: Any, module: LitEngramLM) -> None:
        loss = trainer.callback_metrics.get("train/loss")
        if trainer.is_global_zero:
            write_json(
                Path(trainer.default_root_dir) / PROGRESS,
                {
                    "step": trainer.global_step,
                    "steps": trainer.max_steps,
                    "tokens": self._tokens(trainer, module),
                    "loss": None if loss is None else float(loss),
                    "tokens_per_s": self.tokens_per_second(module),
                },
            )

    def state_dict(self) -> dict[str, Any]:
        """The validations so far and the time spent, so that a resumed run's result is that of the whole run."""
        return {"history": self.history, "seconds": self._seconds, "timed_batches": self._timed_batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.history = state_dict["history"]
        self._seconds, self._timed_batches = state_dict["seconds"], state_dict["timed_batches"]


def package_version() -> str:
    """That of the installed package; "unknown" where its code is run without being installed."""
    try:
        return metadata.version("engram-moe")
    except metadata.PackageNotFoundError:
        return "unknown"


def device_name(device: torch.device) -> str:
    """The model name of a GPU or of this machine's CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
