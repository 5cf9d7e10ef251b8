"""Muon on matrices cut over processes moves each as in one process, whoever works on it."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from world import World

from engram.training.optim import BatchedMuon
from engram.training.optim.sharded_muon import ShardedMuon

# Rows that 4 processes can't share evenly, fewer rows than processes, a stack of which some hold no matrix.
SHAPES = [(24, 32), (3, 20), (32, 24), (24, 32), (17, 9), (5, 6, 8)]


def drawn(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def moved(rank: int, n: int) -> tuple[list[Tensor], list[Tensor]]:
    """Weights after three steps here alone, and spread over (2 copies) x (n / 2 shards), put together."""
    mesh = init_device_mesh("cpu", (2, n // 2))
    alone = [nn.Parameter(weight) for weight in drawn(0)]
    spread = [nn.Parameter(distribute_tensor(weight, mesh, [Replicate(), Shard(0)])) for weight in drawn(0)]
    pairs = [(alone, BatchedMuon(alone, lr=0.02)), (spread, ShardedMuon(spread, lr=0.02))]
    for step in range(3):
        for weights, optimizer in pairs:
            for weight, gradient in zip(weights, drawn(1 + step), strict=True):
                if weights is spread:
                    gradient = distribute_tensor(gradient, mesh, [Replicate(), Shard(0)])
                weight.grad = gradient
            optimizer.step()
    dist.barrier()
    return [w.detach() for w in alone], [w.detach().full_tensor() for w in spread]


def test_each_matrix_moves_as_in_one_process(world_of: Callable[[int], World]) -> None:
    for alone, spread in world_of(4).run(moved):
        for own, put_together, start in zip(alone, spread, drawn(0), strict=True):
            torch.testing.assert_close(put_together, own, atol=2e-6, rtol=0)
            assert (own - start).abs().max() > 0.01
