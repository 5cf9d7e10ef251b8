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
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray

from engram.backbone import EngramLM
from engram.config import ConfigError
from engram.experts import MoE
from engram.pages import BLUE, GREY, ORANGE, table
from eval.shared.command import main
from eval.shared.contrasts import Contrast, compared, entropy, loads
from eval.shared.groups import Groups, Kind
from eval.shared.interventions import CHANGES, Change, memories_of, suppressed
from eval.shared.page import percent
from eval.shared.pairs import pairs_by_load, pairs_chosen
from eval.shared.question import Asked, Question, Result
from eval.shared.spill import spilled
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

    blocks: L numbers of the blocks with experts. experts: chosen for each of N tokens `[N, L, K]`, in a file. load: how
    often each expert was chosen `[L, E]`. pairs: for how many tokens two were `[L, E, E]`. doubt: entropy of the scores
    of a token, mean over tokens `[L]`, nats. gates: of memories that have any, by block, mean over branches `[N]`.
    """

    blocks: list[int]
    experts: NDArray[Any]
    load: Ints
    pairs: Ints
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


class Routed(NamedTuple):
    """What routers and gates did with the n tokens of a batch: experts `[n, L, K]`, gates by block, mean over branches
    `[n]`, and the mean entropy of scores `[L]`."""

    experts: NDArray[Any]
    gates: dict[int, Floats]
    doubt: Floats


def batches_of(asked: Asked, subject: Subject, change: Change | None = None) -> Iterator[Routed]:
    """The held-out text, batch after batch, as a checkpoint with experts routes it as it is, or with its memory
    suppressed."""
    model = subject.model
    state = suppressed(model, change, asked.options.layers) if change is not None else nullcontext()
    with state, _routers_watched(model) as seen:
        for batch in asked.held_out.batches(subject.device, f"{subject.name}, {change or 'as it is'}"):
            with torch.no_grad(), asked.precision():
                opened = model.run(batch["tokens"], batch["document_ids"]).gates
            assert model.config.experts is not None
            experts = torch.stack([chosen.flatten(0, 1) for chosen, _ in seen], 1).cpu().numpy()
            gates = {layer: alpha.double().mean(-1).flatten().cpu().numpy() for layer, alpha in opened.items()}
            doubt = np.array([float(stats.entropy) for _, stats in seen])
            seen.clear()
            yield Routed(experts.astype(np.min_scalar_type(model.config.experts.n_experts - 1)), gates, doubt)


def routing_of(asked: Asked, subject: Subject) -> Routing:
    """The routing of a checkpoint with experts as it is."""
    model, config = subject.model, subject.model.config.experts
    assert config is not None
    blocks = [i for i, block in enumerate(model.each_block()) if isinstance(block.ffn, MoE)]
    load, doubt = np.zeros((len(blocks), config.n_experts), np.int64), np.zeros(len(blocks))
    pairs = np.zeros((*load.shape, config.n_experts), np.int64)
    gates: list[dict[int, Floats]] = []

    def counted() -> Iterator[NDArray[Any]]:
        nonlocal doubt
        for batch in batches_of(asked, subject):
            for i, experts in enumerate(batch.experts.swapaxes(0, 1)):
                load[i] += loads(experts, config.n_experts)
                pairs[i] += pairs_chosen(experts, config.n_experts)
            doubt += len(batch.experts) * batch.doubt
            gates.append(batch.gates)
            yield batch.experts

    experts = spilled(counted())
    opened = {layer: np.concatenate([part[layer] for part in gates]) for layer in gates[0]}
    return Routing(blocks, experts, load, pairs, doubt / len(experts), opened)


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
    suffixes = count_suffixes(asked.held_out, asked.subjects[0], asked.options.order, asked.options.train_tokens)
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
            **_use(routing.load[i], routing.pairs[i], config.top_k),
            "gates_of": gates_for(routing, block),
            "contrasts": {},
        }
        for i, block in enumerate(routing.blocks)
    ]
    for name, at, contrast in _contrasts(routing, strata):
        about = f"{subject.name}, chance: {name}"
        found = compared(routing.experts, config.n_experts, documents, contrast, at, about, subject.device)
        for i, told in zip(at, found, strict=True):
            layers[i]["contrasts"][name] = told
    if subject.model.memories():
        for layer, changed in zip(layers, _changed(asked, subject, routing, strata, documents), strict=True):
            layer["changed"] = changed
    # Of all the pairs the page draws one block's.
    furthest = max(range(len(layers)), key=lambda i: layers[i]["pairs_apart"] or 0)
    return {
        "n_experts": config.n_experts,
        "top_k": config.top_k,
        "layers": layers,
        "pairs": {"block": routing.blocks[furthest], "chosen": routing.pairs[furthest]} if config.top_k > 1 else None,
    }


def _use(load: Ints, pairs: Ints, top_k: int) -> dict[str, Any]:
    """Of a block's loads and pairs; `pairs_apart` is the share of pairs other than loads alone give, `team` the two
    experts that are furthest above that, of those expected ten times or more."""
    expected = pairs_by_load(load, top_k)
    ratio = np.divide(pairs, expected, out=np.zeros_like(expected), where=expected >= 10)
    team = [*map(int, np.unravel_index(ratio.argmax(), ratio.shape))]
    return {
        "load": load,
        "max_over_mean": load.max() / load.mean(),
        "variation": load.std() / load.mean(),
        "never_used": int((load == 0).sum()),
        "load_entropy": entropy(load),
        "pairs_apart": np.abs(pairs - expected).sum() / 2 / pairs.sum() if pairs.any() else None,
        "team": {"experts": team, "times": ratio.max()} if ratio.any() else None,
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


def changed_choices(experts: NDArray[Any], others: NDArray[Any]) -> Ints:
    """How many of the experts of each token and layer `[n, L, K]` are not among its others `[n, L, K]`."""
    return (experts[..., :, None] != others[..., None, :]).all(-1).sum(-1)


def _changed(asked: Asked, subject: Subject, routing: Routing, strata: Ints, documents: Ints) -> list[dict[str, Any]]:
    """Share of choices that change with the memory suppressed, for each layer by group of tokens: all, strata, and
    quarters of the gates that tell most of it."""
    kinds = [Kind("every layer", ["all"], np.zeros_like(strata)), Kind("every layer", list(_STRATA), strata)]
    names = [f"gates, quarter {q + 1}" for q in range(4)]
    kinds += [Kind(f"gates of {block}", names, quarters(gates)) for block, gates in routing.gates.items()]
    groups = Groups(documents, kinds)

    def changes() -> Iterator[NDArray[Any]]:
        start = 0
        for batch in batches_of(asked, subject, asked.options.suppress):
            own = routing.experts[start : start + len(batch.experts)]
            yield changed_choices(own, batch.experts)
            start += len(own)

    found = groups.means(groups.summed(changes()), over=groups.tokens * routing.experts.shape[2])
    return [
        {
            name: found[g][i]
            for g, (kind, name) in enumerate(zip(groups.kinds, groups.names, strict=True))
            if kind in ("every layer", f"gates of {gates_for(routing, block)}")
        }
        for i, block in enumerate(routing.blocks)
    ]


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
        label = f"block {layer['block']}" if i in _named(answer) else None
        ax.plot(np.arange(1, len(load) + 1), load / load.mean(), color=colour, label=label)
    ax.axhline(1, color=GREY, lw=1)
    ax.set_xlabel("experts, the most used first")
    ax.set_ylabel("load, over an even share")
    ax.legend(frameon=False, fontsize=7, ncols=1 + len(_named(answer)) // 8)


def _draw_pairs(ax: Any, answer: dict[str, Any], figure: Any) -> None:
    pairs = answer["pairs"]
    if pairs is None:
        _say(ax, "a token has one expert: there are no pairs")
        return
    load = np.array(next(layer["load"] for layer in answer["layers"] if layer["block"] == pairs["block"]))
    order = np.argsort(-load, kind="stable")
    both = (np.array(pairs["chosen"], float), pairs_by_load(load, answer["top_k"]))
    found, expected = (values[np.ix_(order, order)] for values in both)
    # Half a token more, so that pairs that never meet have a colour too.
    ratio = np.log2((found + 0.5) / (expected + 0.5))
    np.fill_diagonal(ratio, np.nan)
    E = len(order)
    ends = (0.5, E + 0.5, E + 0.5, 0.5)
    image = ax.imshow(ratio, cmap="RdBu_r", vmin=-2, vmax=2, interpolation="nearest", extent=ends)
    ax.set_facecolor("#bbbbbb")  # on the diagonal
    ax.set_title(f"block {pairs['block']}, where pairs are furthest from chance", fontsize=9)
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
    layers, named = answer["layers"], _named(answer)
    ax.set_xticks(named, [str(layers[i]["block"]) for i in named])
    ax.set_xlim(-0.5, len(layers) - 0.5)
    ax.set_xlabel("block")


def _named(answer: dict[str, Any]) -> range:
    """Of the layers those whose names there is room for."""
    n = len(answer["layers"])
    return range(0, n, -(-n // 16))


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
    team = layer["team"]
    return "–" if team is None else f"{team['experts'][0]} and {team['experts'][1]}: {team['times']:.1f} times"  # noqa: RUF001


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
