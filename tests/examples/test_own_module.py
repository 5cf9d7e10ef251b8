"""The layers in a user's own module: the example learns, and importing them brings no framework along."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_a_users_module_with_both_layers_learns() -> None:
    losses = [float(loss) for loss in re.findall(r"([\d.]+) nats", run(str(EXAMPLES / "own_module.py"), "--steps=50"))]
    assert len(losses) == 2
    assert losses[1] < 2.5 < 5 < losses[0]


def test_the_example_needs_of_this_package_its_public_layers_alone() -> None:
    source = (EXAMPLES / "own_module.py").read_text("utf-8")
    imported = set(re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE))
    assert imported == {"__future__", "argparse", "pathlib", "torch", "engram"}
    assert re.findall(r"^from engram.*", source, re.MULTILINE) == [
        "from engram import Engram, MemoryConfig, MoE, MoEConfig"
    ]


def test_importing_and_building_layers_loads_no_framework() -> None:
    code = """
import sys
from engram import Engram, MemoryConfig, MoE, MoEConfig
Engram(MemoryConfig(d_model=8, vocab_size=9, branches=1, rows=(5, 5), row_width=2, compress=False))
MoE(MoEConfig(d_model=8, n_experts=2, top_k=1, width=8))
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""
    loaded = set(run("-c", code).split())
    assert {"torch", "engram"} <= loaded
    assert not loaded & {
        "transformers",
        "lightning",
        "datasets",
        "accelerate",
        "peft",
        "safetensors",
        "tokenizers",
        "yaml",
    }
