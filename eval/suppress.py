"""What is left of a model without its memory: the memory's output zeroed, or wrong rows in the place of right ones.

    python -m eval.suppress --checkpoint RUN [--against RUN] [--tasks NAME ...]

Losses and hits on held-out text by domain and by times seen, and accuracy in tasks; what is kept of it, as in
arXiv:2601.07372, section 6 (facts 29 to 44 %, reading 81 to 93 %).
"""

from __future__ import annotations

import argparse
import html
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engram.backbone.loss import chunk_rows, losses_of
from engram.pages import GREY, table
from engram.training.data import Batch
from eval.loss import described, grouped
from eval.shared.bootstrap import ratios, sums_by_document
from eval.shared.command import main
from eval.shared.groups import Groups
from eval.shared.interventions import CHANGES, Change, memories_of, suppressed
from eval.shared.page import interval, percent
from eval.shared.pictures import bounds, name_counts, plot_intervals
from eval.shared.question import Asked, Question, Result
from eval.shared.strata import add_options as add_strata_options
from eval.shared.subjects import Subject
from eval.shared.tasks import Marks, harness_tasks, probes_of

_ABOUT = """<p>Each checkpoint was asked three times, with the same weights: as it is; with its memory <b>zeroed</b>, so
that nothing of it reaches the hidden state; and with its memory's rows <b>shuffled</b>, so that each N-gram reads rows
of the same tables that belong to others, always the same wrong ones. What zeroing takes away is what the model has
come to leave to its memory. It is no measure of what a model would be that never had one: such a model learns
elsewhere what it can. Shuffled rows can do more harm than none, as they say something, but something wrong, as far as
the gate lets it in; rows that were hardly ever trained say next to nothing, and are then as good as none.</p>
<p>Losses are in nats a token, and their increase is taken on the same tokens. <b>Hits</b> are tokens that the model
would have guessed: the likeliest one is right. <b>Kept</b> is the share of the hits, or of a task's accuracy, that is
left: 100&nbsp;% if the memory was not needed, and above if it was in the way. In the paper, at 27 billion parameters
without its memory, factual questions keep 29 to 44&nbsp;% and reading comprehension 81 to 93&nbsp;%. Where a model is
no better than a guess to begin with, there is nothing to keep, and nothing is told of it; a guess that is worth
something keeps what it is worth: see the column of chance. Brackets and bars hold 95&nbsp;% intervals from drawing
documents, or a task's questions, again; where nothing is left of any question they have no width, however few questions
there were.</p>"""


def measure(asked: Asked) -> Result:
    """Loss, hits and marks of each checkpoint as it is and under each change."""
    options = asked.options
    # Those without a memory are told of as such, unless none has one.
    able = [subject for subject in asked.subjects if subject.model.memories()]
    for subject in able or asked.subjects:
        memories_of(subject.model, options.layers, repr(subject.name))
    tasks = {
        subject.name: (
            probes_of(asked, subject, options.examples),
            harness_tasks(asked, subject, options.tasks, options.include_path, options.limit),
        )
        for subject in able
    }
    groups, suffixes = grouped(asked)
    answers = {}
    for subject in able:
        scores, marks = {}, {}
        for change in (None, *CHANGES):
            with suppressed(subject.model, change, options.layers) if change is not None else nullcontext():
                scores[change] = groups.summed(_token_scores(asked, subject, change or "as it is"))
                marks[change] = [mark for ask in tasks[subject.name] for mark in ask()]
        answers[subject.name] = {
            "memories": list(memories_of(subject.model, options.layers)),
            **_of_groups(groups, scores),
            "tasks": [_of_task(list(each)) for each in zip(*marks.values(), strict=True)],
        }
    return {
        **described(asked, groups, suffixes),
        "without_memory": [subject.name for subject in asked.subjects if subject not in able],
        "checkpoints": answers,
    }


def _token_scores(asked: Asked, subject: Subject, state: str) -> Iterator[NDArray[np.float64]]:
    """Of every held-out token nats, and 1 if it is the likeliest, batch after batch `[tokens, 2]`."""
    model = subject.model

    def measure(batch: Batch) -> Tensor:
        targets, scores, rows = batch["targets"], [], chunk_rows(model.head_weight)
        with asked.precision():
            hidden = model.run(batch["tokens"], batch["document_ids"]).hidden
            for part, wanted in zip(hidden.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True):
                logits = model.logits(part)
                scores.append(torch.stack([losses_of(logits, wanted), logits.argmax(-1) == wanted], -1))
        return torch.cat(scores).view(*targets.shape, 2)

    return asked.held_out.of_each_token(subject, measure, f"{subject.name}, {state}")


def _of_groups(groups: Groups, scores: dict[Change | None, NDArray[np.float64]]) -> dict[str, Any]:
    """Loss and hits by group, as the model is and under each change, from sums `[documents, groups, 2]`."""
    normal = scores[None]
    found: dict[str, Any] = {}
    for change, each in scores.items():
        own = {"nats": each[..., 0], "accuracy": each[..., 1], "difference": (each - normal)[..., 0]}
        told = {name: groups.mean(sums) for name, sums in own.items()}
        found[change or "normal"] = {**told, "retained": groups.mean(each[..., 1], over=normal[..., 1])}
    return found


def _of_task(marks: Sequence[Marks]) -> dict[str, Any]:
    """Accuracy in a task as the model is and under each change, in the order of `CHANGES`."""
    first, n = marks[0], len(marks)
    each = np.stack([np.ones(len(first.right)), *(mark.right for mark in marks)], -1)
    sums = sums_by_document(
        first.question, each
    )  # of each question: answers, and how many of them were right each time
    accuracy = ratios(sums[:, 1:], np.repeat(sums[:, :1], n, 1))
    kept = ratios(sums[:, 1:], np.repeat(sums[:, 1:2], n, 1))
    return {
        "task": first.task,
        "group": first.group,
        "metric": first.metric,
        "chance": first.chance,
        "answers": len(first.right),
        "questions": len(np.unique(first.question)),
        **{name: {"accuracy": accuracy[i], "retained": kept[i]} for i, name in enumerate(("normal", *CHANGES))},
    }


_STYLES: dict[str, dict[str, str]] = {"zeroed": {"fmt": "o-"}, "shuffled": {"fmt": "s--", "mfc": "white"}}
_KINDS = ("all", "domain", "pair", "stratum")


def draw(result: Result) -> Any:
    """By how much losses rise, against how often the suffix was seen; and what is kept, by group and task."""
    groups, answers = result["groups"], result["checkpoints"]
    told = [i for i, group in enumerate(groups) if group["kind"] in _KINDS]
    known = {
        name: {_task_name(task): task for task in answer["tasks"] if _able(task)} for name, answer in answers.items()
    }
    tasks = list(dict.fromkeys(task for own in known.values() for task in own))
    rows = [groups[i]["name"] for i in told] + tasks
    height = max(4.6, 1.4 + 0.17 * len(rows) * max(2, len(answers)))
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, height), layout="constrained", width_ratios=(1, 1.15))
    counts = [i for i, group in enumerate(groups) if group["kind"] == "count"]
    lanes = [(name, change) for name in answers for change in CHANGES]
    for lane, (name, change) in enumerate(lanes):
        answer, colour = answers[name], f"C{list(answers).index(name)}"
        style = {"color": colour, "label": f"{name}, {change}", **_STYLES[change]}
        plot_intervals(left, [answer[change]["difference"][i] for i in counts], **style)
        kept = {groups[i]["name"]: answer[change]["retained"][i] for i in told}
        kept |= {task: each[change]["retained"] for task, each in known[name].items()}
        for row, what in enumerate(rows):
            share = kept.get(what)
            if share is not None and share["value"] is not None:
                y = row + 0.7 * ((lane + 0.5) / len(lanes) - 0.5)
                value, low, high = 100 * bounds([share])[0]
                ends = [[max(value - low, 0)], [max(high - value, 0)]]
                right.errorbar(value, y, xerr=ends, color=colour, ms=4, capsize=1.5, **_STYLES[change])
    name_counts(left, groups, result["order"])
    left.axhline(0, color=GREY, lw=1)
    left.set_ylabel("increase of the loss, nats per token")
    left.legend(frameon=False, fontsize=8)
    right.set_yticks(range(len(rows)), rows, fontsize=8)
    right.set_ylim(len(rows) - 0.5, -0.5)
    for row in range(1, len(rows)):
        right.axhline(row - 0.5, color="#dddddd", lw=0.6)
    right.axhline(len(told) - 0.5, color=GREY, lw=1)
    right.axvline(100, color=GREY, lw=1)
    right.set_xlim(left=min(0, right.get_xlim()[0]))
    right.set_xlabel("kept, % of the hits (text) or of the accuracy (tasks)")
    return figure


def _able(task: dict[str, Any]) -> bool:
    """Whether a model is better than a guess in a task before anything is done to it, as far as that is known."""
    low = task["normal"]["accuracy"]["low"]
    return task["chance"] is None or (low is not None and low > task["chance"])


def _task_name(task: dict[str, Any]) -> str:
    group = f", {task['group']}" if task["group"] else ""
    metric = "" if task["metric"] == "answers right" else f" ({task['metric']})"
    return f"{task['task']}{group}{metric}"


def tables(result: Result) -> str:
    """Losses, hits and tasks of each checkpoint."""
    without = ", ".join(map(html.escape, result["without_memory"]))
    parts = [f"<p>Without a memory, so that there is nothing to suppress: {without}.</p>"] if without else []
    for name, answer in result["checkpoints"].items():
        memories = ", ".join(_place(memory) for memory in answer["memories"])
        parts.append(f"<h3>{html.escape(name)}: what was suppressed is the memory {memories}</h3>")
        rows = []
        for i, group in enumerate(result["groups"]):
            if group["kind"] in _KINDS:
                cells = [html.escape(group["name"]), f"{group['tokens']:,}", interval(answer["normal"]["nats"][i], 3)]
                cells += [interval(answer[change]["difference"][i], 3, "+") for change in CHANGES]
                cells.append(percent(answer["normal"]["accuracy"][i]))
                rows.append(cells + [percent(answer[change]["retained"][i]) for change in CHANGES])
        more = [f"more when {change}" for change in CHANGES]
        kept = [f"kept when {change}" for change in CHANGES]
        parts.append(table(["", "tokens", "nats a token", *more, "hits", *kept], rows))
        rows = []
        for task in answer["tasks"]:
            cells = [html.escape(_task_name(task)), f"{task['answers']:,}"]
            cells.append("–" if task["chance"] is None else f"{100 * task['chance']:.1f} %")  # noqa: RUF001
            cells += [percent(task[state]["accuracy"]) for state in ("normal", *CHANGES)]
            rows.append(cells + [percent(task[change]["retained"]) if _able(task) else "a guess" for change in CHANGES])
        if rows:
            parts.append(table(["task", "answers", "chance", "right", *CHANGES, *kept], rows))
    return "\n".join(parts)


def _place(memory: str) -> str:
    return "on the embedding" if memory == "input" else f"before block {memory}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of strata, memories and tasks."""
    add_strata_options(parser)
    parser.add_argument("--layers", nargs="+", default=[], metavar="BLOCK", help="suppress these memories alone")
    parser.add_argument("--examples", type=int, default=0, help="of each task of the mixture (those of training)")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="tasks of lm-evaluation-harness")
    parser.add_argument("--include-path", type=Path, metavar="FOLDER", help="with tasks of your own")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="questions of each of these tasks (all)")


QUESTION = Question("suppress", "What is left without the memory", _ABOUT, measure, draw, tables, add_options)

if __name__ == "__main__":
    sys.exit(main(QUESTION))
