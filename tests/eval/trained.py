"""Small models, really trained, that the tests of `eval` ask their questions of.

They are trained once and kept: a folder's name hashes the settings and all code that could change what comes out.
"""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

import engram
from engram.training.cache import build_once, content_key
from engram.training.corpus import split_docstrings
from engram.training.main import main

SEQ_LEN, STEPS, BATCH = 64, 300, 16

_MODEL: dict[str, Any] = {
    "vocab_size": 512,
    "d_model": 48,
    "n_layers": 3,
    "n_dense_layers": 1,
    "dense_width": 96,
    "max_seq_len": SEQ_LEN,
    "attention": {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1, "head_dim": 24},
    "experts": {"n_experts": 32, "top_k": 2, "width": 32, "shared_width": 48, "score": "sigmoid", "bias_step": 5.0e-3},
    "memory": {"layers": [1], "orders": [2, 3], "n_heads": 2, "row_width": 8, "rows": [0, 0], "eos_id": 1},
}
_HYBRID = {
    "experts": {**_MODEL["experts"], "n_experts": 16, "shared_width": 32},
    "memory": {**_MODEL["memory"], "rows": [4001, 4001]},
}
MODELS: dict[str, dict[str, Any]] = {
    "experts": _MODEL,
    "memory": {**_MODEL, **_HYBRID},
    # Two memories and two residual branches: what tells layers and branches apart is seen here alone.
    "branches": {**_MODEL, **_HYBRID, "branches": 2, "memory": {**_HYBRID["memory"], "layers": [0, 2]}},
}
# Some facts told often enough, and brackets, of which such a model learns something too.
OFTEN, FACTS_BYTES = 200, 200_000
MIXTURE = {"facts": {"bytes": FACTS_BYTES, "exposures": [1, OFTEN]}, "brackets": 100_000, "recall": 20_000}


def train(name: str, cache: Path, **data_settings: Any) -> Path:
    """The folder of a trained model's run: from the cache, or trained now (about ten seconds). Settings are of data."""
    data = {
        "source": "files",
        "files": [str(_texts(cache, "train", ("email", "asyncio", "http", "logging", "unittest")))],
        "val_files": [str(_texts(cache, "held_out", ("json", "urllib", "xml/dom", "concurrent/futures")))],
        "domain_column": "kind",
        "vocab_size": 512,
        "seq_len": SEQ_LEN,
        "batch_size": BATCH,
        "val_tokens": 16 * 1024,
        "cache_dir": str(cache / "data"),
        **data_settings,
    }
    settings = {
        "seed_everything": 0,
        "threads": 1,
        "checkpoint_every": STEPS // 2,
        "trainer": {
            "max_steps": STEPS,
            "val_check_interval": STEPS,
            "accelerator": "cpu",
            "precision": "32-true",
            "enable_progress_bar": False,
        },
        "model": {"model": MODELS[name], "optim": {"lr": 2.0e-2}},
        "data": {"config": data},
    }

    def build(folder: Path) -> None:
        settings["trainer"]["default_root_dir"] = str(folder)
        (folder / "run.yaml").write_text(yaml.safe_dump(settings))
        with patch.object(sys, "argv", ["train.py"]):  # what LightningCLI would take for options
            assert main(["fit", "--config", str(folder / "run.yaml")]) == 0

    return build_once(cache / f"{name}-{content_key(settings=json.dumps(settings), code=_code())}", build)


def _texts(cache: Path, name: str, folders: tuple[str, ...]) -> Path:
    """Modules of the standard library as code and prose."""
    library = Path(sysconfig.get_paths()["stdlib"])

    def build(folder: Path) -> None:
        rows = []
        for path in sorted(path for each in folders for path in (library / each).glob("*.py")):
            code, prose = split_docstrings(path.read_text(encoding="utf-8"))
            rows += [{"text": code, "kind": "code"}, {"text": prose, "kind": "prose"}]
        lines = [json.dumps(row) for row in rows if len(row["text"]) > 200]
        (folder / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")

    return build_once(cache / f"texts-{name}", build) / "texts.jsonl"


def _code() -> str:
    """Hex SHA-256 of the package's sources."""
    root = Path(engram.__file__).parent
    whole = hashlib.sha256()
    for path in sorted(path for kind in ("*.py", "*.cpp", "*.h") for path in root.rglob(kind)):
        whole.update(path.read_bytes())
    return whole.hexdigest()
