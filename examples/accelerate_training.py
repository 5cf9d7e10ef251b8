"""A user's own training loop with `accelerate`, on any number of processes: the same model comes out.

    python examples/accelerate_training.py
    ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 examples/accelerate_training.py

Dense parameters are DistributedDataParallel's, each process has its rows of the memory tables, and what is trained goes
to a folder that `engram.training.weights.load_model` reads, and `big_model_inference.py` too. The text is this
package's documentation, and its tokens are bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from torch.utils.data import DataLoader

from engram import EngramLM, GQAConfig, MemoryConfig, ModelConfig, MoEConfig
from engram.backbone import mean_loss
from engram.parallel.apply import shard_tables
from engram.parallel.checkpoint import CheckpointWriter
from engram.parallel.config import ParallelConfig
from engram.parallel.mesh import Mesh
from engram.training.optim import OptimConfig, build_optimizer, clip_gradients
from engram.training.schedule import multiplier
from engram.training.weights import save_checkpoints_model

MODEL = ModelConfig(
    vocab_size=256,
    d_model=64,
    n_layers=3,
    dense_width=160,
    attention=GQAConfig(n_heads=4, n_kv_heads=2, head_dim=16),
    experts=MoEConfig(n_experts=8, top_k=2, width=32, shared_width=32),
    memory=MemoryConfig(layers=(1,), n_heads=2, row_width=16, rows=(4000, 4000), compress=False),
)
OPTIM = OptimConfig(lr=1e-3, matrix_optimizer="adamw")
T = 128


class NextByte(nn.Module):
    """What is trained. Its `forward` is all that DistributedDataParallel sees to, so the loss is computed in it."""

    def __init__(self, model: EngramLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Bytes `[B, T + 1]` -> mean loss in nats, and the loads of the experts, `[layers, E]`."""
        output = self.model.run(windows[:, :-1])
        loss = mean_loss(output.hidden, self.model.head_weight, windows[:, 1:])
        loss = loss + sum(stats.aux_loss for stats in output.routing)
        return loss, torch.stack([stats.load_E for stats in output.routing])


def windows_of_text() -> Tensor:
    """Bytes `[n, T + 1]` of README and docs; each window begins with the last byte of the one before."""
    root = Path(__file__).resolve().parents[1]
    text = b"".join(path.read_bytes() for path in [root / "README.md", *sorted(root.glob("docs/*.md"))])
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long().unfold(0, T + 1, T)


def main(steps: int, folder: Path) -> None:
    # Batches are split, not multiplied: the loader's 16 windows are one step's, on however many processes.
    accelerator = Accelerator(
        gradient_accumulation_steps=2, dataloader_config=DataLoaderConfiguration(split_batches=True)
    )
    torch.manual_seed(0)  # all processes start from the same model
    to_train = NextByte(EngramLM(MODEL))
    if accelerator.num_processes > 1:
        shard_tables(to_train, Mesh.of(ParallelConfig(), accelerator.device.type))
    optimizer = build_optimizer(to_train.model, OPTIM)
    schedules = [lambda step: multiplier(OPTIM.schedule, step, total=steps)] * len(optimizer.param_groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedules)
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(windows_of_text(), batch_size=16, shuffle=True, generator=order, drop_last=True)
    to_train, optimizer, loader, scheduler = accelerator.prepare(to_train, optimizer, loader, scheduler)

    step, loads = 0, []
    while step < steps:
        for windows in loader:
            with accelerator.accumulate(to_train):
                loss, load = to_train(windows)
                accelerator.backward(loss)
                loads.append(load)
                if accelerator.sync_gradients:
                    clip_gradients(to_train, OPTIM.clip)  # accelerator.clip_grad_norm_ knows no spread tables
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step += 1
                # Routers are balanced by the loads of all micro-batches and processes, so that they stay the same.
                total = accelerator.reduce(torch.stack(loads).sum(0))
                loads.clear()
                for layer, load_E in zip(model_of(accelerator, to_train).moe_layers(), total, strict=True):
                    layer.update_balance(load_E)
                accelerator.print(f"step {step}: {accelerator.reduce(loss.detach(), 'mean'):.4f} nats")
            if step == steps:
                break
    save(accelerator, model_of(accelerator, to_train), folder)


def model_of(accelerator: Accelerator, prepared: nn.Module) -> EngramLM:
    return accelerator.unwrap_model(prepared).model


def save(accelerator: Accelerator, model: EngramLM, folder: Path) -> None:
    """Each process writes its part; the first one makes one model of them. (`accelerator.save_state` would write the
    first one's rows alone.)"""
    run = {"model_config": MODEL.to_dict(), "token_lookup": None, "tokenizer_json": None}
    CheckpointWriter().save(folder / "checkpoint", model, [], run)
    if accelerator.is_main_process:
        print(f"trained model in {save_checkpoints_model(folder / 'checkpoint', folder / 'model')}")
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--folder", type=Path, default=Path("runs/accelerate"), help="where checkpoint and model go")
    main(**vars(parser.parse_args()))
