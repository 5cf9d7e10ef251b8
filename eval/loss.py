"""Loss on held-out text: in total, by domain, and by how often the suffix N-gram was seen in training.

    python -m eval.loss --checkpoint RUN [--against RUN]

Nats a token and bits a byte with intervals over documents; between checkpoints, differences on the same tokens.
"""

from __future__ import annotations

import html
import sys
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from engram.backbone import token_losses
from engram.config import require
from engram.pages import table
from engram.training.data import Batch
from eval.shared.bootstrap import ratios, sums_by_document
from eval.shared.command import main
from eval.shared.held_out import HeldOut
from eval.shared.page import interval
from eval.shared.question import Asked, Question, Result
from eval.shared.strata import SuffixCounts, add_options, bin_name, binned, count_suffixes, stratum_names
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
    text, counts = held_out.whole(), suffixes.counts
    strata = suffixes.strata(hot_from)
    groups = {
        "all": {"all tokens": np.ones(counts.shape, bool)},
        "domain": {name: text["domains"] == i for i, name in enumerate(held_out.domains)},
        "pair": {"new pairs": text["repeated"] == 0, "repeated pairs": text["repeated"] == 1},
        "stratum": {name: strata == i for i, name in enumerate(stratum_names(hot_from))},
        "count": {bin_name(i): binned(counts) == i for i in range(int(binned(counts).max()) + 1)},
    }
    return {kind: {name: who for name, who in named.items() if who.any()} for kind, named in groups.items()}


def measure(asked: Asked) -> Result:
    """Losses of all groups for each checkpoint, and their differences from the first."""
    hot_from = asked.options.hot_from
    require(hot_from >= 2, "hot-from", hot_from, "2 or more")
    held_out, first = asked.held_out, asked.subjects[0]
    suffixes = count_suffixes(held_out, first, asked.options.order)
    text = held_out.whole()
    documents, n_bytes = text["target_documents"].ravel(), text["target_bytes"]
    groups = groups_of(held_out, suffixes, hot_from)
    members = np.stack([who.ravel() for named in groups.values() for who in named.values()], -1)  # [tokens, groups]
    nats = {subject.name: token_nats(asked, subject) for subject in asked.subjects}

    def summed(values: NDArray[Any]) -> NDArray[np.float64]:
        return sums_by_document(documents, values.ravel()[:, None] * members)

    tokens, in_bytes = summed(np.ones(n_bytes.shape)), summed(n_bytes) * np.log(2)
    answers = {}
    for name, values in nats.items():
        own, less = summed(values), summed(values - nats[first.name])
        answers[name] = {
            "nats": ratios(own, tokens),
            "bits_per_byte": ratios(own, in_bytes),
            "difference": ratios(less, tokens),
        }
    return {
        "order": suffixes.order,
        "hot_from": hot_from,
        "groups": [
            {
                "kind": kind,
                "name": name,
                "tokens": int(who.sum()),
                "bytes": int(n_bytes[who].sum()),
                "documents": len(np.unique(text["target_documents"][who])),
                "ngrams": len(np.unique(suffixes.numbers[who])),
            }
            for kind, named in groups.items()
            for name, who in named.items()
        ],
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
            _plot(ax, [answer[what][k] for k in at], name, f"C{i}")
        ax.set_xticks(range(len(at)), [groups[k]["name"] for k in at], rotation=45, ha="right", fontsize=8)
        ax.set_xlabel(f"times the suffix {result['order']}-gram was seen in training")
        ax.grid(alpha=0.25)
        ax.legend(frameon=False, fontsize=8)
    axes[0][0].set_ylabel("nats per token")
    if several:
        axes[0][1].set_ylabel(f"nats per token − those of {first}")  # noqa: RUF001
        axes[0][1].axhline(0, color="#808080", lw=1)
    shares = axes[0][0].twinx()
    total = groups[0]["tokens"]
    shares.bar(range(len(at)), [groups[k]["tokens"] / total for k in at], color="#808080", alpha=0.15)
    shares.set_ylabel("share of tokens (bars)")
    return figure


def _plot(ax: Any, intervals: list[dict[str, float | None]], name: str, colour: str) -> None:
    values = np.array([[np.nan if v is None else v for v in each.values()] for each in intervals])
    errors = np.stack([values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]])
    ax.errorbar(np.arange(len(values)), values[:, 0], errors, fmt="o-", ms=4, capsize=2, color=colour, label=name)


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
