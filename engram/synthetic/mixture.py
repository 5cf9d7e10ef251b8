"""Documents of several tasks, to be mixed into a training text."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any, NamedTuple

from engram.config import read_settings, require, settings_under
from engram.synthetic.arithmetic import Arithmetic
from engram.synthetic.brackets import Brackets
from engram.synthetic.examples import Example, Task
from engram.synthetic.facts import Facts
from engram.synthetic.induction import Induction
from engram.synthetic.needle import Needle
from engram.synthetic.recall import Recall

TASKS: dict[str, type[Task]] = {task.name: task for task in (Facts, Induction, Recall, Arithmetic, Brackets, Needle)}


class Portion(NamedTuple):
    """A task, and how many bytes of its documents to mix in."""

    task: Task
    n_bytes: int

    def examples(self, n: int, seed: int) -> list[Example]:
        """About `n` examples for a model that was trained on these documents."""
        return list(self.task.test(n, self.n_bytes, seed))


def read_mixture(mixture: Mapping[str, Any], where: str = "mixture") -> dict[str, Portion]:
    """The portions that a mixture's settings name, by name, those of 0 bytes left out.

    A task's value is its number of bytes, or a mapping of `bytes` and the task's own settings. Raises `ConfigError`
    naming a task or setting that there isn't or that can't be, with `where` before it.
    """
    portions = {}
    for name, value in sorted(mixture.items()):  # however the settings were written, the documents are the same
        require(name in TASKS, f"unknown task {where}.{name}", value, "one of " + ", ".join(TASKS))
        own = dict(value) if isinstance(value, Mapping) else {"bytes": value}
        is_named = isinstance(value, Mapping) and "bytes" in value
        n_bytes = own.pop("bytes", None)
        whole = isinstance(n_bytes, int) and not isinstance(n_bytes, bool) and n_bytes >= 0
        if is_named:
            require(whole, f"{where}.{name}.bytes", n_bytes, "a number of bytes")
        require(whole, f"{where}.{name}", value, "a number of bytes, or a mapping with `bytes`")
        settings = read_settings(TASKS[name], own, f"{where}.{name}.")
        with settings_under(where):
            task: Task = TASKS[name](**settings)
            if n_bytes:
                task.check(n_bytes)
                portions[name] = Portion(task, n_bytes)
    return portions


def mixed_documents(mixture: Mapping[str, Portion], seed: int) -> list[tuple[str, str]]:
    """Task and text of every document, in random order."""
    documents = [
        (name, text) for name, portion in mixture.items() for text in portion.task.training(portion.n_bytes, seed)
    ]
    Random(f"mixture {seed}").shuffle(documents)
    return documents
