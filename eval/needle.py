"""Retrieval from long contexts: what was hidden at some depth of a text is asked for at its end.

    python -m eval.needle --checkpoint RUN [--against RUN] [--lengths 256 512 1024] [--yarn]

After RULER (arXiv:2404.06654), on synthetic texts whose keys no checkpoint was trained on (`engram.synthetic.needle`);
beyond the trained length with the model's positions as they are, or extended by YaRN (arXiv:2309.00071).
"""

from __future__ import annotations

import argparse
import dataclasses
import html
import math
import sys
from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from tokenizers import Tokenizer

from engram.backbone import EngramLM, extend_context
from engram.config import ConfigError, require
from engram.pages import table
from engram.synthetic.needle import Needle, Retrieval
from engram.training import probes
from engram.training.tokenizer import eos_id
from eval.shared.command import main
from eval.shared.page import interval
from eval.shared.progress import shown
from eval.shared.proportions import proportion
from eval.shared.question import Asked, Question, Result
from eval.shared.subjects import Subject

_ABOUT = """<p>Sentences that tell a number or a name are hidden in a long text about nothing, at different depths (0 is
its start, 1 its end), and asked for at its end: one key's number (single); that of one of several keys (multi key);
several numbers of one key in their order (multi value); the numbers of several keys (multi query); the names that were
set to a number, directly or by way of each other, beside a second such chain (variable tracking). No key was met in
training. An answer is right if the model would write all of it by itself, after the right answers before it. Lengths
are in tokens, and in multiples of the length that the first checkpoint was trained on. Brackets hold 95&nbsp;% Wilson
intervals, in which all answers to one text count as one trial; a cell of the picture has one answer a text at most.
Chance is a guess among all that is hidden; with a single needle, among all numbers. Columns that say YaRN are of a
checkpoint whose positions were extended for this question, without training: its rotary channels that never turned
once in training turn slower, so that they stay within angles that they know (arXiv:2309.00071).</p>"""


class Asking(NamedTuple):
    """Texts of one kind and length, the same for all checkpoints, as written and as models read them."""

    kind: str
    length: int
    texts: list[Retrieval]
    questions: list[probes.Question]


class Way(NamedTuple):
    """A checkpoint, with its positions as they are or extended by a factor (0: by as much as a text is too long)."""

    name: str
    subject: Subject
    extended: bool
    factor: float = 0.0

    def model_for(self, length: int) -> EngramLM:
        """The model that reads texts of this length."""
        if not self.extended:
            return self.subject.model
        trained = trained_length(self.subject)
        return extend_context(self.subject.model, self.factor or max(1.0, length / trained), trained)


def trained_length(subject: Subject) -> int:
    """Tokens of a window of its training, or if that is not known its longest."""
    return subject.model.config.max_seq_len if subject.run is None else subject.run.data.config.seq_len


def measure(asked: Asked) -> Result:
    """Share of right answers, and nats an answer, for each kind, length and depth."""
    options, first = asked.options, asked.subjects[0]
    for name, least in (("examples", 1), ("depths", 2), ("batch_size", 0)):
        value = getattr(options, name)
        require(value >= least, name.replace("_", "-"), value, f"{least} or more")
    known = options.yarn is None or options.yarn == 0 or 1 <= options.yarn < math.inf
    require(known, "yarn", options.yarn, "a factor of 1 or more (0: a text's length over the trained one)")
    task = _task(first, options)
    depths = np.linspace(0, 1, max(options.depths, task.needles)).round(4).tolist()
    lengths = options.lengths or [times * trained_length(first) for times in (1, 2, 4)]
    askings, too_short = _askings(task, lengths, depths, options.examples, first)
    ways = [Way(subject.name, subject, False) for subject in asked.subjects]
    if options.yarn is not None:
        ways += [Way(f"{subject.name}, YaRN", subject, True, options.yarn) for subject in asked.subjects]
    answers: dict[str, list[Result]] = {way.name: [] for way in ways}
    for way, asking in shown([(way, asking) for asking in askings for way in ways], "asking"):
        with asked.precision():
            size = options.batch_size or max(1, 8192 // asking.length)
            found = probes.ask(way.model_for(asking.length), asking.questions, size)
        answers[way.name].append(_told(asking, found, depths))
    return {
        "needles": task.needles,
        "digits": task.digits,
        "depths": depths,
        "trained": {subject.name: trained_length(subject) for subject in asked.subjects},
        "too_short": too_short,
        "askings": [
            {
                "kind": asking.kind,
                "length": asking.length,
                "texts": len(asking.texts),
                "chance": asking.texts[0].example.chance,
            }
            for asking in askings
        ],
        "checkpoints": answers,
    }


def _task(first: Subject, options: argparse.Namespace) -> Needle:
    """As it was trained on, if it was, with the kinds and number of needles that are asked for."""
    portion = None if first.run is None else first.run.data.config.portions().get(Needle.name)
    task = Needle() if portion is None or not isinstance(portion.task, Needle) else portion.task
    return dataclasses.replace(
        task, kinds=tuple(options.kinds or Needle().kinds), needles=options.needles or task.needles
    )


def _askings(
    task: Needle, lengths: Sequence[int], depths: Sequence[float], n: int, first: Subject
) -> tuple[list[Asking], list[tuple[str, int]]]:
    """The texts of all kinds and lengths, and which of these leave no room for the question.

    Raises `ConfigError` if all do, and for a checkpoint without a tokenizer.
    """
    if first.tokenizer is None:
        raise ConfigError(f"{str(first.path)!r} has no tokenizer")
    tokenizer, refused = Tokenizer.from_str(first.tokenizer.to_str()), None
    eos = eos_id(tokenizer, "" if first.run is None else first.run.data.config.eos_token)
    askings, too_short = [], []
    for kind, length in shown([(kind, length) for kind in task.kinds for length in lengths], "writing texts"):
        try:
            texts = _texts(task, kind, length, depths, n, tokenizer)
        except ConfigError as error:
            refused = error
            too_short.append((kind, length))
            continue
        examples = [text.example for text in texts]
        askings.append(Asking(kind, length, texts, probes.questions_of(examples, tokenizer, eos)))
    if refused is not None and not askings:
        raise refused
    return askings, too_short


def _texts(
    task: Needle, kind: str, length: int, depths: Sequence[float], n: int, tokenizer: Tokenizer
) -> list[Retrieval]:
    """`n` texts whose answers meet every depth equally often, and none twice in a text."""
    tokenizer.encode_special_tokens = True
    random, n_answers = Random(f"{kind} {length}"), task.n_answers(kind)

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    texts = []
    for i in range(n):
        chosen = [depths[(i + k * len(depths) // n_answers) % len(depths)] for k in range(n_answers)]
        texts.append(task.retrieval(kind, random.sample(chosen, n_answers), length, count, random))
    return texts


def _told(asking: Asking, found: probes.Answers, depths: Sequence[float]) -> Result:
    """Of one checkpoint's answers: all of them, and by depth."""
    depth_of = np.concatenate([text.depths for text in asking.texts])
    right, n = int(found.right.sum()), len(found.right)
    members = [depth_of == depth for depth in depths]
    return {
        "all": proportion(right, n, trials=len(asking.texts)),
        "nats": float(found.nats.mean()),
        "by_depth": [proportion(int(found.right[who].sum()), int(who.sum())) for who in members],
    }


def draw(result: Result) -> Any:
    """Share of right answers by depth and length: a row for each kind, a column for each checkpoint."""
    askings, answers, depths = result["askings"], result["checkpoints"], result["depths"]
    kinds = list(dict.fromkeys(asking["kind"] for asking in askings))
    lengths = list(dict.fromkeys(asking["length"] for asking in askings))
    size = (1.6 + (0.8 + 0.62 * len(lengths)) * len(answers), 0.9 + (0.4 + 0.19 * len(depths)) * len(kinds))
    figure, axes = plt.subplots(
        len(kinds), len(answers), figsize=size, layout="constrained", squeeze=False, sharex=True, sharey=True
    )
    for column, (name, told) in enumerate(answers.items()):
        grids = {kind: np.full((len(depths), len(lengths)), np.nan) for kind in kinds}
        for asking, answer in zip(askings, told, strict=True):
            values = [np.nan if cell["value"] is None else cell["value"] for cell in answer["by_depth"]]
            grids[asking["kind"]][:, lengths.index(asking["length"])] = values
        for row, (kind, grid) in enumerate(grids.items()):
            ax = axes[row][column]
            image = ax.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            for y, x in np.argwhere(np.isfinite(grid)):
                ink = "black" if grid[y, x] > 0.6 else "white"
                ax.text(x, y, f"{100 * grid[y, x]:.0f}", ha="center", va="center", color=ink, fontsize=7)
            ax.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize=7)
            ax.set_yticks(range(len(depths)), [f"{depth:.2f}" for depth in depths], fontsize=7)
            if row == 0:
                ax.set_title(name, fontsize=8)
            if column == 0:
                ax.set_ylabel(f"{_spoken(kind)}\ndepth", fontsize=8)
    figure.supxlabel("length in tokens", fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("right answers", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def tables(result: Result) -> str:
    """Share of right answers and nats an answer, by kind and length."""
    answers, trained = result["checkpoints"], next(iter(result["trained"].values()))
    names = [html.escape(name) for name in answers]
    head = ["", "tokens", "× trained", "texts", "chance", *names, *(f"{name}, nats an answer" for name in names)]  # noqa: RUF001
    rows = []
    for i, asking in enumerate(result["askings"]):
        cells = [_spoken(asking["kind"]), f"{asking['length']:,}", f"{asking['length'] / trained:.3g}"]
        cells += [str(asking["texts"]), f"{asking['chance']:.2g}"]
        cells += [interval(told[i]["all"], 2) for told in answers.values()]
        rows.append(cells + [f"{told[i]['nats']:.2f}" for told in answers.values()])
    missing = ", ".join(f"{_spoken(kind)} in {length:,} tokens" for kind, length in result["too_short"])
    return table(head, rows) + (f"<p>No room for the question: {missing}.</p>" if missing else "")


def _spoken(kind: str) -> str:
    return kind.replace("_", " ")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of texts and positions."""
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="some of " + ", ".join(Needle().kinds) + " (all)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", metavar="TOKENS", help="of texts (1, 2 and 4 times the trained length)"
    )
    parser.add_argument("--depths", type=int, default=5, help="how many (5), and no fewer than needles")
    parser.add_argument("--examples", type=int, default=100, help="texts of each kind and length (100)")
    parser.add_argument("--needles", type=int, help="in a text (as many as in training, or 4)")
    parser.add_argument(
        "--yarn",
        type=float,
        nargs="?",
        const=0.0,
        metavar="FACTOR",
        help="also ask with positions extended by YaRN: by this factor, or (0) by a text's length over the trained one",
    )


QUESTION = Question("needle", "Retrieval from long contexts", _ABOUT, measure, draw, tables, add_options, on_text=False)

if __name__ == "__main__":
    sys.exit(main(QUESTION))
