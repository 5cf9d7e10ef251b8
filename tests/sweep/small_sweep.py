"""A sweep small enough to train in a test, and an executor whose runs do something quicker."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from simulated_runs import result_of

from engram.sweep.launch import LocalJob
from engram.sweep.plan import Point, SweepPlan
from engram.training.data import TokenData

PLAN = {
    "name": "test",
    "model": {
        "vocab_size": 300,
        "d_model": 32,
        "n_layers": 2,
        "attention": {"kind": "gqa", "n_heads": 2, "n_kv_heads": 2, "head_dim": 16},
        "dense_width": 64,
        "max_seq_len": 32,
        "experts": {"n_experts": 32, "top_k": 2, "width": 16, "shared_width": 96},
        "memory": {"layers": [1], "n_heads": 2, "row_width": 8, "eos_id": 1},
    },
    "rho": [0.0, 0.5, 1.0],
    "seeds": [0, 1],
    "tokens": 1024,
    "evaluations": 2,
    "variants": {"capacity_one": {"memory": {"kind": "capacity_one"}, "rho": [0.5], "seeds": [0]}},
}


def plan_at(tmp_path: Path, **changes: Any) -> tuple[SweepPlan, Path]:
    """A plan on two small text files, with all its outputs under `tmp_path`."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "while", "seven", "wizards", "hum"]
    generator = random.Random(0)
    for name, n in (("train", 200), ("val", 30)):
        lines = [" ".join(generator.choices(words, k=60)) for _ in range(n)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    data = {
        "source": "files",
        "files": [str(tmp_path / "train.jsonl")],
        "val_files": [str(tmp_path / "val.jsonl")],
        "vocab_size": 300,
        "seq_len": 32,
        "batch_size": 4,
        "cache_dir": str(tmp_path / "cache"),
    }
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({**PLAN, "data": data, "output": str(tmp_path / "out"), **changes}))
    return SweepPlan.load(path), path


class ScriptExecutor:
    """Runs a Python line in the place of training; the launcher's logic does not depend on what a run does."""

    poll_seconds = 0.1

    def __init__(self, script: str, workers: int = 2) -> None:
        self.script, self.workers = script, workers
        self.started: list[str] = []

    def adopt(self, point: Point) -> None:
        """None: these jobs end with the test."""

    def start(self, point: Point, slot: int) -> LocalJob:
        self.started.append(point.name)
        environment = {**os.environ, "RHO": str(point.rho), "RESULT": json.dumps(finished(point))}
        environment["FOLDER"] = str(point.folder)
        log = (point.folder / "log.txt").open("ab")
        command = [sys.executable, "-c", self.script]
        return LocalJob(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment), log)


def finished(point: Point) -> dict[str, Any]:
    """What a run of a point on the plan's data may record."""
    return result_of(point, lambda tokens: {"nats": 3.0}, data={"corpus_hash": TokenData(point.plan.data).corpus_hash})


FINISH = "import os; open(os.environ['FOLDER'] + '/result.json', 'w').write(os.environ['RESULT'])"
