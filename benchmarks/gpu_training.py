"""Training a whole hybrid on one CUDA device: its share of the dense bfloat16 rate, eager and compiled.

Two models under bfloat16 autocast: one whose every token uses 1B parameters (16 blocks of 2048 channels, 24 experts of
which it uses 6, two memories of 0.5B rows each), and `configs/models/base.yaml`. An optimiser step follows several
micro-batches, as the batches that such models train on need on one device; its time counts. Rates count 6 FLOPs for
each multiply-add of the forward pass, scores of attention for the positions that a token sees; norms, activations and
everything recomputed count nothing. `python benchmarks/gpu_training.py`
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import dense_rate, gpu_hardware, store
from torch import Tensor

from engram.backbone import EngramLM, mean_loss
from engram.backbone.initialize import materialize
from engram.budget import ParameterBudget
from engram.config import ModelConfig, load_yaml
from engram.training.environment import prepare_process
from engram.training.optim import OptimConfig, build_optimizer, clip_gradients

CONFIGS = Path(__file__).parent.parent / "configs" / "models"
HYBRID: dict[str, Any] = {
    "vocab_size": 32_768,
    "d_model": 2048,
    "n_layers": 16,
    "n_dense_layers": 1,
    "dense_width": 8192,
    "max_seq_len": 4096,
    "attention": {"kind": "gqa", "n_heads": 16, "n_kv_heads": 4, "head_dim": 128},
    "experts": {"n_experts": 24, "top_k": 6, "width": 1024, "shared_width": 1024, "score": "sigmoid"},
    "memory": {
        "layers": [1, 7], "orders": [2, 3], "n_heads": 8, "row_width": 64, "rows": [500_000, 500_000],
        "table_dtype": "bfloat16", "compress": False,
    },
}  # fmt: skip
Loss = Callable[[EngramLM, Tensor, Tensor | None], Tensor]
OPTIM = OptimConfig(matrix_optimizer="adamw", lr=3e-4, table_beta1=0.0, table_second_moment="row")


def models() -> dict[str, ModelConfig]:
    """What is trained, by name."""
    base = ModelConfig.from_dict(load_yaml(CONFIGS / "base.yaml"))
    memory = replace(base.memory, compress=False) if base.memory else None
    return {"1B active": ModelConfig.from_dict(HYBRID), "base": replace(base, memory=memory)}


def training_flops(config: ModelConfig, T: int, document: int) -> float:
    """FLOPs of a token's training, with attention's scores for the positions that a token sees on average."""
    attention: Any = config.attention
    scores = 3 * 2 * 2 * attention.n_heads * attention.head_dim * config.n_layers  # for each position
    seen = min(document or T, T / 2)  # where documents end at random, as many lie behind a token as one is long
    return float(ParameterBudget.of(config, T).training_flops - scores * (T - seen))


class Trainer:
    """Steps on random text by Zipf's law, documents of which are packed into rows if `document` says how long."""

    def __init__(self, config: ModelConfig, shape: tuple[int, int], document: int) -> None:
        self.shape, self.document = shape, document
        self.device = torch.device("cuda")
        with torch.device("meta"):
            self.model = EngramLM(config)
        materialize(self.model, self.device, 0)
        self.optimizer = build_optimizer(self.model, OPTIM)
        self.weights = 1 / torch.arange(1.0, config.vocab_size + 1, device=self.device)
        self.loss_of: Loss = loss_of

    def compile(self) -> None:
        """Go on in compiled code."""
        self.loss_of = torch.compile(loss_of, fullgraph=True, dynamic=False)

    def draw(self) -> tuple[Tensor, Tensor | None]:
        """Ids `[B, T + 1]`, and documents `[B, T]`."""
        B, T = self.shape
        ids = torch.multinomial(self.weights, B * (T + 1), replacement=True).view(B, T + 1)
        if not self.document:
            return ids, None
        return ids, (torch.rand(B, T, device=self.device) < 1 / self.document).long().cumsum(1)

    def step(self, micro_batches: int) -> Tensor:
        """Forward and backward of each, and an update; the loss of the last."""
        for _ in range(micro_batches):
            loss = self.loss_of(self.model, *self.draw())
            loss.backward()
        clip_gradients(self.model, OPTIM.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def loss_of(model: EngramLM, ids: Tensor, documents: Tensor | None) -> Tensor:
    """Of ids `[B, T + 1]`, under autocast."""
    with torch.autocast("cuda", torch.bfloat16):
        return mean_loss(model.run(ids[:, :-1], documents).hidden, model.head_weight, ids[:, 1:])


def measure(trainer: Trainer, micro_batches: int, rounds: int) -> dict[str, float]:
    """Median seconds of a step, after one short one that warms up; the last loss; and the most memory held."""
    torch.cuda.reset_peak_memory_stats()
    trainer.step(2)
    seconds = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = trainer.step(micro_batches)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated()
    return {"step_s": statistics.median(seconds), "loss": float(loss), "peak_bytes": float(peak)}


def profile(trainer: Trainer) -> str:
    """Where a micro-batch and an update spend the device's time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    trainer.step(1)
    torch.cuda.synchronize()
    with profiler(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        trainer.step(1)
        torch.cuda.synchronize()
    return str(found.key_averages().table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=90))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=models(), default=list(models()))
    parser.add_argument("--shape", type=int, nargs=2, default=(8, 2048), help="B and T of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=16, help="to an optimiser step")
    parser.add_argument("--documents", type=int, nargs="+", default=(0, 512), help="mean lengths; 0: one to a row")
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=("eager", "compiled"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", help="write where the time goes to this file, and measure nothing")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: see training_speed.py for the CPU")
        return
    prepare_process()
    torch.manual_seed(0)
    rate, rows = dense_rate(), []
    machine = gpu_hardware()
    B, T = arguments.shape
    details = {"shape": [B, T], "micro_batches": arguments.micro_batches, "dense_flops_per_second": rate}
    print(f"{machine['gpu']}: {rate / 1e12:.0f} TFLOP/s in a dense bfloat16 product; {arguments.micro_batches} "
          f"micro-batches of {B} x {T} tokens to a step")  # fmt: skip
    print(f"{'model':>10} {'mode':>9} {'document':>9} {'tokens/s':>9} {'of rate':>8} {'step ms':>8} {'GiB':>6} "
          f"{'loss':>6}")  # fmt: skip
    for name in arguments.models:
        config = models()[name]
        for document in arguments.documents:
            flops = training_flops(config, T, document)
            trainer = Trainer(config, (B, T), document)
            if arguments.profile:
                Path(arguments.profile).write_text(profile(trainer))
                return
            for mode in arguments.modes:
                if mode == "compiled":
                    trainer.compile()
                found = measure(trainer, arguments.micro_batches, arguments.rounds)
                tokens_per_s = arguments.micro_batches * B * T / found["step_s"]
                of_rate = tokens_per_s * flops / rate
                print(f"{name:>10} {mode:>9} {document:>9} {tokens_per_s:>9,.0f} {of_rate:>8.1%} "
                      f"{found['step_s'] * 1e3:>8.1f} {found['peak_bytes'] / 2**30:>6.1f} {found['loss']:>6.3f}",
                      flush=True)  # fmt: skip
                rows.append({"model": name, "mode": mode, "document": document, "tokens_per_s": tokens_per_s,
                             "of_rate": of_rate, "flops_per_token": flops, **found})  # fmt: skip
                store("gpu_training", {"hardware": machine, **details, "rows": rows})
            del trainer
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
