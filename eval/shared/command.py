"""The command of a question: open the checkpoints, measure, and write JSON, picture and page."""

from __future__ import annotations

import dataclasses
import hashlib
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
from engram.pages import as_typed, png_of, save
from engram.training.atomic import write_json
from engram.training.environment import prepare_process
from engram.training.recorder import device_name
from eval.shared.page import FORMAT, write_page
from eval.shared.question import Asked, Question, parser_of
from eval.shared.subjects import Subject, open_subjects, run_folder, without_model


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
        "format": FORMAT,
        "question": question.name,
        "checkpoints": [subject.describe() for subject in subjects],
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()},
        # Those that the question really looked at; `tokens` may ask for more than there are, or for all.
        "held_out_tokens": asked.held_out.n_windows * asked.held_out.seq_len if question.on_text else None,
        "device": device_name(torch.device(options.device)),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "result": result,
    }
    picture = png_of(question.draw(_for_figures(result)))
    # Whatever happens between the two, a page has these numbers, and no picture of others beside them.
    record["picture_sha256"] = hashlib.sha256(picture).hexdigest()
    paths = [folder / f"{question.name}.{kind}" for kind in ("json", "png")]
    write_json(paths[0], record)
    save(picture, paths[1])
    print("\n".join(str(path) for path in (*paths, write_page(folder))))
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


def _for_figures(value: Any) -> Any:
    """An answer in which all names, of checkpoints, domains and tasks, are those for a figure."""
    if isinstance(value, dict):
        return {as_typed(name): _for_figures(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_for_figures(each) for each in value]
    return as_typed(value) if isinstance(value, str) else value


def _folder(checkpoint: Path, subjects: Sequence[Subject]) -> Path:
    """Where answers go if nobody says: to `eval` in the run's folder, those of one of its checkpoints by themselves, so
    that they outlive it; of a model without a run, to `eval` in its own folder. Comparisons apart from each other."""
    itself, run = without_model(checkpoint), run_folder(checkpoint)
    folder = itself / "eval" if run in (None, itself) else run / "eval" / itself.resolve().name
    others = "-".join(subject.name.replace("/", "-") for subject in subjects[1:])
    return folder / f"against-{others}" if others else folder
