"""One model in training, as a LightningModule: loss, optimiser, schedules, balancing, and what is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import yaml
from jsonargparse import get_loader
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from engram.backbone import EngramLM, ModelOutput, mean_loss, token_losses
from engram.backbone.initialize import materialize
from engram.config import ConfigError, ModelConfig, load_yaml, require
from engram.parallel.apply import parallelize
from engram.parallel.mesh import Mesh
from engram.parallel.prefetch import Prefetch
from engram.synthetic.examples import Example
from engram.training.data import TokenData
from engram.training.identity import require_same_tokenizer, tokenizer_identity
from engram.training.optim import OptimConfig, build_optimizer, clip_gradients
from engram.training.probes import Question, ask, questions_of, score
from engram.training.schedule import multiplier
from engram.training.windows import sample_windows


class NonFiniteLossError(RuntimeError):
    """Training loss or gradients became infinite or not a number; the message names step and batch."""


class LitEngramLM(lightning.LightningModule):
    """Trains the model of a config on a `TokenData`.

    Args:
        model: a model config as a mapping, or the path of its YAML file.
        overrides: settings that replace those of the file, nested or with dots (`experts.top_k`).
        optim: optimiser settings.

    Raises:
        ConfigError: a config that cannot be, or that does not fit the data's vocabulary, sequence length or special
            ids (when the model is made, at the start of training).
    """

    def __init__(
        self,
        model: str | dict[str, Any],
        overrides: dict[str, Any] | None = None,
        optim: OptimConfig = OptimConfig(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__()
        settings = dict(load_yaml(model)) if isinstance(model, str | Path) else dict(model)
        self.model_config = ModelConfig.from_dict(merged(settings, overrides or {}))
        self.optim_config = optim
        self.model: EngramLM
        self.lookup: Tensor
        self.stopping_at: int | None = None  # the step in which all ranks learnt that one was asked to stop
        self._loads: list[Tensor] = []
        self._sums = torch.zeros(0)
        self._random_state: Tensor | None = None
        self._prefetch: Prefetch | None = None
        self._probes: dict[str, tuple[list[Example], list[Question]]] = {}

    @property
    def data(self) -> TokenData:
        """The data module of the trainer."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        """Make the model, with the token compression of the data's tokenizer, and the questions of its mixture."""
        if hasattr(self, "model"):
            return
        config, data = self.model_config, self.data
        require(
            config.vocab_size == data.vocab_size,
            "model vocab_size",
            config.vocab_size,
            f"the data's, {data.vocab_size}",
        )
        seq_len = data.config.seq_len
        require(seq_len <= config.max_seq_len, "data.seq_len", seq_len, f"at most max_seq_len ({config.max_seq_len})")
        if config.memory is not None:
            for name in ("pad_id", "eos_id"):
                own, given = getattr(config.memory, name), getattr(data, name)
                require(own == given, f"memory.{name}", own, f"that of the tokenizer, {given}")
        compressor = data.compressor()
        name = data.config.tokenizer or f"BPE of {data.vocab_size} ids trained on {data.config.source}"
        self.tokenizer_identity = tokenizer_identity(data.tokenizer, name, compressor)
        self.lookup = compressor.lookup
        with torch.device("meta"):
            model = EngramLM(config, self.lookup)
        seed, device, mesh = torch.initial_seed(), self.trainer.strategy.root_device, self._mesh
        if mesh is None:
            materialize(model, device, seed)
        else:
            parallelize(model, mesh, device, seed)
            if self.trainer.strategy.parallel.prefetch:  # type: ignore[attr-defined]
                self._prefetch = Prefetch(model)
                data.look_ahead = True
        self.model = model
        # Now, as questions that the tokenizer can't tell from other text are refused: not after hours of training.
        for name, portion in data.config.portions().items():
            examples = portion.examples(data.config.probe_examples, data.config.mixture_seed)
            examples = [example for example in examples if not example.control]
            self._probes[name] = examples, questions_of(examples, data.tokenizer, data.eos_id)

    @property
    def _mesh(self) -> Mesh | None:
        """That of the trainer's strategy; None with one process, or another strategy."""
        return getattr(self.trainer.strategy, "mesh", None)

    @property
    def _n_ranks(self) -> int:
        return self.trainer.world_size

    def on_train_start(self) -> None:
        """Go on with the random numbers of the checkpoint, if training resumes from one."""
        if self._random_state is not None:
            torch.set_rng_state(self._random_state)

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Raises `SIGTERMException` when the step in which a rank was asked to stop is over."""
        if self.stopping_at is not None and self.global_step > self.stopping_at:
            raise SIGTERMException

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean loss of a batch in nats, auxiliary losses added; sets `stopping_at` if a rank was asked to stop.

        Raises `NonFiniteLossError` if the mean over all ranks is not finite.
        """
        ids, documents = batch["tokens"], batch["document_ids"]
        if self._prefetch is not None:
            self._prefetch.start(ids, documents, batch["next_tokens"], batch["next_document_ids"])
        output = self.model.run(ids, documents)
        loss = mean_loss(output.hidden, self.model.head_weight, batch["targets"])
        if self._prefetch is not None:
            self._prefetch.ask()
        of_all, asked = self._share(loss.detach())
        self._require_finite("training loss", of_all)
        if asked and self.stopping_at is None:
            self.stopping_at = self.global_step
        if output.routing:
            self._loads.append(torch.stack([stats.load_E for stats in output.routing]))
        self.log("train/loss", of_all, prog_bar=True)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log_dict(_measured(output), sync_dist=self._n_ranks > 1)
            self.log_dict({f"lr/{g['name']}": g["lr"] for g in self.trainer.optimizers[0].param_groups})
        return loss + sum((stats.aux_loss for stats in output.routing), loss.new_zeros(()))

    def _share(self, loss: Tensor) -> tuple[Tensor, bool]:
        """The mean of a loss over all ranks, and whether any of them was asked to stop: they must go on, or stop,
        together."""
        asked = getattr(self.trainer.strategy, "asked_to_stop", False)
        if self._n_ranks == 1:
            return loss, asked
        both = torch.stack([loss, loss.new_full((), float(asked))])
        torch.distributed.all_reduce(both)
        return both[0] / self._n_ranks, bool(both[1])

    def _require_finite(self, what: str, value: Tensor) -> None:
        # Asked before the weights move, so that no checkpoint can hold what is broken; a device waits for the answer.
        if not torch.isfinite(value):
            raise NonFiniteLossError(f"{what} is {value.item()} at step {self.global_step}, {self._name_batch()}")

    def _name_batch(self) -> str:
        """Which windows of the data the current batch holds, for a message."""
        number = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1
        size = self.data.config.batch_size
        samples = np.arange(number * size, (number + 1) * size)
        windows = sample_windows(samples, self.data.n_train_windows, self.data.config.seed)
        return f"batch {number} (windows {', '.join(map(str, windows))} of the training split)"

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, then move the routers' biases against the loads of all micro-batches and ranks of this step."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if not self._loads:
            return
        load = torch.stack(self._loads).sum(0)
        self._loads.clear()
        if self._n_ranks > 1:
            torch.distributed.all_reduce(load)
        for layer, load_E in zip(self.model.moe_layers(), load, strict=True):
            layer.update_balance(load_E)

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm, row-sparse gradients included; Lightning's flag wins over `optim.clip`."""
        bound = self.optim_config.clip if gradient_clip_val is None else float(gradient_clip_val)
        norm = clip_gradients(self, bound)
        self._require_finite("gradient norm", norm)
        self.log("train/grad_norm", norm)

    def configure_optimizers(self) -> Any:
        """The optimiser of `OptimConfig`, with a schedule for each of its groups."""
        optimizer = build_optimizer(self.model, self.optim_config)
        total = self.trainer.max_steps
        require(total > 0, "trainer.max_steps", total, "1 or more (schedules need the length of the run)")
        schedules = [self._schedule(group["schedule"], total) for group in optimizer.param_groups]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedules)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _schedule(self, name: str, total: int) -> Callable[[int], float]:
        own = getattr(self.optim_config, name) or self.optim_config.schedule
        return partial(multiplier, own, total=total)

    def on_validation_epoch_start(self) -> None:
        """Start the sums: nats, tokens and bytes of each domain, and of new and of repeated pairs of tokens."""
        self._sums = torch.zeros(len(self.data.domains) + 2, 3, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch's losses to the sums."""
        output = self.model.run(batch["tokens"], batch["document_ids"])
        nats = token_losses(output.hidden, self.model.head_weight, batch["targets"]).double()
        kinds = (batch["domains"], len(self.data.domains) + batch["repeated"])
        for column, values in enumerate((nats, torch.ones_like(nats), batch["target_bytes"].double())):
            for kind in kinds:
                self._sums[:, column].index_add_(0, kind.flatten(), values.flatten())

    def on_validation_epoch_end(self) -> None:
        """Log nats a token and bits a byte, in total, by domain, and for new and repeated pairs of tokens; and what the
        model knows of the mixture's tasks."""
        if self._n_ranks > 1:
            torch.distributed.all_reduce(self._sums)
        domains = self.data.domains
        named = {"": self._sums[: len(domains)].sum(0)}
        named |= {f"_{name}": sums for name, sums in zip((*domains, "new", "repeated"), self._sums, strict=True)}
        values = {}
        for name, (nats, tokens, n_bytes) in named.items():
            if tokens:
                values[f"val/nats{name}"] = (nats / tokens).float()
                values[f"val/bits_per_byte{name}"] = (nats / torch.log(torch.tensor(2.0)) / n_bytes).float()
        values |= self._probe()
        self.log_dict(values, prog_bar=False)

    def _probe(self) -> dict[str, Tensor]:
        """Of each task of the mixture the share of right answers, and nats an answer, controls left out."""
        data, trainer = self.data, self.trainer
        values = {}
        for name, (examples, questions) in self._probes.items():
            size = -(-data.config.batch_size // self._n_ranks)
            with trainer.precision_plugin.forward_context():
                answers = ask(self.model, questions, size, rank=trainer.global_rank, n_ranks=self._n_ranks)
            found = score(examples, answers)
            values[f"val/probe_{name}"] = torch.tensor(found.accuracy)
            values[f"val/probe_nats_{name}"] = torch.tensor(found.nats)
        return values

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what a checkpoint must match, the configs and the tokenizer, which also go to the trained model, and the
        random state."""
        checkpoint["model_config"] = self.model_config.to_dict()
        checkpoint["optim_config"] = dataclasses.asdict(self.optim_config)
        checkpoint["tokenizer"] = self.tokenizer_identity
        checkpoint["tokenizer_json"], checkpoint["token_lookup"] = self.data.tokenizer.to_str(), self.lookup
        checkpoint["random_state"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises `ConfigError` for a checkpoint of another tokenizer, model or, when training goes on, optimiser."""
        require_same_tokenizer(self.tokenizer_identity, checkpoint["tokenizer"])
        saved, own = checkpoint["model_config"], self.model_config.to_dict()
        if saved != own:
            raise ConfigError(f"the checkpoint holds another model: {_first_difference(saved, own)}")
        own = dataclasses.asdict(self.optim_config)
        saved = checkpoint.get("optim_config", own)  # older checkpoints lack it
        if saved != own and self.trainer.state.fn == TrainerFn.FITTING:
            raise ConfigError(f"the checkpoint was trained differently: {_first_difference(saved, own, 'optim.')}")
        self._random_state = checkpoint["random_state"].clone()


def _measured(output: ModelOutput) -> dict[str, Tensor]:
    """Means of the gates by block, and of each expert layer the largest load over the mean and the entropy in nats."""
    values = {f"gate/block_{layer}": gates.detach().float().mean() for layer, gates in output.gates.items()}
    for i, stats in enumerate(output.routing):
        load = stats.load_E.float()
        values[f"experts/{i}_max_load"] = load.max() / load.mean()
        values[f"experts/{i}_entropy"] = stats.entropy
        values[f"experts/{i}_dropped"] = torch.tensor(float(stats.dropped))
    return values


def merged(settings: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`settings` with those of `overrides` in their places, mappings joined key by key; `a.b` is b inside a.

    Text is read as YAML: a flag's value comes as text where the file holds overrides too.
    """
    result = dict(settings)
    for key, value in overrides.items():
        first, _, rest = key.partition(".")
        inner = {rest: value} if rest else _read(value)
        own = result.get(first)
        result[first] = merged(own if isinstance(own, dict) else {}, inner) if isinstance(inner, dict) else inner
    return result


def _read(value: Any) -> Any:
    try:
        return get_loader("yaml")(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        return value


def _first_difference(saved: dict[str, Any], own: dict[str, Any], where: str = "") -> str:
    for key in saved:
        a, b = saved[key], own.get(key)
        if isinstance(a, dict) and isinstance(b, dict) and a != b:
            return _first_difference(a, b, f"{where}{key}.")
        if a != b:
            return f"{where}{key} is {b!r}, the checkpoint's is {a!r}"
    return "it lacks settings of the config"
