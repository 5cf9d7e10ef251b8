"""Gates of the memory on held-out text: where they open, for which N-grams, and how large the update is.

    python -m eval.gates --checkpoint RUN [--against RUN]

After the gate heat maps of arXiv:2601.07372, section 6; gates by times seen also in arXiv:2601.16531.
"""

from __future__ import annotations

import argparse
import html
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engram.config import ConfigError, require
from engram.memory import Engram
from engram.pages import table
from engram.training.data import Batch
from eval.shared.command import main
from eval.shared.groups import Groups, all_tokens
from eval.shared.heat_map import Shades, Text, heat_map, side_by_side, visible
from eval.shared.observe import observed, places_of
from eval.shared.page import interval
from eval.shared.pictures import draw_shares, name_counts, plot_intervals
from eval.shared.pieces import Pieces
from eval.shared.question import Asked, Question, Result
from eval.shared.strata import SuffixCounts, count_suffixes, hot_from_of
from eval.shared.strata import add_options as add_strata_options
from eval.shared.subjects import Subject

Floats = NDArray[np.float64]
_NONE = "no memory"
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)

_ABOUT = """<p>Before some blocks a memory adds an update to the hidden state, and a gate between 0 (shut) and 1 (open)
multiplies what its rows say, for each token and residual branch. A gate alone is not the size of the update, since
what it multiplies may be small and a convolution follows: the share beside it is the update's length over that of the
hidden state it is added to. Brackets hold 95&nbsp;% intervals from drawing documents again. Times seen are those of
the suffix N-gram, which ends in the token itself.</p>"""


def gates_and_updates(asked: Asked, subject: Subject) -> Iterator[Floats]:
    """Of every held-out token, memory and branch the gate and the update's share of the hidden state, batch after
    batch `[tokens, memories, M, 2]`; memories in the order of their blocks."""

    # The hidden state before each memory, and with its update.
    places = pairwise(places_of(subject.model))
    pairs = {int(after.depth): (before, after) for before, after in places if after.depth % 1}

    def measure(batch: Batch) -> Tensor:
        with asked.precision(), observed(subject.model, [*chain(*pairs.values())]) as states:
            gates = subject.model.run(batch["tokens"], batch["document_ids"]).gates
        found = []
        for layer in sorted(gates):
            before, after = (states[place.name].float() for place in pairs[layer])
            before, after = (h if h.ndim == 4 else h.unsqueeze(2) for h in (before, after))
            found.append(torch.stack([gates[layer], (after - before).norm(dim=-1) / before.norm(dim=-1)], -1))
        return torch.stack(found, 2)

    return asked.held_out.of_each_token(subject, measure, f"gates of {subject.name}")


def measure(asked: Asked) -> Result:
    """Gates by group, their distribution, the N-grams with the most open and most shut ones, and excerpts."""
    options = asked.options
    hot_from = hot_from_of(options)
    for name in ("least", "lists", "excerpt_tokens"):
        require(getattr(options, name) >= 1, name.replace("_", "-"), getattr(options, name), "1 or more")
    held_out = asked.held_out
    allowed = f"0 to {held_out.n_windows}, the windows of the held-out text"
    require(0 <= options.excerpts <= held_out.n_windows, "excerpts", options.excerpts, allowed)
    gated = [subject for subject in asked.subjects if _has_gates(subject)]
    if not gated:
        without = ", ".join(f"{subject.name} ({subject.memory_kind or _NONE})" for subject in asked.subjects)
        raise ConfigError(f"none of the checkpoints has gates: {without}")
    suffixes = count_suffixes(held_out, asked.subjects[0], options.order, options.train_tokens)
    text, pieces = held_out.whole, Pieces(held_out.data.tokenizer)
    kinds = [all_tokens(text["tokens"].size), suffixes.by_stratum(hot_from), suffixes.by_count()]
    groups = Groups(text["document_ids"], kinds)
    drawn = np.random.default_rng(options.seed).permutation(held_out.n_windows)[: options.excerpts].tolist()
    spelt = Spelling(suffixes, text["tokens"], text["document_ids"], pieces)
    answers: dict[str, Any] = {
        subject.name: {"memory": subject.memory_kind or _NONE, "gates": []} for subject in asked.subjects
    }
    for subject in gated:
        layers, M = sorted(int(name) for name in subject.model.memory), subject.model.config.branches
        kept = Kept((*text["tokens"].shape, len(layers), M), drawn, options.excerpt_tokens)
        sums = groups.summed(kept.passed(gates_and_updates(asked, subject)))
        means = groups.means(sums.reshape(*sums.shape[:2], -1))
        answer = answers[subject.name]
        for cell, (i, m) in enumerate(np.ndindex(len(layers), M)):
            quantiles = np.quantile(kept.gates[:, :, i, m].astype(np.float64), QUANTILES)
            answer["gates"].append(
                {
                    "layer": layers[i],
                    "branch": m,
                    "quantiles": dict(zip(map(str, QUANTILES), quantiles, strict=True)),
                    "gate": [each[2 * cell] for each in means],
                    "update": [each[2 * cell + 1] for each in means],
                    "excerpts": [_rounded(excerpt[:, i, m, 0]) for excerpt in kept.excerpts],
                    "updates": [_rounded(excerpt[:, i, m, 1]) for excerpt in kept.excerpts],
                }
            )
        mean_gates = (kept.gates[:, :, i].mean(-1, dtype=np.float64) for i in range(len(layers)))
        answer["ngrams"] = [
            {"layer": layer, **extremes(gate, suffixes, spelt, options.least, options.lists)}
            for layer, gate in zip(layers, mean_gates, strict=True)
        ]
    return {
        "order": suffixes.order,
        "hot_from": hot_from,
        "least": options.least,
        "counted_in": asked.subjects[0].name,
        "groups": [
            {**group, "ngrams": ngrams}
            for group, ngrams in zip(groups.described(), groups.distinct(suffixes.numbers), strict=True)
        ],
        "excerpts": {
            "seed": options.seed,
            "of_windows": held_out.n_windows,
            "windows": drawn,
            "pieces": [pieces(text["tokens"][w, : options.excerpt_tokens]) for w in drawn],
            "seen": [suffixes.counts[w, : options.excerpt_tokens] for w in drawn],
        },
        "checkpoints": answers,
    }


def _has_gates(subject: Subject) -> bool:
    return any(isinstance(memory, Engram) for memory in subject.model.memories().values())


def _rounded(values: Floats) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


class Kept:
    """What is kept of single tokens, beside sums: all gates, for quantiles and N-grams, and some windows' excerpts.

    gates: `[windows, T, memories, M]`, in the float32 that models compute them in. excerpts: gates and updates of the
    first tokens of each window that is shown, `[tokens, memories, M, 2]`.
    """

    def __init__(self, shape: tuple[int, int, int, int], shown: Sequence[int], tokens: int) -> None:
        self.gates = np.empty(shape, np.float32)
        self.excerpts = [np.empty((min(tokens, shape[1]), *shape[2:], 2)) for _ in shown]
        self._shown = shown

    def passed(self, parts: Iterable[Floats]) -> Iterator[Floats]:
        """The parts of `gates_and_updates`, which leave here what is kept of them."""
        seq_len, window = self.gates.shape[1], 0
        for part in parts:
            windows = part.reshape(-1, seq_len, *part.shape[1:])
            self.gates[window : window + len(windows)] = windows[..., 0]
            for excerpt, at in zip(self.excerpts, self._shown, strict=True):
                if window <= at < window + len(windows):
                    excerpt[:] = windows[at - window, : len(excerpt)]
            window += len(windows)
            yield part


class Spelling:
    """N-grams of a held-out text by number, as they are spelt where they stand first."""

    def __init__(
        self, suffixes: SuffixCounts, ids: NDArray[np.int64], documents: NDArray[np.int64], pieces: Pieces
    ) -> None:
        self._ids, self._documents, self._pieces, self._order = ids, documents, pieces, suffixes.order
        self._first = np.unique(suffixes.numbers, return_index=True)[1]

    def __call__(self, number: int) -> list[str]:
        """Tokens as text; fewer than N where the N-gram begins before the start of its document or window."""
        window, t = divmod(int(self._first[number]), self._ids.shape[1])
        start = max(0, t - self._order + 1)
        inside = self._documents[window, start : t + 1] == self._documents[window, t]
        return self._pieces(self._ids[window, start : t + 1][inside])


def extremes(gate: Floats, suffixes: SuffixCounts, spelt: Spelling, least: int, lists: int) -> dict[str, Any]:
    """The N-grams, of those that stand `least` times in the text, over which a gate `[windows, T]` is largest and
    smallest in the mean."""
    numbers = suffixes.numbers.ravel()
    times = np.bincount(numbers)
    means = np.bincount(numbers, gate.ravel()) / times
    spread = np.sqrt(np.maximum(np.bincount(numbers, gate.ravel() ** 2) / times - means**2, 0))
    seen = np.zeros_like(times)
    seen[numbers] = suffixes.counts.ravel()
    often = np.flatnonzero(times >= least)
    ascending = often[np.argsort(means[often], kind="stable")]

    def told(which: NDArray[np.int64]) -> list[dict[str, Any]]:
        return [
            {
                "tokens": spelt(number),
                "mean": float(means[number]),
                "spread": float(spread[number]),
                "times": int(times[number]),
                "seen": int(seen[number]),
            }
            for number in which
        ]

    return {"ngrams": len(often), "open": told(ascending[::-1][:lists]), "shut": told(ascending[:lists])}


def _label(cell: dict[str, Any], several: bool) -> str:
    return f"block {cell['layer']}" + (f", branch {cell['branch']}" if several else "")


def _labels(answer: dict[str, Any]) -> list[str]:
    several = any(cell["branch"] for cell in answer["gates"])
    return [_label(cell, several) for cell in answer["gates"]]


def draw(result: Result) -> Any:
    """Gate and share of the update against times seen, and how gates are distributed; a column for each checkpoint."""
    answers = {name: answer for name, answer in result["checkpoints"].items() if answer["gates"]}
    groups = result["groups"]
    at = [i for i, group in enumerate(groups) if group["kind"] == "count"]
    figure, axes = plt.subplots(
        3, len(answers), figsize=(6.2 * len(answers), 10.5), layout="constrained", squeeze=False, sharey="row"
    )
    for column, (name, answer) in zip(axes.T, answers.items(), strict=True):
        layers = list(dict.fromkeys(cell["layer"] for cell in answer["gates"]))
        labels = _labels(answer)
        for cell, label in zip(answer["gates"], labels, strict=True):
            colour, line = f"C{layers.index(cell['layer'])}", ("-", "--", "-.", ":")[cell["branch"] % 4]
            for ax, what in zip(column, ("gate", "update"), strict=False):
                style = {"fmt": f"o{line}", "ms": 3, "color": colour, "label": label}
                plot_intervals(ax, [cell[what][k] for k in at], **style)
        column[0].set_title(name)
        for ax in column[:2]:
            name_counts(ax, groups, result["order"])
            ax.legend(frameon=False, fontsize=8)
        draw_shares(column[0], groups)
        keys = {"whislo": "0.05", "q1": "0.25", "med": "0.5", "q3": "0.75", "whishi": "0.95"}
        boxes = [{key: cell["quantiles"][q] for key, q in keys.items()} for cell in answer["gates"]]
        column[2].bxp(boxes, showfliers=False, orientation="vertical", widths=0.5)
        column[2].set_xticks(range(1, len(labels) + 1), labels, rotation=20, ha="right", fontsize=8)
        column[2].grid(alpha=0.25)
    for ax, label in zip(
        axes[:, 0],
        ("mean gate", "mean |update| / |hidden state|", "gate: 5, 25, 50, 75 and 95 % of tokens below"),
        strict=True,
    ):
        ax.set_ylabel(label)
    return figure


def tables(result: Result) -> str:
    """Means by stratum, distribution, heat maps and N-grams."""
    answers = result["checkpoints"]
    without = [f"{html.escape(name)} ({answer['memory']})" for name, answer in answers.items() if not answer["gates"]]
    gated = {name: answer for name, answer in answers.items() if answer["gates"]}
    parts = [f"<p>Without gates: {', '.join(without)}.</p>"] if without else []
    parts += [_means(result, gated), _distribution(gated), _maps(result, gated), _lists(result, gated)]
    return "\n".join(parts)


def _means(result: Result, gated: dict[str, Any]) -> str:
    at = [i for i, group in enumerate(result["groups"]) if group["kind"] != "count"]
    names = [
        f"{html.escape(result['groups'][i]['name'])}<br>{result['groups'][i]['tokens']:,} tokens,"
        f"<br>{result['groups'][i]['ngrams']:,} {result['order']}-grams"
        for i in at
    ]
    parts = []
    for what, told in (
        ("gate", "mean gate"),
        ("update", "mean length of the update over that of the hidden state"),
    ):
        rows = [
            [f"{html.escape(name)}, {label}", *(interval(cell[what][i], 3) for i in at)]
            for name, answer in gated.items()
            for cell, label in zip(answer["gates"], _labels(answer), strict=True)
        ]
        parts.append(f"<h3>{told[0].upper() + told[1:]}, by times the suffix {result['order']}-gram was seen</h3>")
        parts.append(table(["", *names], rows))
    return "\n".join(parts)


def _distribution(gated: dict[str, Any]) -> str:
    rows = [
        [f"{html.escape(name)}, {label}", *(f"{value:.3f}" for value in cell["quantiles"].values())]
        for name, answer in gated.items()
        for cell, label in zip(answer["gates"], _labels(answer), strict=True)
    ]
    head = ["share of tokens below", *(f"{100 * q:g} %" for q in QUANTILES)]
    return "<h3>Distribution of gates</h3>" + table(head, rows)


def _maps(result: Result, gated: dict[str, Any]) -> str:
    shown = result["excerpts"]
    if not shown["windows"]:
        return ""
    maps = []
    for k, (name, answer) in enumerate(gated.items()):
        labels = _labels(answer)
        choices = [
            Shades(label, cell["quantiles"]["0.05"], cell["quantiles"]["0.95"], cell["excerpts"])
            for cell, label in zip(answer["gates"], labels, strict=True)
        ]
        texts = [
            Text(
                f"window {window}", shown["pieces"][i], [_told(result, answer, labels, i, t) for t in range(len(seen))]
            )
            for i, (window, seen) in enumerate(zip(shown["windows"], shown["seen"], strict=True))
        ]
        maps.append(heat_map(f"gates{k}", name, choices, texts))
    about = (
        f"The first {max(map(len, shown['pieces']))} tokens of {len(shown['windows'])} of the {shown['of_windows']} "
        f"windows of held-out text, drawn with seed {shown['seed']} and not chosen by what they show. The stronger the "
        "colour, the more open the gate: white is the value below which 5 % of all held-out tokens are, full colour "
        "that of 95 %, for each block and branch by itself. Numbers appear where the pointer rests on a token. "
        "Marks: · space, ⏎ new line, ⇥ tab; \\x.. a byte that is no whole character."
    )
    return f"<h3>Gates in text</h3><p>{about}</p>{side_by_side(maps)}"


def _told(result: Result, answer: dict[str, Any], labels: list[str], text: int, t: int) -> str:
    seen = result["excerpts"]["seen"][text][t]
    lines = [f"token {t}; {result['order']}-gram seen {seen:,} times in training"]
    for cell, label in zip(answer["gates"], labels, strict=True):
        lines.append(f"update / hidden, {label}: {cell['updates'][text][t]:.3f}")
    return "\n".join([*lines, "gate:"])


def _lists(result: Result, gated: dict[str, Any]) -> str:
    N = result["order"]
    parts = [
        "<style>.grams td{white-space:nowrap}.grams td:nth-child(5){text-align:left}</style><div class=grams>"
        f"<h3>{N}-grams that open and shut the gate</h3><p>Means over all places of a {N}-gram in the held-out text, "
        f"of those with {result['least']} places or more, and over branches; ± is the standard deviation over places, "
        "and seen how often training met it. "
        f"{N}-grams that differ by case, accents or white space alone are one to a memory that compresses tokens; the "
        "spelling is the first in the text. A ▷ stands for the start of a document or window.</p>"
    ]
    for name, answer in gated.items():
        for layer in answer["ngrams"]:
            parts.append(f"<h4>{html.escape(name)}, block {layer['layer']}: {layer['ngrams']:,} such {N}-grams</h4>")
            head = ["most open", "gate", "places", "seen", "most shut", "gate", "places", "seen"]
            pairs = zip(layer["open"], layer["shut"], strict=True)
            parts.append(table(head, [_ngram(one, N) + _ngram(other, N) for one, other in pairs]))
    return "\n".join(parts) + "</div>"


def _ngram(known: dict[str, Any], order: int) -> list[str]:
    start = "▷ " if len(known["tokens"]) < order else ""
    text = "|".join(visible(piece).replace("\n", "") for piece in known["tokens"])
    gate = f"{known['mean']:.3f} ± {known['spread']:.3f}"
    return [f"<code>{start}{text}</code>", gate, f"{known['times']:,}", f"{known['seen']:,}"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of strata, lists and excerpts."""
    add_strata_options(parser)
    parser.add_argument("--least", type=int, default=5, metavar="N", help="places that a listed N-gram has at least")
    parser.add_argument("--lists", type=int, default=20, metavar="N", help="N-grams to list")
    parser.add_argument("--excerpts", type=int, default=4, metavar="N", help="windows to show, drawn by --seed")
    parser.add_argument("--excerpt-tokens", type=int, default=256, metavar="N", help="of each of them at most")
    parser.add_argument("--seed", type=int, default=0, help="that draws the windows to show")


QUESTION = Question("gates", "Gates: where the memory speaks", _ABOUT, measure, draw, tables, add_options)

if __name__ == "__main__":
    sys.exit(main(QUESTION))
