"""Which blocks of two models hold alike representations: linear CKA, and where each block finds itself in the other.

    python -m eval.cka --checkpoint RUN [--against RUN]

CKA (arXiv:1905.00414) of minibatches (arXiv:2010.15327) with the unbiased HSIC_1 of Song et al. (JMLR 13, 2012); soft
alignment as in arXiv:2601.07372: the centroid of the most similar layers, weighted by their similarity.
"""

from __future__ import annotations

import argparse
import html
import sys
from collections.abc import Iterator
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from engram.config import require
from engram.pages import table
from engram.sweep.fit import CONFIDENCE, Interval
from engram.tensors import widen
from eval.shared.command import main
from eval.shared.observe import observed, places_of
from eval.shared.page import interval
from eval.shared.pictures import bounds
from eval.shared.progress import shown
from eval.shared.question import Asked, Question, Result
from eval.shared.spill import spilled
from eval.shared.subjects import Subject

_ABOUT = """<p>Which blocks of two models do the same work. For the same held-out tokens, the hidden states after each
block of the one are compared with those after each block of the other by linear CKA: 1 where they are the same but for
a rotation and a scale, about 0 where they have nothing to do with each other. Only how tokens lie to each other counts,
so that models of any width can be compared. Blocks are counted from 0.</p>
<p>The line is the soft alignment: for each block of the first model, the centre of the blocks of the second that are
most alike to it, weighted by how alike they are. Where it runs above the dashed line, the first model is as far there
as the second only is some blocks later; if a memory saves a model the first steps, that is what it looks like. The
dashed line is the second model's alignment with itself, and not simply the diagonal: at both ends the most similar
blocks can lie on one side only, which draws the centre inwards, all the more the fewer blocks there are. Only what
lies between the two lines tells of the models. (Where these are not equally deep, the dashed line is stretched over the
width of the picture.)</p>
<p>CKA is estimated from minibatches of tokens drawn from all the text, without bias from how few tokens one holds
(unbiased HSIC). Residual branches count as one wide state: nothing that a later block could read is averaged away,
and a model whose branches are equal counts as if it had one. Brackets and bands are 95&nbsp;% intervals from
drawing the minibatches again: they tell how well these tokens settle the number, not what other text would give.</p>"""

_SEED = 0
_DRAWS = 1000
Floats = NDArray[np.float64]


def states_of_blocks(asked: Asked, subject: Subject, tokens: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
    """Hidden states after each block, branches side by side, `[n, blocks, M d]`, for n ascending numbers of tokens of
    the held-out text, those of a batch at a time."""
    places = [place for place in places_of(subject.model) if place.name.startswith("block")]
    start = 0
    for batch in asked.held_out.batches(subject.device, f"blocks of {subject.name}"):
        first, stop = np.searchsorted(tokens, [start, start + batch["tokens"].numel()])
        at = torch.from_numpy(tokens[first:stop] - start).to(subject.device)
        with torch.no_grad(), asked.precision(), observed(subject.model, places) as found:
            subject.model.run(batch["tokens"], batch["document_ids"])
            part = torch.stack([widen(found[place.name].flatten(0, 1)[at].flatten(1)) for place in places], 1)
        yield part.cpu().numpy()
        start += batch["tokens"].numel()


def centred_grams(states: Tensor) -> Tensor:
    """U-centred Gram matrices `[L, n, n]` in float64 of L representations of n tokens, `[n, L, width]`.

    With K without its diagonal, K_ij less the means of row i and column j plus that of all, each over as many entries
    as leaves all sums zero (Szekely and Rizzo 2014, definition 2). HSIC_1 is the scaled inner product of two of these,
    which loses fewer digits than its usual three terms, whose sum is far smaller than they are.
    """
    x = states.transpose(0, 1).double()
    x = x - x.mean(1, keepdim=True)  # changes the result by rounding alone, for the better
    grams, n = x @ x.mT, x.shape[1]
    diagonals = grams.diagonal(dim1=1, dim2=2)
    diagonals.zero_()
    rows = grams.sum(2, keepdim=True) / (n - 2)
    grams -= rows + rows.mT - rows.sum(1, keepdim=True) / (n - 1)
    diagonals.zero_()
    return grams


def hsic(grams: Tensor, others: Tensor) -> Floats:
    """Unbiased HSIC_1 `[L, L']` of all pairs of U-centred Gram matrices `[L, n, n]` and `[L', n, n]`."""
    n = grams.shape[-1]
    return (grams.flatten(1) @ others.flatten(1).T / (n * (n - 3))).cpu().numpy()


def similarity(between: Floats, one: Floats, other: Floats) -> Floats:
    """CKA `[..., L, L']` of mean HSICs between two models and within each, `[..., L, L]` and `[..., L', L']`."""
    of_one, of_other = (within.diagonal(axis1=-2, axis2=-1) for within in (one, other))
    return between / np.sqrt(of_one[..., :, None] * of_other[..., None, :])


def alignment(similarities: Floats, top_k: int) -> Floats:
    """Soft alignment `[..., L]` of similarities `[..., L, L']`: for each of L layers the centroid of the `top_k` of L'
    layers most similar to it (all, if there are fewer), weighted by similarity. One below 0 weighs nothing."""
    top = np.argsort(-similarities, axis=-1, kind="stable")[..., :top_k]
    weights = np.take_along_axis(similarities, top, -1).clip(min=0)
    total = weights.sum(-1)
    return np.divide((weights * top).sum(-1), total, out=np.full(total.shape, np.nan), where=total > 0)


def measure(asked: Asked) -> Result:
    """CKA of all pairs of blocks, and the alignment of the first checkpoint's blocks with the second's; one checkpoint
    is compared with itself."""
    n, most, top_k = asked.options.minibatch, asked.options.minibatches, asked.options.top_k
    available = asked.held_out.n_windows * asked.held_out.seq_len
    require(4 <= n <= available, "minibatch", n, f"4 to {available}, the tokens of the held-out text")
    require(most >= 0, "minibatches", most, "1 or more (0: all the held-out text)")
    require(top_k >= 1, "top-k", top_k, "1 or more")
    m = min(most or available, available // n)
    tokens = np.random.default_rng(_SEED).permutation(available)[: m * n]
    ascending, place = np.unique(tokens, return_inverse=True)
    states = [spilled(states_of_blocks(asked, subject, ascending)) for subject in asked.subjects]
    device = asked.subjects[0].device
    parts = []
    for start in shown(range(0, m * n, n), "minibatches"):
        grams = [centred_grams(torch.from_numpy(each[place[start : start + n]]).to(device)) for each in states]
        one, other = grams[0], grams[-1]
        parts.append((hsic(one, other), hsic(one, one), hsic(other, other)))
    between, of_one, of_other = (np.stack(each) for each in zip(*parts, strict=True))
    return {
        "first": asked.subjects[0].name,
        "second": asked.subjects[-1].name,
        "minibatch": n,
        "minibatches": m,
        "top_k": top_k,
        "cka": similarity(between.mean(0), of_one.mean(0), of_other.mean(0)),
        "alignment": _alignments(between, of_one, of_other, top_k),
        "second_with_itself": _alignments(of_other, of_other, of_other, top_k),
    }


def _alignments(between: Floats, one: Floats, other: Floats, top_k: int) -> list[Interval]:
    """Alignment of HSICs `[m, ...]` of m minibatches, with the percentile interval of drawing minibatches again."""
    m = len(between)
    values = alignment(similarity(between.mean(0), one.mean(0), other.mean(0)), top_k)
    low = high = np.full(values.shape, np.nan)
    if m > 1:
        shares = np.random.default_rng(_SEED).multinomial(m, np.full(m, 1 / m), _DRAWS) / m
        drawn = (np.tensordot(shares, hsics, 1) for hsics in (between, one, other))
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(alignment(similarity(*drawn), top_k), [tail, 1 - tail], axis=0)
    return [Interval(*map(float, each)) for each in zip(values, low, high, strict=True)]


def draw(result: Result) -> Any:
    """The heat map, the first checkpoint's blocks from left to right and the second's upwards, and the alignments."""
    values = np.array(result["cka"], float)
    L, R = values.shape
    figure, ax = plt.subplots(figsize=(min(12, 4.2 + 0.45 * L), min(10, 3.2 + 0.45 * R)), layout="constrained")
    image = ax.imshow(values.T, origin="lower", vmin=0, vmax=1, cmap="viridis", aspect="auto")
    figure.colorbar(image, label="linear CKA")
    if max(L, R) <= 16:
        for (i, j), value in np.ndenumerate(values):
            ink = "white" if value < 0.6 else "black"
            ax.text(i, j + 0.4, f"{value:.2f}", ha="center", va="top", fontsize=7, color=ink, alpha=0.7)
    seen = [withStroke(linewidth=3.5, foreground="black")]  # on light cells and on dark ones
    itself = [known["value"] for known in result["second_with_itself"]]
    label = f"{result['second']} with itself"
    ax.plot(np.linspace(0, L - 1, R), itself, "--", color="white", lw=1.5, path_effects=seen, label=label)
    if result["first"] != result["second"]:
        centre, low, high = bounds(result["alignment"]).T
        label = f"{result['first']} with {result['second']}"
        ax.fill_between(range(L), low, high, color="#ff7f0e", alpha=0.4, lw=0)
        ax.plot(range(L), centre, "o-", color="#ff7f0e", ms=4, lw=2, path_effects=seen, label=label)
    ax.set_xlabel(f"block of {result['first']}")
    ax.set_ylabel(f"block of {result['second']}")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return figure


def tables(result: Result) -> str:
    """For each block of the first checkpoint, where it finds itself in the second."""
    first, second = html.escape(result["first"]), html.escape(result["second"])
    equal = first != second and len(result["second_with_itself"]) == len(result["alignment"])
    head = [f"block of {first}", f"most alike block of {second}", "CKA with it", f"alignment with {second}"]
    head += ["CKA with the block of the same number", f"alignment of that block with {second} itself"] if equal else []
    rows = []
    for i, (values, aligned) in enumerate(zip(result["cka"], result["alignment"], strict=True)):
        best = int(np.argmax(values))
        row = [str(i), str(best), f"{values[best]:.3f}", interval(aligned, 2)]
        rows.append(row + ([f"{values[i]:.3f}", interval(result["second_with_itself"][i], 2)] if equal else []))
    drawn = f"{result['minibatches']:,} minibatches of {result['minibatch']:,} tokens"
    centres = f"centres of the {result['top_k']} most alike blocks, or of all where there are fewer"
    return f"<p>{drawn}; {centres}.</p>" + table(head, rows)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of minibatches and alignment."""
    most = "how many, at most (0: all the held-out text); their states lie in a temporary file"
    parser.add_argument("--minibatch", type=int, default=256, metavar="N", help="tokens that are compared at once")
    parser.add_argument("--minibatches", type=int, default=64, metavar="M", help=most)
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="most similar blocks in the soft alignment")


QUESTION = Question(
    "cka", "Which blocks of two models are alike (CKA)", _ABOUT, measure, draw, tables, add_options, most=2
)

if __name__ == "__main__":
    sys.exit(main(QUESTION))
