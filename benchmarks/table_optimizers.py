"""What choices of the tables' optimiser and type do to loss and memory: the nano model at rho 0.25, as default sweeps
train it but shorter.

RowAdam as sweeps use it, and against it: dense Adam (rows that are not read go on moving by their momentum), SparseAdam
(moments of rows that are not read do not decay), fewer moments, bfloat16 rows. Two of these also move rare rows further
at the same rate, so RowAdam at twice the rate stands beside them. All other things are equal: steps, rates, each seed's
start and order of tokens; losses are compared within seeds. `python benchmarks/table_optimizers.py`
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from harness import hardware, store
from scipy import stats
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from engram import ModelConfig
from engram.backbone import EngramLM, mean_loss, token_losses
from engram.sweep.plan import SweepPlan
from engram.training.data import TokenData
from engram.training.environment import prepare_process
from engram.training.optim import OptimConfig, RowAdam, Together, build_optimizer, clip_gradients
from engram.training.schedule import multiplier

PLAN = "configs/sweeps/default.yaml"
RHO = 0.25
LEVEL = 0.95


class DenseAdam(torch.optim.Adam):
    """The textbook's Adam, given row-sparse gradients: all rows move at every step."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for table in group["params"]:
                table.grad = table.grad.to_dense()
        return super().step(closure)


class Arm(NamedTuple):
    """A choice: settings that differ from the plan's, or another optimiser in RowAdam's place."""

    optim: Mapping[str, Any] = {}
    memory: Mapping[str, Any] = {}
    optimizer: Callable[..., torch.optim.Optimizer] | None = None


ARMS = {
    "RowAdam": Arm(),
    "RowAdam, rate x2": Arm({"table_lr_factor": 10.0}),
    "dense Adam": Arm(optimizer=DenseAdam),
    "SparseAdam": Arm(optimizer=torch.optim.SparseAdam),
    "second moment by row": Arm({"table_second_moment": "row"}),
    "by row, no first moment": Arm({"table_second_moment": "row", "table_beta1": 0.0}),
    "bfloat16 rows": Arm(memory={"table_dtype": "bfloat16"}),
}
OURS, *OTHERS = ARMS


class Run(NamedTuple):
    """Held-out loss of one trained model, and bytes of its tables and of their optimiser's state."""

    arm: str
    seed: int
    nats: float
    table_bytes: int
    state_bytes: int


def build_model(config: ModelConfig, lookup: Tensor, arm: Arm, seed: int) -> EngramLM:
    """The seed's model: of all arms the same, but for the rounding of what is kept in fewer bits."""
    torch.manual_seed(seed)
    model = EngramLM(config, lookup)
    if not arm.memory:
        return model
    assert config.memory is not None
    changed = EngramLM(dataclasses.replace(config, memory=dataclasses.replace(config.memory, **arm.memory)), lookup)
    changed.load_state_dict(model.state_dict())
    return changed


def with_table_optimizer(ours: Together, make: Callable[..., torch.optim.Optimizer]) -> Together:
    """The same with another optimiser of RowAdam's settings in its place."""
    *others, row_adam = ours.optimizers
    assert isinstance(row_adam, RowAdam)
    (group,) = row_adam.param_groups
    tables = {name: group[name] for name in ("params", "name", "schedule")}
    return Together([*others, make([tables], lr=group["lr"], betas=group["betas"], eps=group["eps"])])


def train(plan: SweepPlan, config: ModelConfig, name: str, seed: int) -> Run:
    """Train one arm from one seed, as a point of the plan trains."""
    arm = ARMS[name]
    data = TokenData(dataclasses.replace(plan.data, seed=seed))
    model = build_model(config, data.compressor().lookup, arm, seed)
    optim = dataclasses.replace(plan.optim, **arm.optim)
    optimizer = build_optimizer(model, optim)
    (tables,) = (group["params"] for group in optimizer.param_groups if group["name"] == "tables")
    if arm.optimizer is not None:
        optimizer = with_table_optimizer(optimizer, arm.optimizer)
    scheduler = LambdaLR(optimizer, partial(multiplier, optim.schedule, total=plan.steps))
    for step in range(plan.steps):
        train_step(model, optimizer, optim, data.train_batch(step))
        scheduler.step()
    held = (x for table in tables for x in optimizer.optimizers[-1].state[table].values() if isinstance(x, Tensor))
    return Run(name, seed, validate(model, data), sum(t.nbytes for t in tables), sum(x.nbytes for x in held))


def train_step(model: EngramLM, optimizer: Together, optim: OptimConfig, batch: dict[str, Tensor]) -> None:
    """One step as runs take it."""
    with torch.autocast("cpu", torch.bfloat16):
        output = model.run(batch["tokens"], batch["document_ids"])
        loss = mean_loss(output.hidden, model.head_weight, batch["targets"])
    (loss + sum((routing.aux_loss for routing in output.routing), loss.new_zeros(()))).backward()
    clip_gradients(model, optim.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for layer, routing in zip(model.moe_layers(), output.routing, strict=True):
        layer.update_balance(routing.load_E)


@torch.no_grad()
def validate(model: EngramLM, data: TokenData) -> float:
    """Mean nats of the held-out tokens."""
    model.eval()
    nats = []
    with torch.autocast("cpu", torch.bfloat16):
        for batch in data.val_dataloader():
            output = model.run(batch["tokens"], batch["document_ids"])
            nats.append(token_losses(output.hidden, model.head_weight, batch["targets"]).double().mean().item())
    return statistics.mean(nats)


def difference(runs: list[Run], name: str) -> tuple[float, float]:
    """By how much an arm's loss is above RowAdam's, in the mean of the seeds, and the half width of its t interval."""
    nats = {(run.arm, run.seed): run.nats for run in runs}
    each = [nats[name, run.seed] - run.nats for run in runs if run.arm == OURS]
    if len(each) < 2:
        return each[0], float("nan")
    quantile = float(stats.t.ppf((1 + LEVEL) / 2, len(each) - 1))
    return statistics.mean(each), quantile * statistics.stdev(each) / len(each) ** 0.5


def print_table(runs: list[Run]) -> None:
    """A line for each arm."""
    print(f"\n{'':<24}{'table MB':>9}{'state MB':>9}{'nats, by seed':>28}{'mean':>8}{f'less {OURS}, {LEVEL:.0%}':>22}")
    for name in ARMS:
        same = [run for run in runs if run.arm == name]
        losses = [run.nats for run in same]
        mean, half = difference(runs, name)
        print(
            f"{name:<24}{same[0].table_bytes / 1e6:>9.2f}{same[0].state_bytes / 1e6:>9.2f}"
            f"{' '.join(f'{loss:.4f}' for loss in losses):>28}{statistics.mean(losses):>8.4f}"
            + (f"{mean:>+13.4f} ± {half:.4f}" if name != OURS else "")
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=600_000, help="tokens of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm")
    arguments = parser.parse_args()
    prepare_process(threads=1)
    plan = dataclasses.replace(
        SweepPlan.load(PLAN), rho=(RHO,), seeds=tuple(range(arguments.seeds)), tokens=arguments.tokens, evaluations=1
    )
    config = plan.points()[0].config
    runs = []
    for seed in plan.seeds:
        for name in ARMS:
            runs.append(train(plan, config, name, seed))
            print(f"seed {seed}, {name}: {runs[-1].nats:.4f} nats", flush=True)
    print_table(runs)
    differences = {name: dict(zip(("nats", "half_width"), difference(runs, name), strict=True)) for name in OTHERS}
    settings = {"model": config.to_dict(), "rho": RHO, "steps": plan.steps, "level": LEVEL}
    result = {"hardware": hardware(), **settings, "runs": [run._asdict() for run in runs], "differences": differences}
    store("table_optimizers", result)


if __name__ == "__main__":
    main()
