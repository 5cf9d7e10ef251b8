"""Which experts are used, which go together, and what the memory changes about that.

    python -m eval.routing --checkpoint RUN [--against RUN]

Loads and co-activation by block; how routing differs where the memory's gates open; and which choices change when the
memory is suppressed.
"""

from __future__ import annotations

import argparse
import html
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray

from engram.backbone import EngramLM
from engram.config import ConfigError
from engram.experts import MoE
from engram.pages import BLUE, GREY, ORANGE, table
from eval.shared.bootstrap import ratios, sums_by_document
from eval.shared.command import main
from eval.shared.contrasts import Contrast, compared, entropy, loads
from eval.shared.interventions import CHANGES, Change, memories_of, suppressed
from eval.shared.page import percent
from eval.shared.pairs import pairs_by_load, pairs_chosen
from eval.shared.question import Asked, Question, Result
from eval.shared.strata import add_options as add_strata_options
from eval.shared.strata import count_suffixes, hot_from_of, stratum_names
from eval.shared.subjects import Subject

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_ABOUT = """<p>Which experts the tokens of held-out text are sent to, in each block that has any.</p>
<p><b>Load</b>: an expert's share of all choices, over an even share: 1 is even. <b>Experts in use</b> is the number of
equally loaded ones that would have the same entropy. <b>Doubt</b> is the same for the router's scores of a single
token: how many experts it wavers between. <b>Go together</b>: how often two experts are chosen for the same token,
against what their loads alone would give if K different ones were drawn for each token; the share of pairs that are
other than that says how far experts come in teams.</p>
<p><b>Where the memory fires</b>: expert loads of the quarter of tokens with the most open gates against those of the
quarter with the most closed ones, as a Jensen-Shannon divergence (0 bits: the same; 1 bit: no expert in common).
Tokens differ in many ways beside the gate, and finite samples always differ a little; so each divergence stands beside
what is found when gates are turned by a random distance within each document, which keeps documents and neighbourhoods
and takes away what gate and routing have to do with each other. Gates are those of the nearest memory before the
block; blocks before the first memory, where nothing of it can have arrived, show how much routing and gates have to do
with each other by the tokens alone. The same for tokens whose N-gram is hot and those whose N-gram is cold.</p>
<p><b>Choices that change</b>: the share of a token's experts that are others once the memory is suppressed.</p>"""


@dataclass(frozen=True)
class Routing:
    """What the routers of a model did with held-out text.

    blocks: L numbers of the blocks with experts. experts: chosen for each of N tokens `[L, N, K]`. doubt: entropy of
    the scores of a token, mean over tokens `[L]`, nats. gates: of memories that have any, by block, mean over branches
    `[N]`.
    """

    blocks: list[int]
    experts: NDArray[np.int32]
    doubt: Floats
    gates: dict[int, Floats]


@contextmanager
def _routers_watched(model: EngramLM) -> Iterator[list[tuple[Any, Any]]]:
    """Inside, what each router gives is added to a list, block after block: experts `[B, T, K]`, and the statistics."""
    seen: list[tuple[Any, Any]] = []
    hooks = [
        layer.router.register_forward_hook(lambda router, args, given: seen.append((given[0], given[2])))
        for layer in model.moe_layers()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def routing_of(asked: Asked, subject: Subject, change: Change | None = None) -> Routing:
    """The routing of a checkpoint as it is, or with its memory suppressed."""
    model = subject.model
    experts, gates, doubt, n = [], [], np.zeros(len(model.moe_layers())), 0
    state = suppressed(model, change, asked.options.layers) if change is not None else nullcontext()
    with state, _routers_watched(model) as seen:
        for batch in asked.held_out.batches(subject.device, f"{subject.name}, {change or 'as it is'}"):
            with asked.precision():
                opened = model.run(batch["tokens"], batch["document_ids"]).gates
            size = batch["tokens"].numel()
            experts.append(torch.stack([chosen.flatten(0, 1) for chosen, _ in seen]).int().cpu().numpy())
            gates.append({layer: alpha.double().mean(-1).flatten().cpu().numpy() for layer, alpha in opened.items()})
            doubt += [size * float(stats.entropy) for _, stats in seen]
            n += size
            seen.clear()
    blocks = [i for i, block in enumerate(model.each_block()) if isinstance(block.ffn, MoE)]
    opened_at = {layer: np.concatenate([part[layer] for part in gates]) for layer in gates[0]}
    return Routing(blocks, np.concatenate(experts, 1), doubt / n, opened_at)


def quarters(values: Floats) -> Ints:
    """Of each value its quarter, 0 of the lowest to 3 of the highest; equal values share one."""
    return np.searchsorted(np.quantile(values, [0.25, 0.5, 0.75]), values, side="left")


def gates_for(routing: Routing, block: int) -> int | None:
    """The block of the memory whose gates tell most of a block's routing: the last one before it, or else the first;
    None if there are no gates."""
    before = [layer for layer in routing.gates if layer <= block]
    return max(before) if before else min(routing.gates, default=None)


def measure(asked: Asked) -> Result:
    """Loads, co-activation, contrasts and changes of each checkpoint, by block."""
    hot_from = hot_from_of(asked.options)
    able = [subject for subject in asked.subjects if subject.model.moe_layers()]
    if not able:
        names = ", ".join(repr(subject.name) for subject in asked.subjects)
        raise ConfigError(f"none of the checkpoints has experts: {names}")
    for subject in able:
        if subject.model.memories():
            memories_of(subject.model, asked.options.layers, repr(subject.name))
    suffixes = count_suffixes(asked.held_out, asked.subjects[0], asked.options.order)
    strata = suffixes.strata(hot_from).ravel()
    documents = asked.held_out.whole["document_ids"].ravel()
    return {
        "order": suffixes.order,
        "strata": stratum_names(hot_from),
        "suppressed": asked.options.suppress,
        "without_experts": [subject.name for subject in asked.subjects if subject not in able],
        "checkpoints": {subject.name: _answer(asked, subject, strata, documents) for subject in able},
    }


_STRATA = ("cold", "warm", "hot")


def _answer(asked: Asked, subject: Subject, strata: Ints, documents: Ints) -> dict[str, Any]:
    config = subject.model.config.experts
    assert config is not None
    routing = routing_of(asked, subject)
    layers = [
        {
            "block": block,
            "score_entropy": routing.doubt[i],
            **_use(routing.experts[i], config.n_experts),
            "gates_of": gates_for(routing, block),
            "contrasts": {},
        }
        for i, block in enumerate(routing.blocks)
    ]
    for name, at, contrast in _contrasts(routing, strata):
        about = f"{subject.name}, chance: {name}"
        for i, found in zip(
            at, compared(routing.experts[at], config.n_experts, documents, contrast, about), strict=True
        ):
            layers[i]["contrasts"][name] = found
    if subject.model.memories():
        others = routing_of(asked, subject, asked.options.suppress).experts
        for i, layer in enumerate(layers):
            groups = _groups(routing, layer["gates_of"], strata)
            layer["changed"] = _changed(routing.experts[i], others[i], documents, groups)
    return {"n_experts": config.n_experts, "top_k": config.top_k, "layers": layers}


def _use(experts: NDArray[np.int32], n_experts: int) -> dict[str, Any]:
    """Loads and co-activation of choices `[N, K]`; `pairs_apart` is the share of pairs other than loads alone give."""
    load, pairs = loads(experts, n_experts), pairs_chosen(experts, n_experts)
    expected = pairs_by_load(load, experts.shape[1])
    return {
        "load": load,
        "max_over_mean": load.max() / load.mean(),
        "variation": load.std() / load.mean(),
        "never_used": int((load == 0).sum()),
        "load_entropy": entropy(load),
        "pairs": pairs,
        "expected_pairs": expected,
        "pairs_apart": np.abs(pairs - expected).sum() / 2 / pairs.sum() if pairs.any() else None,
    }


def _contrasts(routing: Routing, strata: Ints) -> Iterator[tuple[str, list[int], Contrast]]:
    """What is compared: its name, numbers of the layers, and the tokens."""
    everything = np.arange(len(strata))
    within = {"gates": everything} | {f"gates, {name}": np.flatnonzero(strata == s) for s, name in enumerate(_STRATA)}
    sources = [gates_for(routing, block) for block in routing.blocks]
    for name, tokens in ((name, tokens) for name, tokens in within.items() if len(tokens)):
        for source in dict.fromkeys(each for each in sources if each is not None):
            at = [i for i, each in enumerate(sources) if each == source]
            quarter = quarters(routing.gates[source][tokens])
            yield name, at, Contrast(tokens, _sides(quarter == 3, quarter == 0))
    yield "hot against cold", list(range(len(sources))), Contrast(everything, _sides(strata == 2, strata == 0))


def _sides(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> NDArray[np.int8]:
    return first.astype(np.int8) - second.astype(np.int8)


def _groups(routing: Routing, gates_of: int | None, strata: Ints) -> dict[str, NDArray[np.bool_]]:
    """Groups of tokens whose changes are told: all, strata, and quarters of a memory's gates if it has any."""
    groups = {"all": np.ones(strata.shape, bool)} | {name: strata == s for s, name in enumerate(_STRATA)}
    if gates_of is not None:
        quarter = quarters(routing.gates[gates_of])
        groups |= {f"gates, quarter {q + 1}": quarter == q for q in range(4)}
    return groups


def changed_choices(experts: NDArray[np.int32], others: NDArray[np.int32]) -> Ints:
    """How many of the experts of each token `[N, K]` are not among its others `[N, K]`."""
    return (experts[:, :, None] != others[:, None, :]).all(-1).sum(-1)


def _changed(
    experts: NDArray[np.int32], others: NDArray[np.int32], documents: Ints, groups: dict[str, NDArray[np.bool_]]
) -> dict[str, Any]:
    """Share of choices that change, by group of tokens."""
    members = np.stack(list(groups.values()), -1).astype(np.float64)
    changes = sums_by_document(documents, changed_choices(experts, others)[:, None] * members)
    choices = sums_by_document(documents, experts.shape[1] * members)
    return dict(zip(groups, ratios(changes, choices), strict=True))


def draw(result: Result) -> Any:
    """A column for each checkpoint: loads, experts that go together, contrasts and changes."""
    answers = result["checkpoints"]
    figure, axes = plt.subplots(4, len(answers), figsize=(5.6 * len(answers), 14), layout="constrained", squeeze=False)
    for column, (name, answer) in zip(axes.T, answers.items(), strict=True):
        column[0].set_title(f"{name}\n{answer['n_experts']} experts, {answer['top_k']} for a token", fontsize=11)
        _draw_loads(column[0], answer)
        _draw_pairs(column[1], answer, figure)
        _draw_contrasts(column[2], answer)
        _draw_changes(column[3], answer, result["suppressed"])
    for row in (axes[0], axes[2], axes[3]):  # of all checkpoints on one scale
        drawn = [ax for ax in row if ax.has_data()]
        top = max((ax.get_ylim()[1] for ax in drawn), default=1)
        for ax in drawn:
            ax.set_ylim(0, top)
            ax.grid(alpha=0.25)
    return figure


def _draw_loads(ax: Any, answer: dict[str, Any]) -> None:
    layers = answer["layers"]
    for i, layer in enumerate(layers):
        load = np.sort(layer["load"])[::-1]
        colour = plt.get_cmap("viridis")(i / max(1, len(layers) - 1) * 0.9)
        ax.plot(np.arange(1, len(load) + 1), load / load.mean(), color=colour, label=f"block {layer['block']}")
    ax.axhline(1, color=GREY, lw=1)
    ax.set_xlabel("experts, the most used first")
    ax.set_ylabel("load, over an even share")
    ax.legend(frameon=False, fontsize=7, ncols=1 + len(layers) // 8)


def _draw_pairs(ax: Any, answer: dict[str, Any], figure: Any) -> None:
    known = [layer for layer in answer["layers"] if layer["pairs_apart"] is not None]
    if not known:
        _say(ax, "a token has one expert: there are no pairs")
        return
    layer = max(known, key=lambda each: each["pairs_apart"])
    order = np.argsort(-np.array(layer["load"]), kind="stable")
    found, expected = (np.array(layer[name], float)[np.ix_(order, order)] for name in ("pairs", "expected_pairs"))
    # Half a token more, so that pairs that never meet have a colour too.
    ratio = np.log2((found + 0.5) / (expected + 0.5))
    np.fill_diagonal(ratio, np.nan)
    E = len(order)
    ends = (0.5, E + 0.5, E + 0.5, 0.5)
    image = ax.imshow(ratio, cmap="RdBu_r", vmin=-2, vmax=2, interpolation="nearest", extent=ends)
    ax.set_facecolor("#bbbbbb")  # on the diagonal
    ax.set_title(f"block {layer['block']}, where pairs are furthest from chance", fontsize=9)
    ax.set_xlabel("experts, the most used first")
    ax.set_ylabel("experts, the most used first")
    bar = figure.colorbar(image, ax=ax, shrink=0.85, extend="both")
    bar.set_label("chosen for one token, times\nwhat loads alone would give")
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["¼", "½", "1", "2", "4"])


_COLOURS = {"gates": BLUE, "hot against cold": ORANGE}


def _draw_contrasts(ax: Any, answer: dict[str, Any]) -> None:
    names = {"gates": "most open against most closed gates", "hot against cold": "hot against cold N-grams"}
    for name, told in names.items():
        at = [(i, each) for i, layer in enumerate(answer["layers"]) if (each := layer["contrasts"].get(name))]
        at = [(i, each) for i, each in at if each["bits"] is not None]
        if at:
            places = [i for i, _ in at]
            ax.plot(places, [each["bits"] for _, each in at], "o-", color=_COLOURS[name], label=told)
            chance = [each["null"]["high"] for _, each in at]
            ax.plot(places, chance, "_:", ms=12, color=_COLOURS[name], label="chance stays below, 95 %")
    _name_blocks(ax, answer)
    ax.set_ylabel("divergence of expert loads, bits")
    ax.legend(frameon=False, fontsize=7)


def _draw_changes(ax: Any, answer: dict[str, Any], suppressed: str) -> None:
    layers = answer["layers"]
    if "changed" not in layers[0]:
        _say(ax, "no memory to suppress")
        return
    names = list(dict.fromkeys(name for layer in layers for name in layer["changed"]))
    drawn = [name for name in names if name in _STRATA or name in ("all", "gates, quarter 1", "gates, quarter 4")]
    for i, name in enumerate(drawn):
        known = [layer["changed"].get(name) for layer in layers]
        values = np.array(
            [[np.nan if each is None or v is None else v for v in (each or _NONE).values()] for each in known]
        )
        places = np.arange(len(layers)) + 0.5 * ((i + 0.5) / len(drawn) - 0.5)
        errors = np.abs(values[:, 1:].T - values[:, 0])
        style = {"color": "black"} if name == "all" else {"color": f"C{i - 1}"}
        ax.errorbar(places, values[:, 0], errors, fmt="o", ms=4, capsize=2, label=name, **style)
    _name_blocks(ax, answer)
    ax.set_ylabel(f"share of choices that change, memory {suppressed}")
    ax.legend(frameon=False, fontsize=7)


_NONE = {"value": None, "low": None, "high": None}


def _name_blocks(ax: Any, answer: dict[str, Any]) -> None:
    layers = answer["layers"]
    ax.set_xticks(range(len(layers)), [str(layer["block"]) for layer in layers])
    ax.set_xlim(-0.5, len(layers) - 0.5)
    ax.set_xlabel("block")


def _say(ax: Any, text: str) -> None:
    ax.set_axis_off()
    ax.text(0.5, 0.5, text, ha="center", va="center", color=GREY, transform=ax.transAxes)


def tables(result: Result) -> str:
    """Loads, contrasts and changes, block by block."""
    without = ", ".join(map(html.escape, result["without_experts"]))
    parts = [f"<p>Without experts, so that nothing is routed: {without}.</p>"] if without else []
    for name, answer in result["checkpoints"].items():
        E = answer["n_experts"]
        parts.append(f"<h3>{html.escape(name)}: {E} experts, {answer['top_k']} for a token</h3>")
        rows = []
        for layer in answer["layers"]:
            apart, doubt = layer["pairs_apart"], np.exp(layer["score_entropy"])
            cells = [f"block {layer['block']}", f"{layer['max_over_mean']:.2f}", f"{layer['variation']:.2f}"]
            cells += [str(layer["never_used"]), f"{np.exp(layer['load_entropy']):.1f}", f"{doubt:.1f}"]
            rows.append([*cells, "–" if apart is None else f"{100 * apart:.1f} %", _team(layer)])  # noqa: RUF001
        head = ["", "largest load", "variation of loads", "never used", f"experts in use, of {E}", "doubt, in experts"]
        parts.append(table([*head, "pairs other than by loads", "go together most"], rows))
        parts.append(_table_of_contrasts(answer))
        if "changed" in answer["layers"][0]:
            names = list(dict.fromkeys(each for layer in answer["layers"] for each in layer["changed"]))
            rows = [
                [f"block {layer['block']}", *(percent(layer["changed"].get(each, _NONE)) for each in names)]
                for layer in answer["layers"]
            ]
            parts.append(f"<p>Choices that change with the memory {result['suppressed']}:</p>")
            parts.append(table(["", *names], rows))
    return "\n".join(parts)


def _team(layer: dict[str, Any]) -> str:
    """The pair of experts that is furthest above what loads give, of those expected ten times or more."""
    found, expected = np.array(layer["pairs"], float), np.array(layer["expected_pairs"], float)
    ratio = np.divide(found, expected, out=np.zeros_like(found), where=expected >= 10)
    if not ratio.any():
        return "–"  # noqa: RUF001
    first, second = np.unravel_index(ratio.argmax(), ratio.shape)
    return f"{first} and {second}: {ratio.max():.1f} times"


def _table_of_contrasts(answer: dict[str, Any]) -> str:
    names = list(dict.fromkeys(name for layer in answer["layers"] for name in layer["contrasts"]))
    rows = []
    for layer in answer["layers"]:
        source = layer["gates_of"]
        cells = [f"block {layer['block']}", "–" if source is None else f"before block {source}"]  # noqa: RUF001
        for name in names:
            found = layer["contrasts"].get(name)
            if found is None or found["bits"] is None:
                cells.append("–")  # noqa: RUF001
            else:
                cells.append(f"{found['bits']:.4f} (chance {found['null']['high']:.4f}, p {found['p']:.3f})")
        rows.append(cells)
    told = "<p>Divergence of expert loads in bits; in brackets what chance stays below in 95&nbsp;% of draws:</p>"
    return told + table(["", "gates of the memory", *names], rows)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of strata, and how the memory is suppressed."""
    add_strata_options(parser)
    parser.add_argument("--layers", nargs="+", default=[], metavar="BLOCK", help="suppress these memories alone")
    parser.add_argument("--suppress", choices=CHANGES, default="zeroed", help="how the memory is suppressed (zeroed)")


QUESTION = Question(
    "routing", "Experts, and what the memory changes about them", _ABOUT, measure, draw, tables, add_options
)

if __name__ == "__main__":
    sys.exit(main(QUESTION))
