"""Tokens a second in training, all workers together, of the models that CPU sweeps train, at both ends of the split.

Points side by side as a sweep runs them, on the text of the Python environment. `python benchmarks/training_speed.py`
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict, dataclass

from harness import store

from engram.sweep.launch import LocalExecutor, read_result, run_sweep
from engram.sweep.plan import SweepPlan
from engram.training.prepare import DataConfig

MODELS = {"nano": 128, "tiny": 256}  # and the windows their runs use; batches hold 4096 tokens


@dataclass(frozen=True)
class Speed:
    """Training speed of one model at one rho: of each worker, and of all together."""

    model: str
    rho: float
    workers: int
    tokens_per_s: float
    total_tokens_per_s: float
    device: str
    torch: str


def measure(model: str, rho: float, tokens: int, folder: str) -> Speed:
    """Train one point on every worker at once, for `tokens` each."""
    executor = LocalExecutor(workers=0, threads=1)
    T = MODELS[model]
    data = DataConfig(vocab_size=2048, seq_len=T, batch_size=4096 // T, max_bytes=12_000_000, max_val_bytes=500_000)
    plan = SweepPlan(
        name=model,
        model=f"configs/models/{model}.yaml",
        rho=(rho,),
        seeds=tuple(range(executor.workers)),
        tokens=tokens,
        evaluations=1,
        data=data,
        output=f"{folder}/{model}-{rho}",
    )
    for failure in run_sweep(plan, executor):
        raise SystemExit(f"{failure.point.name} failed:\n{failure.tail}")
    results = [read_result(point) for point in plan.points()]
    speeds = [result["tokens_per_s"] for result in results]
    first = results[0]
    mean = sum(speeds) / len(speeds)
    return Speed(model, rho, len(speeds), mean, sum(speeds), first["device"], first["versions"]["torch"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=600_000, help="tokens of each run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        speeds = [measure(model, rho, arguments.tokens, folder) for model in MODELS for rho in (0.0, 0.4, 1.0)]
    print(f"\n{'model':<8}{'rho':>6}{'workers':>9}{'tokens/s each':>15}{'together':>10}")
    for s in speeds:
        print(f"{s.model:<8}{s.rho:>6.1f}{s.workers:>9}{s.tokens_per_s:>15,.0f}{s.total_tokens_per_s:>10,.0f}")
    store("training_speed", [asdict(s) for s in speeds])


if __name__ == "__main__":
    main()
