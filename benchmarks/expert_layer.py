"""The expert layer against transformers' expert implementations, a plain loop and a dense product of the same FLOPs.

Same weights, same routing: a random router on clustered tokens, so that loads differ by several times, and fresh tokens
for each call, as in training. (With one batch again and again, oneDNN's products for its row counts would be built
once, which favours those that do not pad.) `dense` multiplies as many rows by one expert's two matrices, which no layer
of experts can be much faster than: 0.5x says that ours takes twice as long. `python benchmarks/expert_layer.py`
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import MEMORY_LIMIT, Side, Table, alternate, finish
from torch import Tensor, nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from engram import MoE, MoEConfig
from engram.experts.grouped import grouped_swiglu
from engram.training.environment import prepare_process

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
CLUSTERS_PER_EXPERT = 2
BATCHED_LIMIT = MEMORY_LIMIT // 2


class Size(NamedTuple):
    """One case: E experts of width F on hidden states of width D, K for each token, `group` rows each on average."""

    D: int
    F: int
    E: int
    K: int
    group: int
    dtype: torch.dtype = torch.float32

    @property
    def tokens(self) -> int:
        return self.group * self.E // self.K

    @property
    def batched_bytes(self) -> int:
        """What `batched_mm` copies: the matrices of its expert for each row, and as much again in backward."""
        return 2 * self.tokens * self.K * 3 * self.D * self.F * self.dtype.itemsize


SIZES = (
    Size(64, 32, 64, 4, 16),
    Size(64, 32, 64, 4, 256),
    Size(64, 32, 128, 8, 64),
    Size(96, 48, 64, 4, 256),  # the default sweep's model
    Size(128, 64, 16, 2, 256),
    Size(128, 64, 128, 8, 16),
    Size(128, 64, 128, 8, 256),
    Size(256, 128, 8, 2, 1024),
    Size(256, 128, 32, 4, 16),
    Size(256, 128, 32, 4, 256),
    Size(256, 128, 128, 8, 64),
    Size(512, 256, 16, 2, 64),
    Size(512, 256, 16, 2, 1024),
    Size(512, 256, 64, 8, 256),
    Size(1024, 512, 8, 2, 256),
    Size(1024, 512, 8, 2, 1024),
    Size(1024, 512, 32, 4, 64),
    Size(1024, 512, 32, 4, 256),
    Size(1024, 512, 128, 8, 16),
)
QUICK = (Size(64, 32, 64, 4, 16), Size(96, 48, 64, 4, 256), Size(512, 256, 16, 2, 64))


class Batch(NamedTuple):
    """Tokens that want a gradient, their experts with weights, and the gradient of the output."""

    x_ND: Tensor
    experts_NK: Tensor
    weights_NK: Tensor
    grad_ND: Tensor


class Tokens:
    """Tokens around cluster centres, some clusters far more frequent than others."""

    def __init__(self, size: Size, router_ED: Tensor) -> None:
        self.size, self.router_ED = size, router_ED.float()
        C = CLUSTERS_PER_EXPERT * size.E
        self.centres_CD = torch.randn(C, size.D)
        self.frequency_C = torch.arange(1, C + 1) ** -0.8

    @torch.no_grad()
    def draw(self) -> Batch:
        """A fresh batch with its routing."""
        N, D = self.size.tokens, self.size.D
        near = self.centres_CD[torch.multinomial(self.frequency_C, N, replacement=True)]
        x = ((near + 0.5 * torch.randn(N, D)) / 1.25**0.5).to(self.size.dtype)
        probabilities, experts = F.linear(x.float(), self.router_ED).softmax(-1).topk(self.size.K)
        weights = (probabilities / probabilities.sum(-1, keepdim=True)).to(x.dtype)
        return Batch(x.requires_grad_(), experts, weights.requires_grad_(), torch.randn_like(x))


def their_blocks(
    size: Size, ours: MoE, implementations: Sequence[str] = IMPLEMENTATIONS
) -> dict[str, OlmoeSparseMoeBlock]:
    """OLMoE's block on our weights, with each of transformers' ways to multiply."""
    blocks: dict[str, OlmoeSparseMoeBlock] = {}
    for implementation in implementations:
        config = OlmoeConfig(
            hidden_size=size.D,
            intermediate_size=size.F,
            num_experts=size.E,
            num_experts_per_tok=size.K,
            norm_topk_prob=True,
        )
        config._experts_implementation = implementation
        block = OlmoeSparseMoeBlock(config).to(size.dtype)
        if blocks:  # one set of weights for all three
            block.load_state_dict(next(iter(blocks.values())).state_dict(), assign=True)
        else:
            with torch.no_grad():
                block.gate.weight.copy_(ours.router.weight)
                block.experts.gate_up_proj.copy_(ours.experts.w_gate_up.mT)
                block.experts.down_proj.copy_(ours.experts.w_down.mT)
        blocks[implementation] = block
    return blocks


def our_experts(moe: MoE, batch: Batch) -> Tensor:
    """Ours, which wants the loads too; the others count for themselves."""
    chosen = batch.experts_NK.flatten()  # counted by a scatter, as the router does: bincount waits for a GPU
    load_E = chosen.new_zeros(moe.config.n_experts).scatter_add_(0, chosen, torch.ones_like(chosen))
    return grouped_swiglu(
        batch.x_ND, batch.experts_NK, batch.weights_NK, load_E, moe.experts.w_gate_up, moe.experts.w_down
    )


def loop(moe: MoE, batch: Batch) -> Tensor:
    """One expert after the other, on the rows that chose it. The matrices are unbound, since the backward of `w[e]`
    fills a tensor as large as all experts' matrices for every expert, which is what costs `eager` so much."""
    y = torch.zeros_like(batch.x_ND)
    for e, (w_gate_up, w_down) in enumerate(
        zip(moe.experts.w_gate_up.unbind(), moe.experts.w_down.unbind(), strict=True)
    ):
        tokens, place = (batch.experts_NK == e).nonzero(as_tuple=True)
        gate, up = (batch.x_ND[tokens] @ w_gate_up).chunk(2, -1)
        y = y.index_add(0, tokens, (F.silu(gate) * up) @ w_down * batch.weights_NK[tokens, place].unsqueeze(1))
    return y


def dense(moe: MoE, batch: Batch) -> Tensor:
    """As many rows as the experts multiply together, all with the matrices of the first."""
    x = batch.x_ND.repeat(moe.config.top_k, 1)
    gate, up = (x @ moe.experts.w_gate_up[0]).chunk(2, -1)
    return ((F.silu(gate) * up) @ moe.experts.w_down[0])[: len(batch.x_ND)]


Compute = Callable[[Batch], Tensor]


def experts_alone(size: Size, ours: MoE, blocks: dict[str, OlmoeSparseMoeBlock]) -> dict[str, Compute]:
    """Each side's product of tokens with experts that are already chosen."""
    sides: dict[str, Compute] = {
        "ours": functools.partial(our_experts, ours),
        "loop": functools.partial(loop, ours),
        "dense": functools.partial(dense, ours),
    }
    for name, block in blocks.items():
        sides[name] = lambda b, block=block: block.experts(b.x_ND, b.experts_NK, b.weights_NK)
    return sides


def whole_layer(size: Size, ours: MoE, blocks: dict[str, OlmoeSparseMoeBlock]) -> dict[str, Compute]:
    """Each side's router and experts. Ours computes loads and entropy for the logs besides."""
    sides: dict[str, Compute] = {"ours": lambda b: ours(b.x_ND.unsqueeze(0)).squeeze(0)}
    for name, block in blocks.items():
        sides[name] = lambda b, block=block: block(b.x_ND.unsqueeze(0)).squeeze(0)
    return sides


def results_of(compute: Compute, batch: Batch) -> tuple[Tensor, Tensor]:
    """A side's output and its gradient of the tokens."""
    y = compute(batch)
    return y.detach(), torch.autograd.grad(y, batch.x_ND, batch.grad_ND)[0]


def require_close(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], allowed: float, what: str) -> None:
    """Raise unless each of two results differs by no more than `allowed` of what is wanted."""
    for one, other in zip(found, wanted, strict=True):
        error = float((one - other).norm() / other.norm())
        if not error <= allowed:
            raise AssertionError(f"{what} by {error:.2g} of its size, {allowed:g} allowed")


def check(size: Size, sides: dict[str, Compute], batch: Batch) -> None:
    """Raise unless all sides but the dense one give our output and our gradient of the tokens.

    With bfloat16 weights OLMoE's router scores in bfloat16 and ours in float32, so some tokens' last expert differs.
    """
    allowed = 1e-4 if size.dtype == torch.float32 else 0.03 if "loop" in sides else 0.3
    results = {name: results_of(compute, batch) for name, compute in sides.items()}
    for name in sides.keys() - {"ours", "dense"}:
        require_close(results["ours"], results[name], allowed, f"{name} differs from ours")


def forward(compute: Compute, batch: Batch) -> None:
    """As in inference."""
    with torch.no_grad():
        compute(batch)


def forward_backward(compute: Compute, parameters: list[nn.Parameter], batch: Batch) -> None:
    """With gradients of tokens, weights of the choice, and all matrices, made anew as after `zero_grad`."""
    batch.x_ND.grad = batch.weights_NK.grad = None
    compute(batch).backward(batch.grad_ND)
    for parameter in parameters:
        parameter.grad = None


def timed(compute: Compute, parameters: list[nn.Parameter], name: str) -> Side:
    """The side of one pass."""
    if name == "forward":
        return functools.partial(forward, compute)
    return functools.partial(forward_backward, compute, parameters)


def cases(quick: bool) -> Iterator[Size]:
    for dtype in (torch.float32, torch.bfloat16):
        for size in QUICK if quick else SIZES:
            yield size._replace(dtype=dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three sizes and few rounds")
    arguments = parser.parse_args()
    prepare_process()
    parts: dict[str, tuple[Any, tuple[str, ...]]] = {
        "Experts alone, experts and weights given": (experts_alone, ("ours", *IMPLEMENTATIONS, "loop", "dense")),
        "The whole layer, with its router": (whole_layer, ("ours", *IMPLEMENTATIONS)),
    }
    tables = []
    for title, (part, names) in parts.items():
        torch.manual_seed(0)
        columns = ["type", "d", "F", "E", "K", "tokens", "group", "max/mean", "pass"]
        table = Table(title, columns, names, bounds=["dense"])
        for size in cases(arguments.quick):
            config = MoEConfig(
                n_experts=size.E, top_k=size.K, width=size.F, d_model=size.D, score="softmax", balance="none"
            )
            ours = MoE(config).to(size.dtype)
            blocks = their_blocks(size, ours)
            if size.batched_bytes > BATCHED_LIMIT:
                del blocks["batched_mm"]
            sides = part(size, ours, blocks)
            parameters = [*ours.parameters(), *(p for block in blocks.values() for p in block.parameters())]
            tokens = Tokens(size, ours.router.weight)
            batch = tokens.draw()
            check(size, sides, batch)
            load_E = torch.bincount(batch.experts_NK.flatten(), minlength=size.E)
            imbalance = f"{float(load_E.max() / load_E.float().mean()):.1f}"
            for name in ("forward", "both"):
                timings = alternate(
                    {side: timed(compute, parameters, name) for side, compute in sides.items()}
                    | ({} if "batched_mm" in blocks else {"batched_mm": "> 4 GiB"}),
                    tokens.draw,
                    budget_s=0.5 if arguments.quick else 1.0,
                )
                kind = str(size.dtype).removeprefix("torch.")
                case = (kind, size.D, size.F, size.E, size.K, size.tokens, size.group, imbalance, name)
                table.add(case, timings)
        tables.append(table)
        finish("expert_layer", tables, arguments=vars(arguments))


if __name__ == "__main__":
    main()
