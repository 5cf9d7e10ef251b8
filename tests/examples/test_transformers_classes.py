"""The example with transformers' Auto classes, on a folder as a run leaves it."""

import os
import subprocess
import sys
from pathlib import Path

from engram import EngramLM, ModelConfig
from engram.memory import TokenCompressor
from engram.training.tokenizer import train_bpe
from engram.training.weights import load_model, save_model

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "transformers_classes.py"
MODEL = {
    "vocab_size": 300,
    "d_model": 32,
    "n_layers": 2,
    "dense_width": 48,
    "attention": {"kind": "gqa", "n_heads": 4, "n_kv_heads": 2, "head_dim": 8},
    "experts": {"n_experts": 4, "top_k": 2, "width": 16},
    "memory": {"layers": [1], "n_heads": 2, "row_width": 8, "rows": [50, 50]},
}


def test_a_runs_model_is_generated_from_trained_and_saved_by_transformers(tmp_path: Path) -> None:
    tokenizer = train_bpe([EXAMPLE.read_text()], 300)
    compressor = TokenCompressor.from_tokenizer(tokenizer, 300)
    save_model(EngramLM(ModelConfig.from_dict(MODEL), compressor.lookup), tmp_path / "model", None, tokenizer)
    command = [sys.executable, str(EXAMPLE), str(tmp_path / "model"), "-n=4", "--steps=3", f"--out={tmp_path / 'out'}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    losses = [float(line.split()[2]) for line in done.stdout.splitlines() if line.startswith("step")]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert load_model(tmp_path / "out").config == ModelConfig.from_dict(MODEL)
