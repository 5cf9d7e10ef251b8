"""How Lightning runs the processes of a run: each with its part of the model, and checkpoints that fit any mesh.

With one process there is no process group, and the model is whole; checkpoints are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import nn
from torch.optim import Optimizer

from engram.config import ConfigError
from engram.parallel.checkpoint import CheckpointWriter, load, read_run, remove_checkpoint
from engram.parallel.config import ParallelConfig
from engram.parallel.mesh import Mesh
from engram.training.optim import Together


class MeshStrategy(ModelParallelStrategy):
    """Lightning's strategy for models that spread themselves over a mesh: a `LitEngramLM` asks it for `mesh`.

    Args:
        parallel: sizes of the mesh.
        asynchronous: write checkpoints while training goes on.
        timeout_s: seconds that a process waits for the others before it gives up.
    """

    def __init__(self, parallel: ParallelConfig, asynchronous: bool = False, timeout_s: float = 600.0) -> None:
        super().__init__(timeout=timedelta(seconds=timeout_s))
        self.parallel = parallel
        self.mesh: Mesh | None = None
        self._asynchronous = asynchronous
        self._writer: CheckpointWriter | None = None

    def setup_environment(self) -> None:
        """Join the process group, if there are others."""
        if self.world_size == 1:
            Strategy.setup_environment(self)
            self.set_world_ranks()
            return
        self._setup_distributed()
        self.mesh = Mesh.of(self.parallel, self.root_device.type)

    @property
    def writer(self) -> CheckpointWriter:
        """What saves this run's checkpoints."""
        if self._writer is None:
            self._writer = CheckpointWriter(self._asynchronous)
        return self._writer

    @property
    def _trained(self) -> nn.Module:
        assert self.lightning_module is not None
        return self.lightning_module.model  # type: ignore[return-value]

    @property
    def _parts(self) -> list[Optimizer]:
        """The optimisers proper."""
        return [part for o in self.optimizers for part in (o.optimizers if isinstance(o, Together) else [o])]

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: `save_checkpoint` takes the model's tensors from where they lie."""
        return {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Nothing, for the same reason."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Save to a folder; raises `ConfigError` naming it when the disk refuses."""
        run = {name: kept for name, kept in checkpoint.items() if name not in ("state_dict", "optimizer_states")}
        self.writer.save(Path(self.broadcast(filepath)), self._trained, self._parts, run)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load model and, to train on, optimisers; what is returned is the rest.

        Raises `ConfigError` naming the folder if it can't be read or is of another run.
        """
        folder = Path(self.broadcast(checkpoint_path))
        run = read_run(folder)
        if not {"pytorch-lightning_version", "tokenizer", "model_config"} <= run.keys():
            raise ConfigError(f"checkpoint {str(folder)!r} was not saved by this package's trainer")
        assert self.lightning_module is not None
        self.lightning_module.on_load_checkpoint(run)  # which refuses those of other models, before tensors don't fit
        load(folder, self._trained, self._parts)
        return run

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing: `load_checkpoint` has done it."""

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint if it is there."""
        if self.is_global_zero:
            remove_checkpoint(Path(filepath))

    def teardown(self) -> None:
        """Finish what is being written, and leave the process group."""
        if self._writer is not None:
            self._writer.wait()
        super().teardown()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
