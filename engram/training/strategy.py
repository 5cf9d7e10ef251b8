"""How Lightning runs the processes of a run: each with its part of the model, and checkpoints that fit any mesh.

With one process there is no process group, and the model is whole; checkpoints are the same. With more, each ends when
another is lost, and says which: `EXIT_LOST_RANK`. SIGTERM to any of them is noted, for all to stop after the same step.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.optim import Optimizer

from engram.config import ConfigError
from engram.parallel.checkpoint import CHECKPOINTS, CheckpointWriter, last_checkpoint, load, read_run, remove_checkpoint
from engram.parallel.config import ParallelConfig
from engram.parallel.heartbeat import Heartbeat
from engram.parallel.mesh import Mesh
from engram.training.optim import Together
from engram.training.recorder import EXIT_LOST_RANK


class MeshStrategy(ModelParallelStrategy):
    """Lightning's strategy for models that spread themselves over a mesh: a `LitEngramLM` asks it for `mesh`.

    Args:
        parallel: sizes of the mesh.
        asynchronous: write checkpoints while training goes on.
        timeout_s: seconds that a process waits for the others before it gives up; half of it for one of whom nothing is
            heard at all.
    """

    def __init__(self, parallel: ParallelConfig, asynchronous: bool = False, timeout_s: float = 600.0) -> None:
        super().__init__(timeout=timedelta(seconds=timeout_s))
        self.parallel = parallel
        self.mesh: Mesh | None = None
        self.asked_to_stop = False  # this process, by SIGTERM
        self._asynchronous = asynchronous
        self._timeout_s = timeout_s
        self._writer: CheckpointWriter | None = None
        self._heartbeat: Heartbeat | None = None
        self._ending = threading.Lock()

    def _configure_launcher(self) -> None:
        # With one process there is nothing to launch, and a launcher would leave variables of a job in the environment.
        if self.num_nodes * self.num_processes > 1:
            super()._configure_launcher()

    def setup_environment(self) -> None:
        """Join the process group, if there are others."""
        if self.world_size == 1:
            Strategy.setup_environment(self)
            self.set_world_ranks()
            return
        Strategy.setup_environment(self)
        self.set_world_ranks()
        store = self._join()
        self._setup_distributed()
        self._heartbeat = Heartbeat(
            self.global_rank,
            self.world_size,
            store,
            self._timeout_s / 2,
            lambda: self._trainer.global_step,
            self._end_lost,
        )
        self.mesh = Mesh.of(self.parallel, self.root_device.type)

    def setup(self, trainer: lightning.Trainer) -> None:
        """Replace what Lightning does at SIGTERM: with several processes it starts a collective in the midst of another
        one, which fails or waits for the timeout; and it saves nothing. What it asks all of them before each batch,
        they learn with the loss."""
        super().setup(trainer)
        act = self._note_sigterm if trainer.state.fn == TrainerFn.FITTING else _end_by
        trainer._signal_connector._sigterm_notifier_fn = act  # type: ignore[method-assign, assignment]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    @property
    def is_child_of_rank_0(self) -> bool:
        """Whether Lightning's launcher started this process: it kills rank 0 if this one's exit code is not 0."""
        met = self.cluster_environment
        return self.global_rank > 0 and met is not None and not met.creates_processes_externally

    def _note_sigterm(self, number: int, frame: Any) -> None:
        self.asked_to_stop = True  # `LitEngramLM` tells the others when it next meets them

    def _join(self) -> dist.Store:
        """Make the process group before Lightning does; returns the store that the processes meet in.

        That of torchrun stays when it starts them again, where torch would find the addresses of those that are gone:
        each attempt has names of its own in it.
        """
        met = self.cluster_environment
        assert met is not None
        os.environ.update(MASTER_ADDR=met.main_address, MASTER_PORT=str(met.main_port))
        rank, n, timeout = self.global_rank, self.world_size, timedelta(seconds=self._timeout_s)
        store, _, _ = next(dist.rendezvous("env://", rank, n, timeout=timeout))
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(
            self._get_process_group_backend(),
            store=store,
            rank=rank,
            world_size=n,
            timeout=timeout,
            device_id=None if self.root_device.type == "cpu" else self.root_device,
        )
        return store

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

    @property
    def _trainer(self) -> lightning.Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    def on_exception(self, exception: BaseException) -> None:
        """End the process here if others are the cause: what follows would wait for them."""
        if self._heartbeat is not None:
            if _is_of_others(exception):
                self._end_lost(self._heartbeat.explain())
            self._heartbeat.leave(patience_s=5.0)
            self._heartbeat = None

    def _end_lost(self, reason: str) -> None:
        """Say why, and end, with all that is waiting in other threads."""
        self._ending.acquire()  # for good: one thread says it
        assert self._heartbeat is not None
        saved = last_checkpoint(Path(self._trainer.default_root_dir) / CHECKPOINTS)
        hint = "; go on with --ckpt_path last" if saved else ""
        print(f"error: {reason}{hint}", file=sys.stderr, flush=True)
        self._heartbeat.kill_lost()
        os._exit(EXIT_LOST_RANK)

    def teardown(self) -> None:
        """Finish what is being written, and leave the process group."""
        if self._writer is not None:
            self._writer.wait()
        if self._heartbeat is not None:
            self._heartbeat.leave(self._timeout_s)
            self._heartbeat = None
        super().teardown()
        if dist.is_initialized():
            dist.destroy_process_group()


def _end_by(number: int, frame: Any) -> None:
    """End as a process does that handles no signals: a validation has nothing to save."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _is_of_others(error: BaseException | None) -> bool:
    """Whether torch failed to reach other processes: gloo says so in words alone."""
    while error is not None:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
