"""Loss on held-out text: in total, by domain, and by how often the suffix N-gram was seen in training.

    python -m eval.loss --checkpoint RUN [--against RUN]

Nats a token and bits a byte with intervals over documents; between checkpoints, differences on the same tokens.
"""

from __future__ import annotations

import html
import sys
from functools import cached_property
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from engram.backbone import token_losses
from engram.pages import GREY, table
from engram.training.data import Batch
from eval.shared.bootstrap import ratios
from eval.shared.command import main
from eval.shared.held_out import HeldOut
from eval.shared.page import interval
from eval.shared.pictures import draw_shares, name_counts, plot_intervals
from eval.shared.question import Asked, Question, Result
from eval.shared.strata import SuffixCounts, add_options, bin_name, binned, count_suffixes, hot_from_of, stratum_names
from eval.shared.subjects import Subject

_ABOUT = """<p>How well each checkpoint predicts text that none was trained on. Lower is better. Tokens are told apart
by the domain of their document, by whether the same pair of tokens stood earlier in the document's part of the window,
and by how often the suffix N-gram before them, which is all that an N-gram memory is asked with, was seen in training.
Brackets hold 95&nbsp;% intervals from drawing documents again; differences are taken token by token, so they are far
better known than the losses themselves: below zero, the other checkpoint is better than the first.</p>"""


def token_nats(asked: Asked, subject: Subject, about: str = "") -> NDArray[np.float64]:
    """Loss in nats of every held-out token `[windows, T]`."""

    def measure(batch: Batch) -> Any:
        with asked.precision():
            hidden = subject.model.run(batch["tokens"], batch["document_ids"]).hidden
            return token_losses(hidden, subject.model.head_weight, batch["targets"])

    return asked.held_out.of_each_token(subject, measure, about or f"losses of {subject.name}")


def groups_of(held_out: HeldOut, suffixes: SuffixCounts, hot_from: int) -> dict[str, dict[str, NDArray[np.bool_]]]:
    """Which tokens `[windows, T]` are told of together: kinds of groups, their names, and members."""
    text, counts = held_out.whole, suffixes.counts
    strata = suffixes.strata(hot_from)
    groups = {
        "all": {"all tokens": np.ones(counts.shape, bool)},
        "domain": {name: text["domains"] == i for i, name in enumerate(held_out.domains)},
        "pair": {"new pairs": text["repeated"] == 0, "repeated pairs": text["repeated"] == 1},
        "stratum": {name: strata == i for i, name in enumerate(stratum_names(hot_from))},
        "count": {bin_name(i): binned(counts) == i for i in range(int(binned(counts).max()) + 1)},
    }
    return {kind: {name: who for name, who in named.items() if who.any()} for kind, named in groups.items()}


class Groups:
    """The groups that `groups_of` makes, and sums over their tokens.

    described: of each what a page says of it, kind and name first.
    """

    def __init__(self, held_out: HeldOut, suffixes: SuffixCounts, hot_from: int) -> None:
        text, named = held_out.whole, groups_of(held_out, suffixes, hot_from)
        documents, n_bytes = text["target_documents"], text["target_bytes"]
        self.order, self.hot_from, self.n_bytes = suffixes.order, hot_from, n_bytes
        numbers, self._place = np.unique(documents.ravel(), return_inverse=True)
        self._n_documents = len(numbers)
        self._members = [who.ravel() for each in named.values() for who in each.values()]
        self.described = [
            {
                "kind": kind,
                "name": name,
                "tokens": int(who.sum()),
                "bytes": int(n_bytes[who].sum()),
                "documents": len(np.unique(documents[who])),
                "ngrams": len(np.unique(suffixes.numbers[who])),
            }
            for kind, each in named.items()
            for name, who in each.items()
        ]

    @cached_property
    def tokens(self) -> NDArray[np.float64]:
        """How many there are `[documents, groups]`."""
        return self.summed(np.ones(len(self._place)))

    def summed(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Sums of a value of each token `[windows, T]` by document and group, `[documents, groups]`."""
        values = values.ravel()  # a group at a time: all of them at once would be as many copies of the text
        sums = [np.bincount(self._place[who], values[who], self._n_documents) for who in self._members]
        return np.stack(sums, -1)


def grouped(asked: Asked) -> Groups:
    """Groups of the text, by what the first checkpoint was trained on. Raises `ConfigError` for bad options of them."""
    hot_from = hot_from_of(asked.options)
    return Groups(asked.held_out, count_suffixes(asked.held_out, asked.subjects[0], asked.options.order), hot_from)


def measure(asked: Asked) -> Result:
    """Losses of all groups for each checkpoint, and their differences from the first."""
    groups = grouped(asked)
    nats = {subject.name: token_nats(asked, subject) for subject in asked.subjects}
    first = nats[asked.subjects[0].name]
    in_bits = groups.summed(groups.n_bytes) * np.log(2)  # bytes, such that nats over them are bits over bytes
    answers = {}
    for name, values in nats.items():
        own, less = groups.summed(values), groups.summed(values - first)
        answers[name] = {
            "nats": ratios(own, groups.tokens),
            "bits_per_byte": ratios(own, in_bits),
            "difference": ratios(less, groups.tokens),
        }
    return {
        "order": groups.order,
        "hot_from": groups.hot_from,
        "groups": groups.described,
        "checkpoints": answers,
    }


def draw(result: Result) -> Any:
    """Loss against how often the suffix was seen, and, with several checkpoints, its difference from the first."""
    groups, answers = result["groups"], result["checkpoints"]
    at = [i for i, group in enumerate(groups) if group["kind"] == "count"]
    first = next(iter(answers))
    several = len(answers) > 1
    figure, axes = plt.subplots(1, 1 + several, figsize=(6.2 * (1 + several), 4.2), layout="constrained", squeeze=False)
    for ax, what in zip(axes[0], ("nats", "difference"), strict=False):
        for i, (name, answer) in enumerate(answers.items()):
            if what == "difference" and name == first:
                continue
            plot_intervals(ax, [answer[what][k] for k in at], label=name, color=f"C{i}")
        name_counts(ax, groups, result["order"])
        ax.legend(frameon=False, fontsize=8)
    axes[0][0].set_ylabel("nats per token")
    if several:
        axes[0][1].set_ylabel(f"nats per token − those of {first}")  # noqa: RUF001
        axes[0][1].axhline(0, color=GREY, lw=1)
    draw_shares(axes[0][0], groups)
    return figure


def tables(result: Result) -> str:
    """Losses of all groups but the fine ones by count, which the picture shows."""
    answers = result["checkpoints"]
    first = next(iter(answers))
    parts = []
    for measured, unit, digits in (("nats", "nats a token", 3), ("bits_per_byte", "bits a byte", 3)):
        head = ["", "tokens", "documents", *(f"{html.escape(name)}, {unit}" for name in answers)]
        others = [name for name in answers if name != first] if measured == "nats" else []
        head += [f"{html.escape(name)} less {html.escape(first)}" for name in others]
        rows = []
        for i, group in enumerate(result["groups"]):
            if group["kind"] != "count":
                cells = [html.escape(group["name"]), f"{group['tokens']:,}", str(group["documents"])]
                cells += [interval(answer[measured][i], digits) for answer in answers.values()]
                rows.append(cells + [interval(answers[name]["difference"][i], 4, "+") for name in others])
        parts.append(table(head, rows))
    return "\n".join(parts)


QUESTION = Question("loss", "Loss by domain and by times seen", _ABOUT, measure, draw, tables, add_options)

if __name__ == "__main__":
    sys.exit(main(QUESTION))
