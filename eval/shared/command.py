"""The command of a question: open the checkpoints, measure, and write JSON, picture and page."""

from __future__ import annotations

import dataclasses
import importlib
import math
import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engram.config import ConfigError, require
from engram.pages import save_png
from engram.training.atomic import write_json
from engram.training.environment import prepare_process
from engram.training.recorder import device_name
from eval.shared.page import write_page
from eval.shared.question import Asked, Question, parser_of
from eval.shared.subjects import Subject, open_subjects


def main(question: Question, args: Sequence[str] | None = None) -> int:
    """Ask a question; returns the exit code. A bad setting ends in one line on stderr and code 2."""
    options = parser_of(question).parse_args(args)
    # What torch says of a checkpoint that one process reads.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    try:
        prepare_process()
        return _ask(question, options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def run(name: str, args: Sequence[str]) -> int:
    """Ask the question of a name, as `engram eval NAME` does."""
    return main(importlib.import_module(f"eval.{name}").QUESTION, args)


def _ask(question: Question, options: Any) -> int:
    paths = [options.checkpoint, *options.against]
    allowed = f"{question.least}" + (" or more" if question.most is None else f" to {question.most}")
    enough = len(paths) >= question.least and (question.most is None or len(paths) <= question.most)
    require(enough, "number of checkpoints", len(paths), allowed)
    own_text = options.data is None
    subjects = open_subjects(paths, options.names, options.device, own_text=own_text, any_text=question.on_text)
    folder = options.output or _folder(options.checkpoint, subjects)
    asked = Asked(subjects, options)
    result = plain(question.measure(asked))
    kept = {name: value for name, value in vars(options).items() if name not in ("checkpoint", "against", "output")}
    record = {
        "question": question.name,
        "checkpoints": [subject.describe() for subject in subjects],
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()},
        # Those that the question really looked at; `tokens` may ask for more than there are, or for all.
        "held_out_tokens": asked.held_out.n_windows * asked.held_out.seq_len if question.on_text else None,
        "device": device_name(torch.device(options.device)),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "result": result,
    }
    picture = folder / f"{question.name}.png"
    save_png(question.draw(result), picture)
    write_json(folder / f"{question.name}.json", record)
    print("\n".join(str(path) for path in (folder / f"{question.name}.json", picture, write_page(folder))))
    return 0


def plain(value: Any) -> Any:
    """Arrays, dataclasses and what is not a number as JSON knows them: lists, mappings and null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(vars(value))
    if isinstance(value, dict):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(each) for each in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _folder(checkpoint: Path, subjects: Sequence[Subject]) -> Path:
    """Where answers go if nobody says: into the first checkpoint's folder, comparisons apart from each other."""
    folder = checkpoint / "eval"
    others = "-".join(subject.name.replace("/", "-") for subject in subjects[1:])
    return folder / f"against-{others}" if others else folder
