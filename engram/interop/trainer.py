"""Memory in the transformers Trainer, attached or a model's own: its optimiser, clipping of row-sparse gradients, and
its checkpoints.

Tables are moved by `RowAdam` at five times the learning rate and without weight decay, as in arXiv:2601.07372, section
4.1; all other trainable parameters, of the memory or of peft, by AdamW.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.training_args import OptimizerNames

from engram.config import require
from engram.interop.attachment import Attachment
from engram.interop.causal_lm import EngramForCausalLM
from engram.memory import MemoryTable, ReadOnlyTable
from engram.training.optim import RowAdam, Together, clip_gradients

FOLDER = "engram"  # of the memory, in a checkpoint's
_OPTIM = ("adamw_torch", "adamw_torch_fused")


def build_optimizer(
    model: nn.Module,
    lr: float,
    *,
    table_lr_factor: float = 5.0,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Together:
    """One optimiser over all trainable parameters of a model with memory.

    Tables get `lr * table_lr_factor`; `weight_decay` goes to what has two dimensions or more, tables and norms
    excepted. Raises `ConfigError` where nothing is trainable.
    """
    found = [m for m in model.modules() if isinstance(m, MemoryTable) and not isinstance(m, ReadOnlyTable)]
    tables = [table.weight for table in found if table.weight.requires_grad]
    held = set(tables)
    rest = {p: name for name, p in model.named_parameters() if p.requires_grad and p not in held}
    require(
        bool(tables or rest), "trainable parameters", 0, "some: `attachment.requires_grad_()` makes the memory's so"
    )
    optimizers: list[torch.optim.Optimizer] = []
    if rest:
        decayed = {p for p, name in rest.items() if p.ndim >= 2 and not name.endswith("_norm")}
        groups = [
            {"params": [p for p in rest if p in decayed], "weight_decay": weight_decay},
            {"params": [p for p in rest if p not in decayed], "weight_decay": 0.0},
        ]
        optimizers.append(torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps))
    if tables:
        optimizers.append(RowAdam(tables, lr * table_lr_factor, betas, eps))
    return Together(optimizers)


class MemoryTrainer(Trainer):
    """A `Trainer` for a model with memory attached, or for `EngramForCausalLM`, on one device; its arguments mean what
    they do there, and the optimiser is `build_optimizer`'s.

    Of attached memory a checkpoint has a folder of its own, `engram`, beside what the Trainer writes of the model
    (without the memory); `load_adapter` attaches it from there, and resuming goes on. Routers of `EngramForCausalLM`
    are balanced after each step. Mixed with another trainer it comes first: `class MemorySFTTrainer(MemoryTrainer,
    SFTTrainer)`.

    Args:
        table_lr_factor: learning rate of tables over that of the rest.

    Raises:
        ConfigError: a model without memory, or more than one device, whose row-sparse gradients would not be summed; an
            `optim` other than AdamW of torch (when training starts, unless an optimiser is given); of
            `EngramForCausalLM` label smoothing, as the Trainer would not shift its labels, and, with experts, another
            loss than its own, which balances them.
    """

    def __init__(self, *args: Any, table_lr_factor: float = 5.0, **kwargs: Any) -> None:
        self.table_lr_factor = table_lr_factor
        super().__init__(*args, **kwargs)
        modules = list(self._own_model().modules())
        attached = [module for module in modules if isinstance(module, Attachment)]
        own = [module for module in modules if isinstance(module, EngramForCausalLM)]
        found = len(attached) + len(own)
        require(found == 1, "models with memory", found, "one: EngramForCausalLM, or memory by `engram.interop.attach`")
        devices = self.args.world_size * max(self.args.n_gpu, 1)  # several in one process: DataParallel copies modules
        require(devices == 1, "devices to train on", devices, "one, for memory")
        if own:
            smoothing, loss = self.args.label_smoothing_factor, self.compute_loss_func
            require(smoothing == 0, "label_smoothing_factor", smoothing, "0 for EngramForCausalLM")
            allowed = "none: experts are balanced with the model's own loss"
            require(loss is None or not own[0].lm.moe_layers(), "compute_loss_func", loss, allowed)
            self.add_callback(_Balance())

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.clip_grad_norm_ = self._clip  # torch's own knows no norm of row-sparse gradients

    @property
    def attachment(self) -> Attachment | None:
        """The memory attached to the model, which `model_init` makes anew for each training."""
        return next((module for module in self._own_model().modules() if isinstance(module, Attachment)), None)

    def _own_model(self) -> nn.Module:
        return cast(nn.Module, self.model)

    def _clip(self, parameters: Any, max_norm: float, norm_type: float = 2.0) -> Tensor:
        self.accelerator.unscale_gradients()
        return clip_gradients(self._own_model(), 0.0 if max_norm == float("inf") else max_norm)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """`build_optimizer` with the settings of the training arguments, unless an optimiser was given."""
        if self.optimizer is None:
            args = self.args
            optim = OptimizerNames(args.optim).value
            require(optim in _OPTIM, "optim", optim, "one of " + ", ".join(_OPTIM))
            other = self.optimizer_cls_and_kwargs
            require(
                other is None, "optimizer_cls_and_kwargs", other and other[0].__name__, "none; optimizers are taken"
            )
            self.optimizer = build_optimizer(
                self._own_model() if model is None else model,
                args.learning_rate,
                table_lr_factor=self.table_lr_factor,
                weight_decay=args.weight_decay,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
            )
        return self.optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model as the Trainer does, and the memory beside it."""
        super().save_model(output_dir, _internal_call)
        if self.attachment is not None and self.args.should_save:
            self.attachment.save(Path(str(output_dir or self.args.output_dir)) / FOLDER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.attachment is not None:
            self.attachment.restore(Path(resume_from_checkpoint) / FOLDER)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.attachment is not None:
            self.attachment.restore(Path(str(self.state.best_model_checkpoint)) / FOLDER)


class _Balance(TrainerCallback):
    """Balances the routers of the model in training after each step."""

    def on_optimizer_step(self, *_: Any, **given: Any) -> None:
        for module in given["model"].modules():
            if isinstance(module, EngramForCausalLM):
                module.update_balance()
