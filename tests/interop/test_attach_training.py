"""Attached memory in training: recomputed activations, the transformers Trainer, and peft on the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from attach_hosts import LAYERS, MEMORY, V, attached, host, some_ids
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from engram import ConfigError
from engram.inference import offload, offloaded_tables
from engram.interop import Attachment, attach, load_adapter
from engram.interop.trainer import MemoryTrainer, build_optimizer
from engram.training.optim import RowAdam


def gradients(attachment: Attachment) -> dict[str, Tensor]:
    found = {name: p.grad.to_dense().clone() for name, p in attachment.named_parameters() if p.grad is not None}
    attachment.zero_grad()
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_give_the_same_gradients(name: str, reentrant: bool) -> None:
    """Of two forward passes before one backward pass, so that a recomputation that took the other's ids would show."""
    model = host(name).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    attachment = attached(model)

    def both() -> dict[str, Tensor]:
        batches = some_ids(2, 9), some_ids(2, 12, seed=7)
        sum(model(ids, labels=ids, use_cache=False).loss for ids in batches).backward()
        return gradients(attachment)

    expected = both()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    runs: list[int] = []
    handle = model.base_model.get_submodule("h" if name == "gpt2" else "layers")[1]
    handle = next(handle.children()).register_forward_hook(lambda *_: runs.append(1))
    found = both()
    assert len(runs) == 4  # twice for each batch: it was recomputed
    assert found.keys() == expected.keys() == {name for name, _ in attachment.named_parameters()}
    for weight, gradient in expected.items():
        torch.testing.assert_close(found[weight], gradient, msg=weight)
    handle.remove()


def text() -> list[dict[str, Tensor]]:
    """Windows in which a token is told by the two before it, which need not be next to it in an embedding."""
    generator = torch.Generator().manual_seed(0)
    following = torch.randint(3, V, (V, V), generator=generator)
    ids = [5, 7]
    while len(ids) < 64 * 16:
        # One of a few ways on, so that each N-gram comes often.
        ids.append(int(following[ids[-2], ids[-1]]) % 12 + 3 if torch.rand((), generator=generator) < 0.9 else 9)
    windows = torch.tensor(ids).view(-1, 16)
    return [{"input_ids": window, "labels": window} for window in windows]


def settings(folder: Path, **options: Any) -> TrainingArguments:
    fixed = {"learning_rate": 1e-2, "max_grad_norm": 0.5, "per_device_train_batch_size": 8, "logging_steps": 1}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "lr_scheduler_type": "constant"}
    return TrainingArguments(str(folder), **{**fixed, **quiet, "save_strategy": "no", **options})


def small_host() -> PreTrainedModel:
    model = host()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.div_(4)
    return model


def trained(folder: Path, resume: str | None = None, **options: Any) -> tuple[PreTrainedModel, MemoryTrainer]:
    model = small_host()
    torch.manual_seed(4)
    attach(model, LAYERS, MEMORY)
    trainer = MemoryTrainer(model=model, args=settings(folder, **options), train_dataset=text())
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


def test_the_trainer_trains_the_memory_alone_with_clipped_gradients(tmp_path: Path) -> None:
    model, trainer = trained(tmp_path, max_steps=24)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert sum(losses[-4:]) / 4 < losses[0] - 0.5
    assert all(norm > 0 for norm in norms)
    assert max(norms) > 0.5
    for parameter, was in zip(
        trainer.attachment.model.model.parameters(), small_host().model.parameters(), strict=True
    ):
        assert torch.equal(parameter, was)
    tables = [g for g in trainer.optimizer.param_groups if g["params"][0] is model.engram.memory["0"].table.weight]
    assert [group["lr"] for group in tables] == [5e-2]


def test_gradients_are_clipped_to_their_norm_all_together(tmp_path: Path) -> None:
    model = small_host()
    attached(model)
    trainer = MemoryTrainer(model=model, args=settings(tmp_path), train_dataset=text())
    ids = some_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    dense = torch.cat([p.grad.to_dense().flatten() for p in model.engram.parameters()])
    norm = trainer.accelerator.clip_grad_norm_(model.parameters(), 0.01)
    torch.testing.assert_close(norm, dense.norm())
    after = torch.cat([p.grad.to_dense().flatten() for p in model.engram.parameters()])
    torch.testing.assert_close(after, dense * (0.01 / dense.norm()))


def test_a_run_resumed_from_a_checkpoint_ends_as_one_that_was_not_stopped(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole, _ = trained(tmp_path, **options)
    resumed, _ = trained(tmp_path / "other", str(tmp_path / "checkpoint-3"), **options)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_checkpoint_holds_model_and_memory_apart(tmp_path: Path) -> None:
    model, _ = trained(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    checkpoint = tmp_path / "checkpoint-2"
    assert set(load_file(checkpoint / "model.safetensors")) <= set(small_host().state_dict())
    again, ids = type(model).from_pretrained(checkpoint), some_ids(2, 9)
    load_adapter(again, checkpoint / "engram")
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)


def test_the_best_checkpoints_memory_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = small_host()
    attach(model, LAYERS, MEMORY)
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 6, "save_strategy": "steps"}
    # The loss falls, so that the first checkpoint is the best where a greater loss counts as better.
    args = settings(tmp_path, load_best_model_at_end=True, greater_is_better=True, **options)
    MemoryTrainer(model=model, args=args, train_dataset=text(), eval_dataset=text()[:8]).train()
    assert json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["best_global_step"] == 2
    best = load_file(tmp_path / "checkpoint-2" / "engram" / "engram.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in model.engram.state_dict().items())


def test_all_else_is_trained_and_resumed_around_frozen_rows_elsewhere(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    models = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model = small_host()
        offload(attached(model), "disk", folder=tmp_path / "tables")
        for table in offloaded_tables(model).values():
            table.requires_grad_(False)
        was = {name: tensor.clone() for name, tensor in model.engram.state_dict().items()}
        trainer = MemoryTrainer(model=model, args=settings(tmp_path, **options), train_dataset=text())
        trainer.train(resume_from_checkpoint=resume)
        learnt = {name for name, tensor in model.engram.state_dict().items() if not torch.equal(tensor, was[name])}
        assert learnt == {name for name, _ in model.engram.named_parameters()}
        models.append(model)
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(models[1].state_dict()[name], tensor), name


def test_the_memory_of_a_model_that_the_trainer_makes_is_saved_resumed_and_the_best_of_its_run(tmp_path: Path) -> None:
    def made() -> PreTrainedModel:
        model = small_host()
        torch.manual_seed(4)
        attach(model, LAYERS, MEMORY)
        return model

    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    args = settings(tmp_path, load_best_model_at_end=True, greater_is_better=True, **options)
    trainer = MemoryTrainer(model_init=made, args=args, train_dataset=text(), eval_dataset=text()[:8])
    trainer.train()
    assert trainer.attachment is trainer.model.engram
    first, last = (load_file(tmp_path / f"checkpoint-{n}" / "engram" / "engram.safetensors") for n in (2, 4))
    sizes = [float(some["memory.0.table.weight"].abs().sum()) for some in (first, last)]
    assert 0 < sizes[0] < sizes[1]
    assert all(torch.equal(tensor, first[name]) for name, tensor in trainer.model.engram.state_dict().items())

    trainer.args.load_best_model_at_end = False
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(tensor, last[name]) for name, tensor in trainer.model.engram.state_dict().items())


def test_weights_decay_as_the_trainers_do_but_for_tables(tmp_path: Path) -> None:
    model = small_host()
    attach(model, LAYERS, MEMORY, freeze_backbone=False)
    trainer = MemoryTrainer(model=model, args=settings(tmp_path, weight_decay=0.1), train_dataset=text())
    groups = trainer.create_optimizer().param_groups
    decayed = {p for group in groups if group.get("weight_decay") for p in group["params"]}
    found = {name for name, parameter in model.named_parameters() if parameter in decayed}
    assert found == {name for name in trainer.get_decay_parameter_names(model) if "table" not in name}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_an_optimizer_that_the_memory_does_not_get_is_refused(tmp_path: Path) -> None:
    model = small_host()
    attached(model)
    for options, given, message in (
        ({"optim": "sgd"}, {}, "optim is 'sgd': allowed is one of adamw_torch, adamw_torch_fused"),
        ({}, {"optimizer_cls_and_kwargs": (torch.optim.SGD, {})}, "optimizer_cls_and_kwargs is 'SGD': allowed is none"),
    ):
        trainer = MemoryTrainer(model=model, args=settings(tmp_path, **options), train_dataset=text(), **given)
        with pytest.raises(ConfigError, match=message):
            trainer.create_optimizer()
    own, args = build_optimizer(model, 1e-3), settings(tmp_path, optim="sgd")
    trainer = MemoryTrainer(model=model, args=args, train_dataset=text(), optimizers=(own, None))
    assert trainer.create_optimizer() is own


def test_a_trainer_without_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="models with memory is 0"):
        MemoryTrainer(model=host(), args=settings(tmp_path), train_dataset=text())


def test_training_on_more_than_one_device_is_refused(tmp_path: Path) -> None:
    model, args = host(), settings(tmp_path)
    attached(model)
    args._n_gpu = 2
    with pytest.raises(ConfigError, match="devices to train on is 2: allowed is one"):
        MemoryTrainer(model=model, args=args, train_dataset=text())


def test_an_optimizer_without_anything_to_move_is_refused() -> None:
    model = host()
    attached(model).requires_grad_(False)
    with pytest.raises(ConfigError, match="trainable parameters is 0"):
        build_optimizer(model, 1e-3)


LORA = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)


def with_lora(order: str) -> tuple[PeftModel, Attachment]:
    model = small_host()
    torch.manual_seed(4)
    if order == "memory first":
        attachment = attach(model, LAYERS, MEMORY)
        peft_model = get_peft_model(model, LORA)
        attachment.requires_grad_()
        return peft_model, attachment
    peft_model = get_peft_model(model, LORA)
    return peft_model, attach(peft_model if order == "lora first" else model, LAYERS, MEMORY)


@pytest.mark.parametrize("order", ["memory first", "lora first", "lora first, its model"])
def test_lora_and_memory_learn_together_are_saved_apart_and_come_off(order: str, tmp_path: Path) -> None:
    peft_model, attachment = with_lora(order)
    learns = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    assert {"engram" if "engram" in name else "lora" for name in learns} == {"engram", "lora"}
    assert all("engram" in name or "lora_" in name for name in learns)
    assert len(learns) == len(list(attachment.parameters())) + 2 * 2 * 3
    was = {name: parameter.detach().clone() for name, parameter in peft_model.named_parameters()}
    optimizer, ids = build_optimizer(peft_model, 1e-2), some_ids(4, 16)
    assert sum(isinstance(part, RowAdam) for part in optimizer.optimizers) == 1
    for _ in range(3):
        peft_model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in peft_model.named_parameters():
        assert torch.equal(parameter, was[name]) is (name not in learns), name
    peft_model.eval()
    with torch.no_grad():
        expected = peft_model(input_ids=ids).logits
    written = peft_model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, num_beams=2)
    uncached = peft_model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, num_beams=2, use_cache=False)
    assert torch.equal(written, uncached)

    peft_model.save_pretrained(tmp_path / "lora")
    attachment.save(tmp_path / "memory")
    assert all("lora_" in name for name in load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    again = PeftModel.from_pretrained(small_host(), tmp_path / "lora")
    load_adapter(again, tmp_path / "memory")
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(input_ids=ids).logits, expected)

    attachment.remove()
    plain = peft_model.unload()
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, small_host()(ids).logits)


def test_memory_that_peft_has_put_weights_into_is_not_saved(tmp_path: Path) -> None:
    model = small_host()
    attachment = attach(model, LAYERS, MEMORY)
    peft_model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    with pytest.raises(ConfigError, match=r"weights of the memory .*project\.base_layer\.weight.*exclude_modules"):
        attachment.save(tmp_path)
    peft_model.unload()
    attachment.save(tmp_path)
    load_adapter(small_host(), tmp_path)


def test_the_trainer_trains_lora_and_memory_and_keeps_both(tmp_path: Path) -> None:
    peft_model, attachment = with_lora("lora first")
    args = settings(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    MemoryTrainer(model=peft_model, args=args, train_dataset=text()).train()
    names = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert {"adapter_model.safetensors", "engram"} <= names
    assert "model.safetensors" not in names
    resumed, its = with_lora("lora first")
    trainer = MemoryTrainer(model=resumed, args=args, train_dataset=text())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in peft_model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    assert its is not attachment
