"""The whole model through torch.compile's own code generator: one graph for every length, and the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engram.backbone import EngramLM, mean_loss
from engram.config import ModelConfig

V = 61


def model(branches: int = 1) -> EngramLM:
    torch.manual_seed(0)
    config = ModelConfig.from_dict(
        {
            "vocab_size": V,
            "d_model": 16,
            "n_layers": 2,
            "dense_width": 32,
            "max_seq_len": 64,
            "branches": branches,
            "attention": {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8},
            "experts": {"n_experts": 5, "top_k": 2, "width": 8, "shared_width": 8},
            "memory": {"layers": [1], "orders": [2, 3], "n_heads": 2, "row_width": 4, "rows": [50, 50]},
        }
    )
    return EngramLM(config, torch.arange(V))


def gradients(m: EngramLM) -> dict[str, Tensor]:
    found = {}
    for name, p in m.named_parameters():
        assert p.grad is not None, name
        found[name] = p.grad.to_dense().clone()
        p.grad = None
    return found


ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]


@pytest.mark.parametrize("branches", [1, 4])
@pytest.mark.parametrize("device", DEVICES)
def test_one_compiled_graph_serves_every_length_and_routing(device: str, branches: int) -> None:
    m = model(branches).to(device)

    def loss_of(ids: Tensor, documents: Tensor, targets: Tensor) -> Tensor:
        return mean_loss(m.run(ids, documents).hidden, m.head_weight, targets)

    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True)
    for T in (24, 24, 17, 64, 9):
        ids, targets = torch.randint(0, V, (2, 3, T), device=device)
        documents = (torch.rand(3, T, device=device) < 0.1).long().cumsum(1)
        results = []
        for compute in (compiled, loss_of):
            loss = compute(ids, documents, targets)
            loss.backward()
            results.append((loss.detach(), gradients(m)))
        (loss, got), (expected, wanted) = results
        torch.testing.assert_close(loss, expected)
        for name in wanted:
            torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-6, msg=lambda s, n=name: f"{n}: {s}")
    assert graphs["unique_graphs"] - before == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("branches", [1, 4])
def test_compiled_and_eager_losses_agree_under_autocast_on_a_gpu(branches: int) -> None:
    m = model(branches).cuda()

    def loss_of(ids: Tensor, documents: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return mean_loss(m.run(ids, documents).hidden, m.head_weight, targets)

    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True)
    for T in (24, 64, 9):
        ids, targets = torch.randint(0, V, (2, 3, T), device="cuda")
        documents = (torch.rand(3, T, device="cuda") < 0.1).long().cumsum(1)
        results = []
        for compute in (compiled, loss_of):
            loss = compute(ids, documents, targets)
            loss.backward()
            results.append((loss.detach(), gradients(m)))
        (loss, got), (expected, wanted) = results
        torch.testing.assert_close(loss, expected, rtol=2e-3, atol=0)
        for name in wanted:
            size = wanted[name].norm()
            assert (got[name] - wanted[name]).norm() <= 0.05 * size + 1e-6, name


def test_two_equal_readings_of_a_table_both_count() -> None:
    """A compiler that took the two gradients for one would halve what the rows get."""
    table = model().memory["1"].table
    rows = torch.tensor([[1, 2], [2, 3]])

    def twice(rows: Tensor) -> Tensor:
        return (table(rows) + table(rows)).sum()

    torch.compile(twice, fullgraph=True)(rows).backward()
    compiled, table.weight.grad = table.weight.grad.to_dense(), None
    twice(rows).backward()
    torch.testing.assert_close(compiled, table.weight.grad.to_dense())
