"""LogitLens: how far what each layer would answer is from what the model answers.

    python -m eval.lens --checkpoint RUN [--against RUN]

Each hidden state goes through the model's own last norm and head (nostalgebraist 2020), and KL(final || layer) is taken
(the direction of arXiv:2303.08112), as arXiv:2601.07372 does to see how early a model with memory knows its answer.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engram.backbone import EngramLM
from engram.backbone.loss import chunk_rows
from engram.pages import table
from engram.tensors import widen
from engram.training.data import Batch
from eval.shared.command import main
from eval.shared.groups import Groups, all_tokens
from eval.shared.observe import Place, mean_branch, observed, places_of
from eval.shared.page import interval
from eval.shared.pictures import bounds
from eval.shared.question import Asked, Question, Result
from eval.shared.strata import add_options, count_suffixes, hot_from_of
from eval.shared.subjects import Subject

_ABOUT = """<p>How early a model knows its answer. After the embedding, each memory and each block the hidden state is
read as if it were the last one, by the model's own final norm and output head. What comes out is compared with what the
model answers in the end: KL(final&nbsp;||&nbsp;layer) is how many nats a token it would cost to answer with the layer's
distribution if the final one were true. It is 0 after the last block; the lower it is before, the more of the answer is
there already. Agreement is the share of tokens for which both think the same next token likeliest. Residual branches
are averaged, as the model does at its end. Blocks are counted from 0.</p>
<p>If a memory spares the first blocks the work of recalling set phrases, the curve of a model that has one falls
earlier, above all where the suffix N-gram was seen often in training (warm and hot): only there have its rows learnt
something. Each checkpoint is measured against its own answer, not against the truth, and no layer but the last was
trained to be read by the head: compare curves, not single values. Brackets and bands are 95&nbsp;% intervals from
drawing documents again; differences are taken token by token.</p>"""

_KL, _AGREEMENT = 0, 1
_UNIT = "KL(final || layer), nats a token"


@torch.no_grad()
def divergences(model: EngramLM, states: Sequence[Tensor]) -> Tensor:
    """KL(last || each) in nats, and 1 where both have the same likeliest token, else 0: `[B, T, S, 2]` for S hidden
    states `[B, T, d]`. Softmax in float32 or wider; logits are held for some tokens at a time."""
    B, T, _ = states[0].shape
    chunks = zip(*(state.flatten(0, 1).split(chunk_rows(model.head_weight)) for state in states), strict=True)
    return torch.cat([_divergences(model, chunk) for chunk in chunks]).view(B, T, len(states), 2)


def _divergences(model: EngramLM, states: Sequence[Tensor]) -> Tensor:
    log_p = _log_softmax(model, states[-1])
    p, likeliest = log_p.exp(), log_p.argmax(-1)
    found = []
    for state in states:
        log_q = _log_softmax(model, state)
        agrees = log_q.argmax(-1) == likeliest
        found.append(torch.stack([(p * (log_p - log_q)).sum(-1), agrees.to(p.dtype)], -1))
    return torch.stack(found, 1)


def _log_softmax(model: EngramLM, state: Tensor) -> Tensor:
    return widen(model.logits(model.norm(state))).log_softmax(-1)


def of_tokens(asked: Asked, subject: Subject) -> Iterator[NDArray[np.float64]]:
    """Divergence and agreement of every held-out token at every place, batch after batch `[tokens, places, 2]`."""
    places = places_of(subject.model)

    def measure(batch: Batch) -> Tensor:
        with asked.precision(), observed(subject.model, places, mean_branch) as states:
            subject.model.run(batch["tokens"], batch["document_ids"])
            return divergences(subject.model, [states[place.name] for place in places])

    return asked.held_out.of_each_token(subject, measure, f"layers of {subject.name}")


def measure(asked: Asked) -> Result:
    """Divergence and agreement by place and group of tokens, and for checkpoints as deep as the first, how much their
    divergence is above its own at the places that both have."""
    hot_from = hot_from_of(asked.options)
    first = asked.subjects[0]
    suffixes = count_suffixes(asked.held_out, first, asked.options.order, asked.options.train_tokens)
    documents = asked.held_out.whole["target_documents"]
    groups = Groups(documents, [all_tokens(documents.size), suffixes.by_stratum(hot_from)])

    def means(sums: NDArray[np.float64]) -> dict[str, Any]:
        return dict(zip(groups.names, groups.means(sums), strict=True))

    answers: dict[str, Any] = {}
    of_first: dict[Place, NDArray[np.float64]] = {}
    for subject in asked.subjects:
        places, sums = places_of(subject.model), groups.summed(of_tokens(asked, subject))
        kl = dict(zip(places, np.moveaxis(sums[..., _KL], -1, 0), strict=True))
        of_first = of_first or kl
        answer = {
            "n_blocks": len(subject.model.blocks),
            "places": [place._asdict() for place in places],
            "kl": means(sums[..., _KL]),
            "agreement": means(sums[..., _AGREEMENT]),
            "difference": None,
        }
        if subject is not first and len(subject.model.blocks) == len(first.model.blocks):
            shared = [place for place in places if place in of_first]
            less = np.stack([kl[place] - of_first[place] for place in shared], -1)
            answer["difference"] = {"places": [place._asdict() for place in shared], "kl": means(less)}
        answers[subject.name] = answer
    described = [{key: group[key] for key in ("name", "tokens", "documents")} for group in groups.described()]
    return {"order": suffixes.order, "hot_from": hot_from, "groups": described, "checkpoints": answers}


def draw(result: Result) -> Any:
    """Divergence and agreement over depth for all tokens, and divergence for each stratum."""
    answers, strata = result["checkpoints"], [group["name"] for group in result["groups"][1:]]
    depths = {answer["n_blocks"] for answer in answers.values()}
    figure: Any = plt.figure(figsize=(11, 7.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.15, 1])
    left, right = above.subplots(1, 2)
    _plot(left, answers, "kl", "all tokens", depths)
    _plot(right, answers, "agreement", "all tokens", depths)
    left.set_ylabel(_UNIT)
    right.set_ylabel("share of tokens with the same likeliest token")
    left.legend(frameon=False, fontsize=8)
    axes = below.subplots(1, len(strata), sharey=True, squeeze=False)[0]
    for ax, name in zip(axes, strata, strict=True):
        _plot(ax, answers, "kl", name, depths)
        ax.set_title(name, fontsize=9)
    axes[0].set_ylabel(_UNIT)
    for ax in (left, right, axes[0]):  # once all is drawn: a limit that is set no longer grows
        ax.set_ylim(bottom=0)
    return figure


def _plot(ax: Any, answers: dict[str, Any], what: str, group: str, depths: set[int]) -> None:
    """One curve a checkpoint, over blocks passed, or over their share where the checkpoints are not equally deep."""
    relative = len(depths) > 1
    for i, (name, answer) in enumerate(answers.items()):
        x = np.array([place["depth"] for place in answer["places"]]) / (answer["n_blocks"] if relative else 1)
        y, low, high = bounds(answer[what][group]).T
        ax.fill_between(x, low, high, color=f"C{i}", alpha=0.18, lw=0)
        label = f"{name}, {answer['n_blocks']} blocks" if relative else name
        ax.plot(x, y, "-", color=f"C{i}", lw=1.5, label=label)
        behind_memory = np.array([place["depth"] % 1 != 0 for place in answer["places"]])
        for who, marker in ((~behind_memory, "o"), (behind_memory, "D")):
            ax.plot(x[who], y[who], marker, color=f"C{i}", ms=5, mfc="white" if marker == "D" else None)
    ax.plot([], [], "D", color="#808080", mfc="white", ms=5, label="after a memory")
    ax.grid(alpha=0.25)
    if relative:
        ax.set_xlabel("share of blocks passed")
    else:
        (n_blocks,) = depths
        step = -(-n_blocks // 16)
        at = [0, *range(n_blocks, 0, -step)]
        ax.set_xticks(at, ["embedding" if i == 0 else str(i - 1) for i in at])
        ax.set_xlabel("after block")


def tables(result: Result) -> str:
    """Divergence by place and stratum for each checkpoint, and how it differs from the first's."""
    groups = [group["name"] for group in result["groups"]]
    counted = [f"{html.escape(group['name'])}, {group['tokens']:,} tokens" for group in result["groups"]]
    first = next(iter(result["checkpoints"]))
    parts = []
    for name, answer in result["checkpoints"].items():
        parts.append(f"<h3>{html.escape(name)}: {_UNIT}</h3>")
        rows = []
        for i, place in enumerate(answer["places"]):
            told = [interval(answer["kl"][group][i], 3) for group in groups]
            rows.append([_after(place), *told, interval(answer["agreement"]["all tokens"][i], 3)])
        parts.append(table(["after", *counted, "agreement, all tokens"], rows))
        if answer["difference"] is not None:
            parts.append(f"<h3>{html.escape(name)} less {html.escape(first)}: below zero, it is nearer its answer</h3>")
            less = answer["difference"]
            rows = [
                [_after(place), *(interval(less["kl"][group][i], 3, "+") for group in groups)]
                for i, place in enumerate(less["places"])
            ]
            parts.append(table(["after", *counted], rows))
    return "\n".join(parts)


def _after(place: dict[str, Any]) -> str:
    return html.escape(place["name"])


QUESTION = Question("lens", "How early the answer is there (LogitLens)", _ABOUT, measure, draw, tables, add_options)

if __name__ == "__main__":
    sys.exit(main(QUESTION))
