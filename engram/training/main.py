"""One training run from YAML files and flags: Lightning's command line around `LitEngramLM` and `TokenData`.

    python train.py fit --config configs/runs/tiny.yaml --trainer.max_steps 1000 --model.overrides.experts.top_k 2

The run's folder (`--trainer.default_root_dir`) gets `config.yaml`, `metrics.csv`, `tb/` (TensorBoard), `progress.json`
(about once a second), `checkpoints/` (go on with `--ckpt_path last`), and at its end `result.json`, `model/`.
With several devices or nodes (`--trainer.devices`, torchrun, Slurm) the processes share the model as `parallel` says.
"""

from __future__ import annotations

import errno
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import jsonargparse
import lightning
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from engram.config import ConfigError, require, require_seed
from engram.parallel.checkpoint import CHECKPOINTS, last_checkpoint
from engram.parallel.config import ParallelConfig
from engram.training.atomic import atomic_file
from engram.training.checkpoint import LastCheckpoint, resume_path
from engram.training.data import TokenData
from engram.training.environment import freeze_objects, prepare_process
from engram.training.logs import Bar, CSVMetrics
from engram.training.module import LitEngramLM, NonFiniteLossError
from engram.training.recorder import EXIT_BAD_SETTING, EXIT_LOST_RANK, EXIT_NON_FINITE, EXIT_STOPPED, RunRecorder
from engram.training.strategy import MeshStrategy

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-true")
# Warnings of libraries about their own use of each other, or about what is meant here.
_NO_NEWS = (
    ".*LeafSpec.*",
    "torch.distributed is disabled, unavailable or uninitialized",
    "FSDP2-wrapped module .* returned a view tensor",
    "It is recommended to use `self.log",  # of values that are those of all ranks already
    "The `srun` command is available",
)
_DEFAULTS = {
    "trainer.precision": "bf16-mixed",
    "trainer.max_epochs": -1,
    "trainer.check_val_every_n_epoch": None,
    "trainer.num_sanity_val_steps": 0,
    "trainer.log_every_n_steps": 20,
    "trainer.use_distributed_sampler": False,
    "trainer.enable_model_summary": False,
    "trainer.default_root_dir": "runs/train",
}


class SaveConfig(SaveConfigCallback):
    """Writes all settings of the run to `config.yaml` in its folder, atomically."""

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Nothing: the settings may still be refused, and a validation's are not those of the run."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write them: all that could refuse them has been asked by now."""
        if trainer.is_global_zero:
            with atomic_file(Path(trainer.default_root_dir) / "config.yaml") as draft:
                draft.write_text(self.parser.dump(self.config, skip_none=False), encoding="utf-8")


class TrainCLI(LightningCLI):
    """LightningCLI with this package's loggers, checkpoints and process settings."""

    exit_code = 0

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """`fit` and `validate`: our model knows no other."""
        return {name: LightningCLI.subcommands()[name] for name in ("fit", "validate")}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that raises its errors, for `main` to print in one line."""
        return super().init_parser(**kwargs, exit_on_error=False)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the settings that are neither the model's, the data's nor the trainer's."""
        parser.add_argument("--threads", type=int | None, default=None, help="CPU threads of this process")
        parser.add_argument("--checkpoint_every", type=int, default=500, help="steps between checkpoints")
        parser.add_argument(
            "--checkpoint_async", type=bool, default=False, help="write checkpoints while training goes on"
        )
        parser.add_argument("--save_weights", type=bool, default=True, help="write the trained model as safetensors")
        parser.add_argument(
            "--parallel", type=ParallelConfig, default=ParallelConfig(), help="how processes share a model"
        )
        parser.add_argument("--timeout_s", type=float, default=600.0, help="how long a process waits for the others")
        parser.set_defaults(_DEFAULTS)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Raises `ConfigError` for a config file that is no text."""
        try:
            super().parse_arguments(parser, args)
        except UnicodeDecodeError as error:
            raise ConfigError(f"a config file cannot be read: {error}") from error

    def _set_seed(self) -> None:
        """Raises `ConfigError` for a seed that a generator refuses."""
        require_seed("seed_everything", self._setting("seed_everything"))
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Set up the process before anything is computed."""
        threads, every = self._setting("threads"), self._setting("checkpoint_every")
        require(threads is None or threads >= 1, "threads", threads, "1 or more")
        require(every >= 1, "checkpoint_every", every, "1 or more")
        trainer = self._setting("trainer")
        batches = trainer.accumulate_grad_batches
        require(batches >= 1, "trainer.accumulate_grad_batches", batches, "1 or more")
        precisions = ", ".join(PRECISIONS)
        require(str(trainer.precision) in PRECISIONS, "trainer.precision", trainer.precision, f"one of {precisions}")
        require(
            trainer.strategy == "auto", "trainer.strategy", trainer.strategy, "auto: `parallel` says how processes work"
        )
        require(self._setting("timeout_s") > 0, "timeout_s", self._setting("timeout_s"), "above 0")
        prepare_process(threads)

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        """A trainer that logs and checkpoints in its `default_root_dir`, and validates at its end if nowhere else."""
        given = self._setting("trainer")
        folder = given.default_root_dir
        recorder = RunRecorder(self._setting("seed_everything"), self._setting("save_weights"))
        self.checkpoints = LastCheckpoint(f"{folder}/{CHECKPOINTS}", self._setting("checkpoint_every"))
        frozen = LambdaCallback(on_train_start=lambda *_: freeze_objects())
        callbacks = [recorder, self.checkpoints, frozen]
        loggers = [CSVMetrics(folder), TensorBoardLogger(folder, name="", version="tb")]
        if given.enable_progress_bar is not False:
            callbacks.append(Bar(refresh_rate=5))
        if given.val_check_interval is None:
            kwargs["val_check_interval"] = given.max_steps * given.accumulate_grad_batches
        parallel = self.config_init[self.config.subcommand].parallel
        kwargs["strategy"] = MeshStrategy(parallel, self._setting("checkpoint_async"), self._setting("timeout_s"))
        trainer = super().instantiate_trainer(
            callbacks=[*(given.callbacks or []), *callbacks],
            logger=loggers if self.subcommand == "fit" else False,  # a validation leaves the run's logs alone
            # Who submitted a Slurm job requeues it: `engram sweep`, or a user's script.
            plugins=[SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else [],
            **kwargs,
        )
        parallel.sizes(trainer.world_size)  # refused before other processes are started
        return trainer

    def fit(self, **kwargs: Any) -> None:
        """Train; if that ends before the last step, say how to go on."""
        stopped = False
        try:
            self.trainer.fit(**kwargs)
        except SystemExit:  # the way to end at SIGTERM and SIGINT
            stopped = True
        step, steps = self.trainer.global_step, self.trainer.max_steps
        if stopped or step < steps:
            strategy = self.trainer.strategy
            assert isinstance(strategy, MeshStrategy)
            self.exit_code = 0 if strategy.is_child_of_rank_0 else EXIT_STOPPED
            if not strategy.is_global_zero:
                return
            saved = self.checkpoints.saved_step and last_checkpoint(self.checkpoints.folder)
            hint = ": go on with --ckpt_path last" if saved else ""
            print(f"stopped at step {step} of {steps}{hint}", file=sys.stderr)

    def _parse_ckpt_path(self) -> None:
        """Find the checkpoint; LightningCLI would read it all here, for settings that ours do not hold."""
        settings = self.config[self.config.subcommand]
        settings.ckpt_path = resume_path(settings.ckpt_path, Path(settings.trainer.default_root_dir))

    def _setting(self, name: str) -> Any:
        return self.config[self.config.subcommand][name]


def main(args: list[str] | None = None) -> int:
    """Run the command line; returns the exit code. What a user can put right ends in one line on stderr."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # tips, and what accelerators are not there
    for message in _NO_NEWS:
        warnings.filterwarnings("ignore", message=message)
    try:
        return TrainCLI(
            LitEngramLM,
            TokenData,
            args=args,
            seed_everything_default=0,
            save_config_callback=SaveConfig,
        ).exit_code
    except (ConfigError, jsonargparse.ArgumentError, MisconfigurationException) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_BAD_SETTING
    except OSError as error:  # of a logger; our own files name theirs
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: cannot use {error.filename or 'the run folder'!r}: {error.strerror}", file=sys.stderr)
        return EXIT_BAD_SETTING
    except torch.distributed.DistError as error:
        print(f"error: the processes of this job did not meet: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_LOST_RANK
    except NonFiniteLossError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return EXIT_NON_FINITE


if __name__ == "__main__":
    sys.exit(main())
