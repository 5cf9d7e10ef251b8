"""The expert layer on one CUDA device: its share of the dense bfloat16 rate, against other ways to multiply.

Sides take turns on the same tokens, routing and weights: ours, transformers' `grouped_mm` experts, scattermoe where it
imports (it is on no package index: put a checkout on PYTHONPATH), and `dense`, one product with as many rows, which
nothing can be much faster than. Tokens lie around cluster centres of unequal frequency, so that loads differ by several
times. Rates count 18 N K d F FLOPs forward and backward, 6 forward. `python benchmarks/gpu_experts.py`
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable

import torch
from expert_layer import (
    Batch,
    Compute,
    Size,
    Tokens,
    dense,
    forward,
    forward_backward,
    loop,
    our_experts,
    require_close,
    results_of,
    their_blocks,
)
from harness import Table, alternate_on_gpu, dense_rate, gpu_hardware, store
from torch import Tensor, nn

from engram import MoE, MoEConfig

SIZES = (
    Size(2048, 768, 128, 8, 2048, torch.bfloat16),  # 32k tokens
    Size(2048, 768, 128, 8, 512, torch.bfloat16),
    Size(2048, 1024, 64, 8, 2048, torch.bfloat16),  # OLMoE's
    Size(1024, 256, 64, 6, 1536, torch.bfloat16),  # configs/models/base.yaml's, but for two more experts
)
ALLOWED = 0.02  # difference from the loop in float32, in parts of its size


def scattermoe(size: Size, ours: MoE) -> nn.Module | str:
    """The peer's layer on our weights, or why there is none."""
    try:
        from scattermoe.mlp import GLUMLP
    except Exception as error:  # whatever the peer raises, the other comparisons go on
        return f"no scattermoe ({type(error).__name__})"
    layer = GLUMLP(size.D, size.F, size.E, size.K).to("cuda", size.dtype)
    with torch.no_grad():
        gate, up = ours.experts.w_gate_up.mT.chunk(2, dim=1)
        layer.experts.weight.copy_(torch.cat([up, gate], 1))
        layer.output_experts.weight.copy_(ours.experts.w_down.mT)
    return layer


def expected(moe: MoE, batch: Batch) -> tuple[Tensor, Tensor]:
    """Output and gradient of the tokens, expert by expert in float32."""
    exact = Batch(
        batch.x_ND.detach().float().requires_grad_(),
        batch.experts_NK,
        batch.weights_NK.detach().float(),
        batch.grad_ND.float(),
    )
    return results_of(functools.partial(loop, copy.deepcopy(moe).float()), exact)


def sides_of(size: Size, ours: MoE) -> tuple[dict[str, Compute | str], list[nn.Parameter]]:
    """Every side, and all weights whose gradients a backward pass makes."""
    block, peer = their_blocks(size, ours, ("grouped_mm",))["grouped_mm"], scattermoe(size, ours)
    sides: dict[str, Compute | str] = {
        "ours": functools.partial(our_experts, ours),
        "grouped_mm": lambda b: block.experts(b.x_ND, b.experts_NK, b.weights_NK),
        "scattermoe": peer if isinstance(peer, str) else lambda b: peer(b.x_ND, b.weights_NK, b.experts_NK),
        "dense": functools.partial(dense, ours),
        "ours, with router": lambda b: ours(b.x_ND.unsqueeze(0)).squeeze(0),
    }
    layers = [ours, block] if isinstance(peer, str) else [ours, block, peer]
    return sides, [parameter for layer in layers for parameter in layer.parameters()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first size alone, few rounds")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: see expert_layer.py for the CPU")
        return
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    rate = dense_rate()
    machine = gpu_hardware()
    names = ("ours", "grouped_mm", "scattermoe", "dense", "ours, with router")
    table = Table(
        f"{machine['gpu']}: {rate / 1e12:.0f} TFLOP/s in a dense bfloat16 product; experts and weights given",
        ["d", "F", "E", "K", "tokens", "max/mean", "pass", "of rate"], names, bounds=["dense", "ours, with router"],
    )  # fmt: skip
    for size in SIZES[:1] if arguments.quick else SIZES:
        config = MoEConfig(
            n_experts=size.E, top_k=size.K, width=size.F, d_model=size.D, score="softmax", balance="none"
        )
        ours = MoE(config).to(size.dtype)
        sides, parameters = sides_of(size, ours)
        batch = Tokens(size, ours.router.weight).draw()
        wanted = expected(ours, batch)
        for name, compute in sides.items():
            if name in ("ours", "grouped_mm", "scattermoe") and not isinstance(compute, str):
                found = results_of(compute, batch)
                require_close((found[0].float(), found[1].float()), wanted, ALLOWED, f"{name} differs from the loop")
        load_E = torch.bincount(batch.experts_NK.flatten(), minlength=size.E).float()
        for what, factor in (("forward", 6), ("both", 18)):
            calls: dict[str, Callable[[], object] | str] = {}
            for name, compute in sides.items():
                if isinstance(compute, str):
                    calls[name] = compute
                elif what == "forward":
                    calls[name] = functools.partial(forward, compute, batch)
                else:
                    calls[name] = functools.partial(forward_backward, compute, parameters, batch)
            seconds = alternate_on_gpu(calls, 5 if arguments.quick else 15)
            took = seconds["ours"]
            assert isinstance(took, float)
            of_rate = factor * size.tokens * size.K * size.D * size.F / took / rate
            case = (size.D, size.F, size.E, size.K, size.tokens, f"{float(load_E.max() / load_E.mean()):.1f}", what)
            table.add((*case, f"{of_rate:.1%}"), seconds)
        store("gpu_experts", {"hardware": machine, "dense_flops_per_second": rate, "rows": table.rows})
        del ours, sides, parameters, batch, wanted
        torch.cuda.empty_cache()
    table.summary()


if __name__ == "__main__":
    main()
