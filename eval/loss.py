"""Loss on held-out text: in total, by domain, and by how often the suffix N-gram was seen in training.

    python -m eval.loss --checkpoint RUN [--against RUN]

Nats a token and bits a byte with intervals over documents; between checkpoints, differences on the same tokens.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Iterator
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from engram.backbone import token_losses
from engram.pages import GREY, table
from engram.training.data import Batch
from eval.shared.command import main
from eval.shared.groups import Groups, Kind, all_tokens
from eval.shared.page import interval
from eval.shared.pictures import draw_shares, name_counts, plot_intervals
from eval.shared.question import Asked, Question, Result
from eval.shared.strata import SuffixCounts, add_options, count_suffixes, hot_from_of
from eval.shared.subjects import Subject

_ABOUT = """<p>How well each checkpoint predicts text that none was trained on. Lower is better. Tokens are told apart
by the domain of their document, by whether the same pair of tokens stood earlier in the document's part of the window,
and by how often the suffix N-gram before them, which is all that an N-gram memory is asked with, was seen in training.
Brackets hold 95&nbsp;% intervals from drawing documents again; differences are taken token by token, so they are far
better known than the losses themselves: below zero, the other checkpoint is better than the first.</p>"""


def token_nats(asked: Asked, subject: Subject) -> Iterator[NDArray[np.float64]]:
    """Loss in nats of every held-out token, batch after batch `[tokens]`."""

    def measure(batch: Batch) -> Any:
        with asked.precision():
            hidden = subject.model.run(batch["tokens"], batch["document_ids"]).hidden
            return token_losses(hidden, subject.model.head_weight, batch["targets"])

    return asked.held_out.of_each_token(subject, measure, f"losses of {subject.name}")


def grouped(asked: Asked) -> tuple[Groups, SuffixCounts]:
    """Groups of the text, those of times seen by what the first checkpoint was trained on. Raises `ConfigError` for bad
    options of them."""
    hot_from = hot_from_of(asked.options)
    suffixes = count_suffixes(asked.held_out, asked.subjects[0], asked.options.order, asked.options.train_tokens)
    text = asked.held_out.whole
    kinds = [
        all_tokens(text["targets"].size),
        Kind("domain", list(asked.held_out.domains), text["domains"]),
        Kind("pair", ["new pairs", "repeated pairs"], text["repeated"]),
        suffixes.by_stratum(hot_from),
        suffixes.by_count(),
    ]
    return Groups(text["target_documents"], kinds), suffixes


def described(asked: Asked, groups: Groups, suffixes: SuffixCounts) -> Result:
    """What a page says of the groups that `grouped` made, and how."""
    n_bytes = groups.summed([asked.held_out.whole["target_bytes"].ravel()]).sum(0).astype(int).tolist()
    told = zip(groups.described(), n_bytes, groups.distinct(suffixes.numbers), strict=True)
    return {
        "order": suffixes.order,
        "hot_from": hot_from_of(asked.options),
        "groups": [{**group, "bytes": size, "ngrams": ngrams} for group, size, ngrams in told],
    }


def measure(asked: Asked) -> Result:
    """Losses of all groups for each checkpoint, and their differences from the first."""
    groups, suffixes = grouped(asked)
    nats = {subject.name: groups.summed(token_nats(asked, subject)) for subject in asked.subjects}
    first = nats[asked.subjects[0].name]
    # In nats, so that nats over them are bits over bytes.
    in_bits = groups.summed([asked.held_out.whole["target_bytes"].ravel()]) * np.log(2)
    answers = {
        name: {
            "nats": groups.mean(sums),
            "bits_per_byte": groups.mean(sums, over=in_bits),
            "difference": groups.mean(sums - first),
        }
        for name, sums in nats.items()
    }
    return {**described(asked, groups, suffixes), "checkpoints": answers}


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
