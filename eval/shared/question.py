"""What a question is: how it is measured, drawn and told. Each file of `eval` holds one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from engram.config import build_config, load_yaml
from engram.training.data import TokenData
from engram.training.prepare import DataConfig
from eval.shared.held_out import HeldOut, held_out_of
from eval.shared.subjects import Subject

Result = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """A question as it was asked: of which checkpoints, the first of them first, and with what options."""

    subjects: Sequence[Subject]
    options: argparse.Namespace

    @cached_property
    def held_out(self) -> HeldOut:
        """The text to ask it on; says once if it is shorter than was asked. Raises `ConfigError` as `held_out_of`."""
        options, data = self.options, None
        if options.data is not None:
            settings = load_yaml(options.data)
            data = TokenData(build_config(DataConfig, settings.get("config", settings)))
        found = held_out_of(self.subjects, data, options.tokens, options.batch_size)
        there = found.n_windows * found.seq_len
        if options.tokens >= there + found.seq_len:
            print(
                f"note: the held-out text has {there:,} tokens, not the {options.tokens:,} of --tokens", file=sys.stderr
            )
        return found

    def precision(self) -> torch.autocast:
        """The autocast that was asked for."""
        return torch.autocast(torch.device(self.options.device).type, torch.bfloat16, enabled=self.options.bf16)


@dataclass(frozen=True)
class Question:
    """One file of `eval`.

    name: as in `eval.QUESTIONS`. title: of its section. about: HTML for a reader who did not run it: what was asked and
    how to read the answer. measure: the answer as plain data for JSON. draw: a matplotlib figure of an answer, in which
    names are already as figures need them (`as_typed`). tables: the rest of its section as HTML, made of the answer
    alone. add_options: options of its own. least, most: how many checkpoints it is asked of. on_text: it is asked on
    held-out or training text, which has to be there.
    """

    name: str
    title: str
    about: str
    measure: Callable[[Asked], Result]
    draw: Callable[[Result], Any]
    tables: Callable[[Result], str]
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    least: int = 1
    most: int | None = None
    on_text: bool = True


def parser_of(question: Question) -> argparse.ArgumentParser:
    """The command line of a question."""
    parser = argparse.ArgumentParser(prog=f"python -m eval.{question.name}", description=question.title)
    several = "a run's folder, or a checkpoint's or model's"
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help=several)
    parser.add_argument(
        "--against", type=Path, nargs="+", action="extend", default=[], metavar="RUN", help="others to compare it with"
    )
    parser.add_argument("--names", nargs="+", default=[], metavar="NAME", help="what to call them, in that order")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where to write (eval in the run's folder)")
    parser.add_argument("--data", type=Path, metavar="YAML", help="settings of another text than the run's, as `data`")
    parser.add_argument("--tokens", type=int, default=0, help="of held-out text (those that training validated on)")
    parser.add_argument("--batch-size", type=int, default=0, help="windows at once; changes no number (8192 tokens)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    question.add_options(parser)
    return parser
