"""Tasks with right and wrong answers: the probes that a run's mixture holds, and tasks of lm-evaluation-harness.

Each of them tells for every question whether it was answered well, so that the same questions can be asked of a model
before and after something was done to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engram.config import ConfigError, require
from engram.training.probes import answers_by_group, ask, questions_of, score
from eval.shared.question import Asked
from eval.shared.subjects import Subject


class Marks(NamedTuple):
    """How the answers to some questions of a task were marked.

    group: which of the task's questions, in words; empty for all. metric: what a mark is. chance: the mean mark of a
    guess, not a number where it is unknown. right: the mark of each answer, 0 to 1. question: its question's number.
    """

    task: str
    group: str
    metric: str
    chance: float
    right: NDArray[np.float64]
    question: NDArray[np.int64]


def probes_of(asked: Asked, subject: Subject, n: int = 0) -> Callable[[], list[Marks]]:
    """The tasks of the mixture that a checkpoint was trained on, to be asked of it whenever called.

    Questions are those of the run's validations, without controls, or about `n` of each task; after those of a whole
    task come those of each value that the task tells its questions apart by. None without a run or mixture.
    """
    require(n >= 0, "examples", n, "1 or more (0: as many as in training)")
    data = None if subject.run is None else subject.run.data
    portions = {} if data is None else data.config.portions()
    made = {}
    for name, portion in portions.items():
        assert data is not None
        examples = portion.examples(n or data.config.probe_examples, data.config.mixture_seed)
        examples = [example for example in examples if not example.control]
        made[name] = examples, questions_of(examples, data.tokenizer, data.eos_id)

    def mark() -> list[Marks]:
        found = []
        for name, (examples, questions) in made.items():
            with asked.precision():
                answers = ask(subject.model, questions, asked.options.batch_size or 32)
            groups: dict[str, NDArray[np.bool_]] = {"": np.ones(len(answers.question), bool)}
            members = answers_by_group(examples, answers)
            names = list(dict.fromkeys(name for name, _ in members))
            for group in sorted(members, key=lambda each: (names.index(each[0]), each[1])):
                groups[f"{group[0].replace('_', ' ')} {group[1]}"] = members[group]
            for group_name, who in groups.items():
                marks = answers.right[who].astype(np.float64), answers.question[who]
                found.append(Marks(name, group_name, "answers right", score(examples, answers, who).chance, *marks))
        return found

    return mark


def harness_tasks(
    asked: Asked, subject: Subject, names: Sequence[str], include: Path | None, limit: int
) -> Callable[[], list[Marks]]:
    """Tasks of lm-evaluation-harness, with those in a folder of one's own, to be asked of a checkpoint whenever called.

    `limit`: questions of each at most (0: all). Of a task's metrics those are told that mark single questions from 0 to
    1 and are better the higher they are. Raises `ConfigError` where the harness is not installed, for tasks that it has
    not, and for a checkpoint that it can't be asked of; when called, for a task without such a metric.
    """
    require(limit >= 0, "limit", limit, "1 or more (0: all questions)")
    if not names:
        return list
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f"tasks {list(names)}: lm_eval is needed: pip install 'engram-moe[eval]'") from error

    from engram.interop.harness import EngramHarness

    require(include is None or include.is_dir(), "include-path", str(include), "a folder of tasks")
    manager = TaskManager(include_path=include, include_defaults=False)
    if not all(manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=include)  # reads 14,000 files
    for name in names:
        require(bool(manager.match_tasks([name])), "tasks", name, "names of tasks, as `lm_eval ls tasks` shows them")
    options = asked.options
    harness = EngramHarness(
        model=subject.model,
        tokenizer=subject.tokenizer,
        eos_token="" if subject.run is None else subject.run.data.config.eos_token,
        dtype="bfloat16" if options.bf16 else None,
        batch_size=options.batch_size or "auto",
    )

    def mark() -> list[Marks]:
        results = simple_evaluate(
            harness, tasks=list(names), task_manager=manager, limit=limit or None, bootstrap_iters=0
        )
        found = []
        for task, samples in results["samples"].items():
            better = results["higher_is_better"][task]
            for metric, among in sorted({(m, s["filter"]) for s in samples for m in s["metrics"] if better.get(m)}):
                # By the task's own numbers: that of a question decides which draws it is in.
                own = sorted((s for s in samples if s["filter"] == among), key=lambda sample: sample["doc_id"])
                values = [sample[metric] for sample in own]
                if all(isinstance(value, Real) and 0 <= float(value) <= 1 for value in values):
                    told = metric if among == "none" else f"{metric}, {among}"
                    question = np.array([sample["doc_id"] for sample in own])
                    found.append(Marks(task, "", told, np.nan, np.array(values, np.float64), question))
            if task not in (each.task for each in found):
                raise ConfigError(f"task {task!r} has no metric that marks single questions from 0 to 1")
        return found

    return mark
