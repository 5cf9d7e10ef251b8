"""Muon against AdamW for the matrices of the tiny model, at equal wall-clock: which of the two a run should start from.

The speed of each is measured first; then each trains on as many tokens as it gets through in the same time, at several
learning rates, two seeds side by side on one thread each. `python benchmarks/matrix_optimizers.py --seconds 90`
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from harness import store

from engram.sweep.launch import LocalExecutor, read_result, run_sweep
from engram.sweep.plan import SweepPlan
from engram.training.optim import MatrixOptimizer, OptimConfig
from engram.training.prepare import DataConfig

OPTIMIZERS: tuple[MatrixOptimizer, ...] = ("adamw", "muon")
LEARNING_RATES = (3e-3, 6e-3, 1.2e-2, 2.4e-2)
SEEDS = (0, 1)
DATA = DataConfig(
    vocab_size=2048, seq_len=256, batch_size=16, max_bytes=30_000_000, max_val_bytes=3_000_000, val_tokens=250_000
)
TOKENS_TO_TIME = 300_000


@dataclass(frozen=True)
class Run:
    """One trained model: held-out loss after the tokens it got through."""

    optimizer: str
    lr: float
    seed: int
    tokens: int
    tokens_per_s: float
    nats: float
    device: str


def train(optimizer: MatrixOptimizer, lr: float, tokens: int, folder: Path) -> list[Run]:
    """Train the tiny model at rho 0.4 from every seed, all at once."""
    plan = SweepPlan(
        name=optimizer,
        model="configs/models/tiny.yaml",
        rho=(0.4,),
        seeds=SEEDS,
        tokens=tokens,
        evaluations=1,
        data=DATA,
        optim=OptimConfig(lr=lr, matrix_optimizer=optimizer),
        output=str(folder),
    )
    for failure in run_sweep(plan, LocalExecutor(workers=len(SEEDS), threads=1)):
        raise SystemExit(f"{failure.point.name} failed:\n{failure.tail}")
    runs = []
    for point in plan.points():
        result = read_result(point)
        loss = result["val"]["nats"]
        speed = result["tokens_per_s"]
        runs.append(Run(optimizer, lr, point.seed, result["tokens"], speed, loss, result["device"]))
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=90.0, help="wall-clock of training for each run")
    parser.add_argument("--folder", type=Path, default=Path("runs/matrix_optimizers"), help="where the runs go")
    arguments = parser.parse_args()

    timed = {name: train(name, LEARNING_RATES[0], TOKENS_TO_TIME, arguments.folder / "timing") for name in OPTIMIZERS}
    speeds = {name: statistics.mean(run.tokens_per_s for run in runs) for name, runs in timed.items()}
    runs: list[Run] = []
    for lr in LEARNING_RATES:
        for name in OPTIMIZERS:
            runs += train(name, lr, int(speeds[name] * arguments.seconds), arguments.folder / "runs")

    print(f"\n{'optimizer':<10}{'lr':>8}{'tokens':>12}{'tokens/s':>10}{'nats, by seed':>18}{'mean':>9}")
    for lr in LEARNING_RATES:
        for name in OPTIMIZERS:
            same = [run for run in runs if (run.optimizer, run.lr) == (name, lr)]
            losses = [run.nats for run in same]
            speed = statistics.mean(run.tokens_per_s for run in same)
            print(
                f"{name:<10}{lr:>8g}{same[0].tokens:>12,}{speed:>10,.0f}"
                f"{' '.join(f'{loss:.4f}' for loss in losses):>18}{statistics.mean(losses):>9.4f}"
            )
    store("matrix_optimizers", [asdict(run) for run in runs])


if __name__ == "__main__":
    main()
