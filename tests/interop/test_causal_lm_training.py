"""EngramForCausalLM under the transformers Trainer: tables learn, experts are balanced, a run goes on where it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_causal_lm import CONFIG, LOOKUP, V
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from engram import ConfigError
from engram.interop.causal_lm import EngramConfig, EngramForCausalLM
from engram.interop.trainer import MemoryTrainer

SETTINGS = {
    **CONFIG,
    "experts": {"n_experts": 4, "top_k": 1, "width": 12, "bias_step": 0.01},
    "memory": {"layers": [1], "rows": [401, 401], "n_heads": 2, "row_width": 8},
}
WINDOWS = torch.randint(0, V, (16, 12), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": window, "labels": window} for window in WINDOWS]


def model_of() -> EngramForCausalLM:
    torch.manual_seed(1)
    return EngramForCausalLM(EngramConfig(**SETTINGS), LOOKUP)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    fixed = {"learning_rate": 1e-2, "max_grad_norm": 1.0, "per_device_train_batch_size": 8, "logging_steps": 1}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "lr_scheduler_type": "constant"}
    return TrainingArguments(str(folder), **{**fixed, **quiet, "save_strategy": "no", **options})


def test_the_trainer_learns_texts_by_heart_and_tables_with_them(tmp_path: Path) -> None:
    model = model_of()
    before = model.lm.memory["1"].table.weight.detach().clone()
    trainer = MemoryTrainer(model=model, args=arguments(tmp_path, num_train_epochs=15), train_dataset=DATA)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 1
    moved = (model.lm.memory["1"].table.weight.detach() != before).any(1)
    read = model.lm.memory["1"].reader(WINDOWS)[:, :-1].unique()  # nothing is predicted from the last tokens
    assert torch.equal(moved.nonzero().squeeze(1), read)


def test_routers_are_balanced_by_the_loads_of_all_micro_batches_of_a_step(tmp_path: Path) -> None:
    """Biases move by one step against each expert's load, counted here from the routers' own outputs."""
    model = model_of()
    loads: list[Tensor] = []
    run = model.lm.run

    def counted(*args: Any) -> Any:
        output = run(*args)
        loads.append(output.routing[0].load_E)
        return output

    model.lm.run = counted  # type: ignore[method-assign]
    options = {"max_steps": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    MemoryTrainer(model=model, args=arguments(tmp_path, **options), train_dataset=DATA).train()
    assert len(loads) == 2
    total = torch.stack(loads).sum(0).float()
    bias = model.lm.moe_layers()[0].router.bias
    assert torch.equal(bias.sign(), (total.mean() - total).sign())
    assert bias.abs().max() > 0


def test_routers_of_a_model_that_the_trainer_makes_are_balanced_too(tmp_path: Path) -> None:
    trainer = MemoryTrainer(model_init=model_of, args=arguments(tmp_path, max_steps=1), train_dataset=DATA)
    trainer.train()
    assert trainer.model.lm.moe_layers()[0].router.bias.abs().max() > 0


def test_losses_that_the_model_does_not_see_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"label_smoothing_factor is 0\.1: allowed is 0"):
        MemoryTrainer(model=model_of(), args=arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=DATA)

    def mean(outputs: Any, labels: Tensor, **_: Any) -> Tensor:
        return outputs.logits.float().mean()

    with pytest.raises(ConfigError, match=r"compute_loss_func is .*mean.*: allowed is none"):
        MemoryTrainer(model=model_of(), args=arguments(tmp_path), train_dataset=DATA, compute_loss_func=mean)


def test_a_resumed_run_ends_as_one_that_never_stopped(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 2

    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = model_of()
    MemoryTrainer(model=whole, args=arguments(tmp_path / "whole", **saving), train_dataset=DATA).train()
    args = arguments(tmp_path / "parts", **saving)
    MemoryTrainer(model=model_of(), args=args, train_dataset=DATA, callbacks=[Stop()]).train()
    resumed = model_of()
    MemoryTrainer(model=resumed, args=args, train_dataset=DATA).train(resume_from_checkpoint=True)
    assert resumed.state_dict().keys() == whole.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "parts" / "checkpoint-4")
    assert torch.equal(saved(WINDOWS[:2]).logits, whole.eval()(WINDOWS[:2]).logits)


def test_a_model_without_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="models with memory is 0"):
        MemoryTrainer(model=torch.nn.Linear(2, 2), args=arguments(tmp_path), train_dataset=DATA)
    assert issubclass(MemoryTrainer, Trainer)
