"""One process through the code of many: tokens/s of training with a sharded table, rows fetched ahead and not.

A model of 12 blocks with a bfloat16 table at block 2, spread over a mesh of one process with NCCL (gloo without a GPU):
what exchange, owners and FSDP2 cost when nothing has to travel, and how much of it fetching ahead hides. On a GPU d is
1024 and the table has 30e9 parameters unless told otherwise, elsewhere 128 and 5e7. Of a row one number is kept.
`python benchmarks/sharded_table.py`
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from harness import Table, alternate, finish
from torch import Tensor

from engram.backbone import EngramLM, mean_loss
from engram.config import ModelConfig
from engram.parallel.apply import parallelize
from engram.parallel.config import ParallelConfig
from engram.parallel.mesh import Mesh
from engram.parallel.prefetch import Prefetch
from engram.training.environment import prepare_process
from engram.training.optim import OptimConfig, build_optimizer, clip_gradients

VOCAB, BLOCKS, WIDTH, HEADS = 32_768, 12, 160, 8
OPTIM = OptimConfig(table_beta1=0.0, table_second_moment="row")


def model_config(parameters: float, d_model: int) -> ModelConfig:
    """A dense backbone with about so many parameters in the table of one memory layer."""
    rows = int(parameters / WIDTH / HEADS / 2)
    memory = {"layers": [1], "rows": [rows, rows], "row_width": WIDTH, "n_heads": HEADS, "table_dtype": "bfloat16"}
    return ModelConfig.from_dict(
        {
            "vocab_size": VOCAB,
            "d_model": d_model,
            "n_layers": BLOCKS,
            "n_dense_layers": BLOCKS,
            "dense_width": 4 * d_model,
            "attention": {"kind": "gqa", "n_heads": 16, "n_kv_heads": 4, "head_dim": 64},
            "memory": {**memory, "compress": False},
        }
    )


class Trainer:
    """Training steps on batches by Zipf's law; with `ahead` the rows of each are fetched ahead."""

    def __init__(self, model: EngramLM, device: torch.device, shape: tuple[int, int]) -> None:
        self.model, self.device, self.shape = model, device, shape
        self.optimizer = build_optimizer(model, OPTIM)
        self.weights = 1 / torch.arange(1.0, VOCAB + 1, device=device)
        self.prefetch, self.following = Prefetch(model), self.draw()

    def draw(self) -> Tensor:
        """Ids `[B, T + 1]`."""
        B, T = self.shape
        return torch.multinomial(self.weights, B * (T + 1), replacement=True).view(B, T + 1)

    def ahead(self, _: object) -> None:
        """A step whose rows were asked for in the step before."""
        now, self.following = self.following, self.draw()
        self.prefetch.start(now[:, :-1], None, self.following[:, :-1], None)
        self._step(now)

    def plain(self, _: object) -> None:
        """A step that fetches its rows when it reads them."""
        self.model.eval()  # which reads nothing that is prepared
        self._step(self.draw())
        self.model.train()

    def _step(self, ids: Tensor) -> None:
        with torch.autocast(self.device.type, torch.bfloat16):
            hidden = self.model.run(ids[:, :-1]).hidden
            loss = mean_loss(hidden, self.model.head_weight, ids[:, 1:])
        if self.model.training:
            self.prefetch.ask()
        loss.backward()
        clip_gradients(self.model, OPTIM.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--parameters", type=float, default=3e10 if on_gpu else 5e7, help="of the table")
    parser.add_argument("--shape", type=int, nargs=2, default=(16, 2048) if on_gpu else (2, 128), help="B and T")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    arguments = parser.parse_args()
    prepare_process()
    torch.manual_seed(0)
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, f"file://{Path(folder) / 'store'}", rank=0, world_size=1)
        with torch.device("meta"):
            model = EngramLM(model_config(arguments.parameters, 1024 if on_gpu else 128))
        parallelize(model, Mesh.of(ParallelConfig(), device.type), device)
        trainer = Trainer(model, device, tuple(arguments.shape))
        table = Table(
            "A training step through the parallel code, one process", ["table", "B", "T"], ["ahead", "when read"]
        )
        sides = {"ahead": trainer.ahead, "when read": trainer.plain}
        seconds = alternate(sides, lambda: None, rounds=7 if arguments.quick else 21, budget_s=60.0)
        table.add((f"{arguments.parameters:.0e}", *arguments.shape), seconds)
        tokens = arguments.shape[0] * arguments.shape[1]
        rates = {name: tokens / value for name, value in seconds.items() if isinstance(value, float)}
        print({name: f"{rate:,.0f} tokens/s" for name, rate in rates.items()})
        finish(
            "sharded_table", [table], device=str(torch.cuda.get_device_name() if on_gpu else "cpu"), tokens_per_s=rates
        )
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
