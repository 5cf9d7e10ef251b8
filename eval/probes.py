"""Abilities apart: facts, copying, recall, arithmetic and brackets, as mixed into the training text.

    python -m eval.probes --checkpoint RUN [--against RUN] [--tasks facts recall] [--examples 500]

Questions are those of `engram.synthetic`: facts as they were told, all else in texts that are in no training document.
Facts are also told apart by how often the run was really told them.
"""

from __future__ import annotations

import argparse
import html
import sys
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from engram.config import require
from engram.pages import table
from engram.synthetic.examples import Example
from engram.synthetic.facts import Facts
from engram.synthetic.mixture import Portion
from engram.training import probes
from engram.training.data import TokenData
from eval.shared.bootstrap import ratios, sums_by_document
from eval.shared.command import main
from eval.shared.exposures import questions_about, times_told
from eval.shared.page import interval
from eval.shared.progress import shown
from eval.shared.proportions import proportion
from eval.shared.question import Asked, Question, Result
from eval.shared.strata import bin_name, binned
from eval.shared.subjects import Subject

_ABOUT = """<p>Documents of synthetic tasks were mixed into the training text, and each checkpoint is asked about them.
<b>Facts</b>, asked as they were told: which of 16 values a made-up entity has, told a known number of times; its
name stands right before the value (near), or at the start of the sentence (far); its family name is its own, or
shared with three others told of as often (so that the family name alone tells a quarter of them). Entities that
were told of 0 times are a control: nobody can know them. <b>Induction</b>: a stretch of random words comes
again and is to be copied. <b>Recall</b>: keys with values, then the keys in another order. <b>Arithmetic</b>:
modular addition, of pairs of numbers that were trained on and of pairs that never were. <b>Brackets</b>: closers of
what is still open. An answer is right if the model would write all of it by itself. Accuracies have 95&nbsp;%
Wilson intervals, in which all answers to one text count as one trial; nats an answer and differences to the first
checkpoint, on the same questions, have intervals from drawing texts again. Chance is that of somebody who knows the
format and guesses: dashed in the picture.</p>"""

Group = tuple[tuple[str, str], ...]  # names and values that its answers share; none: all answers
Members = dict[Group, NDArray[np.bool_]]
_REALLY = "really told"


def measure(asked: Asked) -> Result:
    """Accuracy and nats an answer for each task, group and checkpoint, and differences from the first one."""
    options, data = asked.options, asked.held_out.data
    require(options.examples >= 1, "examples", options.examples, "1 or more")
    portions = data.config.portions()
    require(bool(portions), "data.mixture of the first checkpoint", {}, "a mixture, which it was trained on, or --data")
    for name in options.tasks or ():
        require(name in portions, "tasks", name, "some of the mixture's: " + ", ".join(portions))
    chosen = {name: portion for name, portion in portions.items() if name in (options.tasks or portions)}
    tasks: Result = {}
    answers: dict[str, Result] = {subject.name: {} for subject in asked.subjects}
    for name, portion in shown(list(chosen.items()), "asking"):
        examples = portion.examples(options.examples, data.config.mixture_seed)
        questions = probes.questions_of(examples, data.tokenizer, data.eos_id)
        found = {}
        for subject in asked.subjects:
            with asked.precision():
                found[subject.name] = probes.ask(subject.model, questions, options.batch_size or 64)
        first = found[asked.subjects[0].name]
        groups = groups_of(examples, first.question)
        if name == Facts.name:
            groups |= _by_times_told(portion, data, asked.subjects[0], examples, first.question)
        chance = np.array([example.chance for example in examples])[first.question]
        tasks[name] = {
            "bytes": portion.n_bytes,
            "axes": _axes(examples),
            "groups": [
                {
                    "values": dict(group),
                    "texts": len(np.unique(first.question[who])),
                    "answers": int(who.sum()),
                    "chance": float(chance[who].mean()),
                }
                for group, who in groups.items()
            ],
        }
        for subject_name, own in found.items():
            answers[subject_name][name] = _told(own, first, groups)
    return {"tasks": tasks, "checkpoints": answers}


def groups_of(examples: Sequence[Example], question: NDArray[np.int64]) -> Members:
    """Which answers `[A]` are told of together: all that can be known, those of each value of a name of the examples'
    groups, those of two values where a picture tells them apart, and those of the same values of all names."""
    values = [dict(example.group) for example in examples]
    known = np.array([not example.control for example in examples])[question]
    groups: Members = {(): known}
    names = [(name,) for name in values[0]]
    for each in dict.fromkeys([*names, tuple(_axes(examples)), tuple(values[0])]):
        for example in dict.fromkeys(tuple(own[name] for name in each) for own in values):
            who = np.array([tuple(own[name] for name in each) == example for own in values])[question]
            # Controls are told of where there is nothing else: they would blur what else is told.
            group = tuple((name, str(value)) for name, value in zip(each, example, strict=True))
            groups[group] = who & known if (who & known).any() else who
    return groups


def _axes(examples: Sequence[Example]) -> list[str]:
    """Names that a picture tells answers apart by: the first along its axis, the second, if of two values, by line."""
    names = list(dict(examples[0].group))
    second = names[1:2] if len({dict(example.group)[name] for name in names[1:2] for example in examples}) == 2 else []
    return names[:1] + second


def _by_times_told(
    portion: Portion, data: TokenData, subject: Subject, examples: Sequence[Example], question: NDArray[np.int64]
) -> Members:
    """Groups of facts by how often a run told them; none if the run is not known, or was on another text."""
    if subject.run is None or subject.run.corpus != data.corpus_hash:
        return {}
    assert isinstance(portion.task, Facts)
    facts = portion.task.facts(portion.n_bytes, data.config.mixture_seed)
    times = times_told(subject.run.data, facts, subject.run.windows())
    told = {text: n for fact, n in zip(facts, times, strict=True) for text in questions_about(fact)}
    level = binned(np.array([told[example.text] for example in examples]))[question]
    names = {i: bin_name(i) for i in sorted(set(level.tolist()))}
    place = np.array([dict(example.group)["place"] for example in examples])[question]
    groups = {
        ((_REALLY, name), ("place", where)): (level == i) & (place == where)
        for i, name in names.items()
        for where in dict.fromkeys(place.tolist())
    }
    return {group: who for group, who in groups.items() if who.any()}


def _told(own: probes.Answers, first: probes.Answers, groups: Members) -> Result:
    """Of one checkpoint's answers in all groups."""
    members = np.stack(list(groups.values()), -1)  # [A, groups]

    def summed(values: NDArray[Any]) -> NDArray[np.float64]:
        return sums_by_document(own.question, values.astype(float)[:, None] * members)

    n = summed(np.ones(len(own.right)))
    right = [
        proportion(int(own.right[who].sum()), int(who.sum()), trials=len(np.unique(own.question[who])))
        for who in groups.values()
    ]
    difference = ratios(summed(own.right.astype(float) - first.right), n)
    return {"accuracy": right, "nats": ratios(summed(own.nats), n), "difference": difference}


def draw(result: Result) -> Any:
    """Accuracy of each task over its groups: a panel for each, a colour for each checkpoint."""
    panels = []
    for name, task in result["tasks"].items():
        panels.append((name, task["axes"]))
        if any(_REALLY in group["values"] for group in task["groups"]):
            panels.append((name, [_REALLY, "place"]))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.4 * columns, 3.4 * rows), layout="constrained", squeeze=False, sharey=True
    )
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (name, names) in zip(axes.flat, panels, strict=False):
        told = {checkpoint: answer[name]["accuracy"] for checkpoint, answer in result["checkpoints"].items()}
        _panel(ax, result["tasks"][name]["groups"], told, names)
        ax.set_title(name, fontsize=10)
    for row in axes:
        row[0].set_ylabel("share of right answers")
    return figure


def _panel(ax: Any, groups: Sequence[Result], told: dict[str, list[Result]], names: Sequence[str]) -> None:
    """Accuracies over the values of the first name, in a line for each value of the second, if there is one."""
    at = [i for i, group in enumerate(groups) if list(group["values"]) == list(names)]
    places = [list(groups[i]["values"].values()) for i in at]
    labels = list(dict.fromkeys(first for first, *_ in places))
    for colour, (checkpoint, accuracy) in enumerate(told.items()):
        for line, style in zip(dict.fromkeys(tuple(rest) for _, *rest in places), ("o-", "s:"), strict=False):
            mine = [i for i, (_, *rest) in zip(at, places, strict=True) if (*rest,) == line]
            xs = [labels.index(groups[i]["values"][names[0]]) for i in mine]
            values = [accuracy[i] for i in mine]
            value, low, high = (np.array([each[k] for each in values], float) for k in ("value", "low", "high"))
            errors = np.stack([value - low, high - value]).clip(min=0)
            label = ", ".join((checkpoint, *line))
            ax.errorbar(xs, value, errors, fmt=style, ms=4, capsize=2, color=f"C{colour}", label=label)
    chance = {labels.index(first): groups[i]["chance"] for i, (first, *_) in zip(at, places, strict=True)}
    ax.plot(*zip(*sorted(chance.items()), strict=True), "--", color="#808080", lw=1, label="chance")
    ax.set_xticks(range(len(labels)), labels, fontsize=8)
    spoken = {"exposures": "times told", _REALLY: "times told in the windows of the first run"}
    ax.set_xlabel(spoken.get(names[0], names[0]))
    ax.set_ylim(-0.02, 1.02)
    ax.grid(alpha=0.25)
    ax.legend(frameon=False, fontsize=7)


def tables(result: Result) -> str:
    """Accuracy, differences and nats of each task by group."""
    answers = result["checkpoints"]
    first = next(iter(answers))
    parts = []
    for task, told in result["tasks"].items():
        head = [html.escape(task), "texts", "answers", "chance", *(html.escape(name) for name in answers)]
        head += [f"{html.escape(name)} less {html.escape(first)}" for name in answers if name != first]
        head += [f"{html.escape(name)}, nats an answer" for name in answers]
        rows = []
        for i, group in enumerate(told["groups"]):
            name = ", ".join(f"{name}: {value}" for name, value in group["values"].items()) or "all but controls"
            cells = [html.escape(name), str(group["texts"]), str(group["answers"]), f"{group['chance']:.3f}"]
            cells += [interval(answer[task]["accuracy"][i], 2) for answer in answers.values()]
            cells += [interval(a[task]["difference"][i], 2, "+") for name, a in answers.items() if name != first]
            rows.append(cells + [interval(answer[task]["nats"][i], 2) for answer in answers.values()])
        parts.append(table(head, rows))
    return "\n".join(parts)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the questions."""
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="some of those of the mixture (all)")
    parser.add_argument("--examples", type=int, default=500, help="questions of each task, about (500)")


QUESTION = Question("probes", "Abilities apart", _ABOUT, measure, draw, tables, add_options)

if __name__ == "__main__":
    sys.exit(main(QUESTION))
