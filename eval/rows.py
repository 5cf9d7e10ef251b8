"""Rows of the memory: which are read, how many N-grams share one, what training made of them, and how well they cache.

    python -m eval.rows --checkpoint RUN [--against RUN]

The windows that a run trained on are read again through the model's own reader, beside an exact count of N-grams.
"""

from __future__ import annotations

import html
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray

from engram.backbone import EngramLM
from engram.config import ConfigError
from engram.memory import MemoryTable, RowReader
from engram.pages import GREY, table
from eval.shared.caching import served_by_least_recently_used, served_by_most_read
from eval.shared.command import main
from eval.shared.ngrams import Counts, Suffixes, located
from eval.shared.occupancy import Shared, occupied, shared
from eval.shared.question import Asked, Question, Result
from eval.shared.strata import add_train_tokens, bin_name, binned, trained_on
from eval.shared.subjects import Subject
from eval.shared.zipf import zipf

Ints = NDArray[np.int64]
_CHUNK = 2**20  # N-grams or rows at once
_CACHES = 31  # sizes, from a thousandth of the rows to all
_QUANTILES = (0.1, 0.5, 0.9)

_ABOUT = """<p>A token reads one row of each head's table, picked by hashing its suffix N-gram, so that N-grams share
rows. Here the windows that each checkpoint was trained on are read again to count how often each row was, next to an
exact count of the distinct N-grams. What hashing at random would do is a formula (balls thrown into bins): a hash that
shares more than that wastes rows. Sharing hurts where the other N-gram matters, so the last count is of reads whose row
belongs rather to another N-gram, one that reads it more often. A cache that serves a share of reads keeps the rest of
the table in slower memory.</p>"""


@dataclass(frozen=True)
class Layer:
    """A table and who reads it. label: where the memory stands. by_ngram: its rows are picked by N-grams at all."""

    label: str
    reader: RowReader
    table: MemoryTable
    by_ngram: bool

    @property
    def heads(self) -> list[tuple[int, int, slice]]:
        """Order, number and rows of each head."""
        config, at = self.reader.config, self.reader.hasher.layers.index(self.reader.layer)
        sizes, starts = (getattr(self.reader.hasher, name)[at].tolist() for name in ("moduli", "offsets"))
        orders = [(order, k) for order in config.orders for k in range(config.n_heads)]
        return [(*who, slice(a, a + n)) for who, a, n in zip(orders, starts, sizes, strict=True)]

    @property
    def narrow(self) -> type[np.uint32] | type[np.int64]:
        """A type that holds its row numbers."""
        return np.uint32 if self.reader.n_rows <= 2**32 else np.int64

    def rows(self, ids: torch.Tensor, documents: torch.Tensor | None = None) -> Ints:
        """Rows `[B, T, H]` that raw ids read."""
        device = self.reader.hasher.moduli.device
        with torch.no_grad():
            found = self.reader(ids.to(device), None if documents is None else documents.to(device))
        return np.asarray(found.cpu().numpy())


def layers_of(model: EngramLM) -> list[Layer]:
    """The tables of a model, each once."""
    found: dict[int, Layer] = {}
    for name, memory in model.memories().items():
        source = getattr(memory, "source", memory)
        kind = source.reader.config.kind
        label = "input" if name == "input" else "all blocks" if kind == "additive_bigram" else f"block {name}"
        found.setdefault(id(source), Layer(label, source.reader, source.table, kind != "shuffled"))
    return list(found.values())


class NgramCounts:
    """The distinct suffix N-grams of one order that a reader was asked with, and how often it was with each."""

    def __init__(self, reader: RowReader, order: int) -> None:
        hasher = reader.hasher
        self.order, self._eos = order, hasher.eos_id if hasher.resets_at_eos else None
        self._lookup = np.arange(reader.vocab_size) if reader.lookup is None else reader.lookup.cpu().numpy()
        self._suffixes, self._counts = Suffixes(order, hasher.pad_id, hasher.n_canonical), Counts()
        self._lowest = np.unique(self._lookup, return_index=True)[1]

    def add(self, tokens: Ints, documents: Ints, times: Ints) -> None:
        """Count those of windows `[windows, T]` that were each read so many times, `[windows]`."""
        self._counts.add(self._suffixes.keys(*self._as_hashed(tokens, documents)), times)

    @property
    def counts(self) -> Ints:
        """How often each of them was read, `[N-grams]`."""
        return self._counts.all()[1]

    def new(self, tokens: Ints, documents: Ints) -> NDArray[np.bool_]:
        """Which of another text `[windows, T]` are none of them."""
        known = self._counts.all()[0]
        wanted, place = np.unique(self._suffixes.keys(*self._as_hashed(tokens, documents)), return_inverse=True)
        return ~located(known, wanted)[1][place].reshape(tokens.shape)

    def raw_ids(self) -> Iterator[torch.Tensor]:
        """Raw ids of each, some at a time, `[some N-grams, order]`, of the many that may spell it the lowest."""
        keys = self._counts.all()[0]
        for start in range(0, len(keys), size := _CHUNK // self.order):
            yield torch.from_numpy(self._lowest[self._suffixes.ids_of(keys[start : start + size])])

    def _as_hashed(self, tokens: Ints, documents: Ints) -> tuple[Ints, Ints]:
        """Canonical ids, and documents as the hash tells them apart."""
        ids = self._lookup[tokens]
        if self._eos is None:
            return ids, documents
        ended = np.cumsum(ids == self._eos, 1) - (ids == self._eos)
        return ids, np.cumsum(np.diff(documents, axis=1, prepend=documents[:, :1]) != 0, 1) + ended


def measure(asked: Asked) -> Result:
    """Reads, sharing, norms and caches of every table of every checkpoint that has any."""
    answers: dict[str, Any] = {}
    for subject in asked.subjects:
        layers = layers_of(subject.model)
        answers[subject.name] = {
            "memory": layers[0].reader.config.kind if layers else "no memory",
            "replayed": "its run" if subject.run is not None else "the training split of the text, once",
            "layers": tables_of(asked, subject, layers) if layers else [],
        }
    if not any(answer["layers"] for answer in answers.values()):
        raise ConfigError(f"none of the checkpoints has a memory: {', '.join(answers)}")
    return {"held_out_tokens": asked.held_out.n_windows * asked.held_out.seq_len, "checkpoints": answers}


def tables_of(asked: Asked, subject: Subject, layers: list[Layer]) -> list[dict[str, Any]]:
    """What is told of each table of a checkpoint."""
    held_out, config = asked.held_out, layers[0].reader.config
    grams = {order: NgramCounts(layers[0].reader, order) for order in config.orders}
    reads = [np.zeros(layer.reader.n_rows, np.int64) for layer in layers]
    about = f"rows that {subject.name} read in training"
    for part, times in trained_on(held_out, subject, about, asked.options.train_tokens, asked.options.batch_size):
        for counted in grams.values():
            counted.add(part["tokens"].numpy(), part["document_ids"].numpy(), times)
        for layer, own in zip(layers, reads, strict=True):
            np.add.at(own, layer.rows(part["tokens"], part["document_ids"]), times[:, None, None])
    text = held_out.whole
    new = {order: counted.new(text["tokens"], text["document_ids"]) for order, counted in grams.items()}
    tables = []
    for layer, own in zip(layers, reads, strict=True):
        batches = held_out.batches(about="held-out reads")
        found = np.concatenate([layer.rows(b["tokens"], b["document_ids"]).astype(layer.narrow) for b in batches])
        tables.append(_table(layer, own, found, grams, new))
    return tables


def _table(
    layer: Layer, reads: Ints, held_out: Ints, grams: dict[int, NgramCounts], new: dict[int, NDArray[np.bool_]]
) -> dict[str, Any]:
    """`reads` of each row in training, `held_out` rows `[windows, T, H]`, and which of its N-grams `[windows, T]` are
    `new`."""
    now = np.bincount(held_out.ravel(), minlength=len(reads))
    sharing = {order: _sharing(layer, counted) for order, counted in grams.items()} if layer.by_ngram else {}
    trained = reads[held_out] > 0
    heads = []
    for h, (order, k, rows) in enumerate(layer.heads):
        own = reads[rows]
        curve = zipf(own)
        heads.append(
            {
                "order": order,
                "head": k,
                "rows": len(own),
                "read": int((own > 0).sum()),
                "read_expected": occupied(len(grams[order].counts), len(own)) if layer.by_ngram else None,
                "read_held_out": int((now[rows] > 0).sum()),
                "held_out_reads_of_untrained": float((~trained[..., h]).mean()),
                **(sharing[order]["heads"][k] if layer.by_ngram else {}),
                "zipf": curve,
            }
        )
    orders = []
    for order, counted in grams.items():
        at = [h for h, head in enumerate(heads) if head["order"] == order]
        on_trained = trained[..., at][new[order]]
        orders.append(
            {
                "order": order,
                "ngrams": len(counted.counts),
                "new_in_held_out": float(new[order].mean()),
                "new_on_trained_rows": float(on_trained.mean()) if on_trained.size else None,
                **(sharing[order]["all"] if layer.by_ngram else {}),
                "zipf": zipf(counted.counts),
            }
        )
    sizes = np.unique(np.geomspace(1e-3, 1, _CACHES).clip(1 / len(reads)) * len(reads)).round().astype(np.int64)
    return {
        "layer": layer.label,
        "rows": len(reads),
        "reads": int(reads.sum()),
        "heads": heads,
        "orders": orders,
        **_norms(layer, reads),
        "cache": {
            "rows": sizes,
            "share": sizes / len(reads),
            "training": served_by_most_read(reads, now, sizes),
            "held_out": served_by_most_read(now, now, sizes),
            "recent": served_by_least_recently_used(held_out.ravel(), sizes),
        },
    }


def _sharing(layer: Layer, counted: NgramCounts) -> dict[str, Any]:
    """Of the N-grams of an order, how many share their row, by head and in all heads of the order."""
    at = [(h, rows) for h, (order, _, rows) in enumerate(layer.heads) if order == counted.order]
    counts = counted.counts
    rows = np.empty((len(at), len(counts)), layer.narrow)  # [K, N-grams]
    start = 0
    for part in counted.raw_ids():
        rows[:, start : start + len(part)] = layer.rows(part)[:, -1, [h for h, _ in at]].T
        start += len(part)
    heads: list[dict[str, Any]] = []
    everywhere = np.ones(len(counts), bool)
    alike, group = (
        np.arange(len(counts)),
        np.zeros(len(counts), np.int64),
    )  # told apart by no head so far, and from whom
    for column, (_, own) in zip(rows, at, strict=True):
        place, n = column - own.start, own.stop - own.start
        once = np.ones_like(counts)
        most = np.zeros(n, np.int64)
        np.maximum.at(most, place, counts)
        everywhere &= np.bincount(place, minlength=n)[place] > 1
        _, group, times = np.unique(group * n + place[alike], return_inverse=True, return_counts=True)
        alike, group = alike[times[group] > 1], group[times[group] > 1]
        heads.append(
            {
                "shared_ngrams": shared(place, once, n),
                "shared_reads": shared(place, counts, n),
                "minor_reads": 1 - float(most.sum() / counts.sum()),
            }
        )
    whole = {
        "shared_in_all": _share(everywhere, np.ones_like(counts), [head["shared_ngrams"] for head in heads]),
        "reads_shared_in_all": _share(everywhere, counts, [head["shared_reads"] for head in heads]),
        "told_apart_by_no_head": len(alike),
    }
    return {"heads": heads, "all": whole}


def _share(who: NDArray[np.bool_], weights: Ints, heads: list[Shared]) -> dict[str, float]:
    """A share, and what it would be if heads were independent."""
    return {"value": float(weights[who].sum() / weights.sum()), "expected": math.prod(h.expected for h in heads)}


def _norms(layer: Layer, reads: Ints) -> dict[str, Any]:
    """Lengths of rows by order and by how often they were read; of those never read, what they started as too."""
    device = layer.reader.hasher.moduli.device
    starts = range(0, len(reads), _CHUNK)
    with torch.no_grad():
        parts = [layer.table(torch.arange(a, min(a + _CHUNK, len(reads)), device=device)).float() for a in starts]
        norms = torch.cat([part.norm(dim=-1).cpu() for part in parts]).double().numpy()
    bins = []
    for order in layer.reader.config.orders:
        spans = [rows for own, _, rows in layer.heads if own == order]
        rows = slice(spans[0].start, spans[-1].stop)
        own, count = norms[rows], binned(reads[rows])
        for i in np.unique(count):
            low, median, high = np.quantile(own[count == i], _QUANTILES)
            known = {"reads": bin_name(int(i)), "rows": int((count == i).sum())}
            bins.append({"order": order, "bin": int(i), **known, "low": low, "median": median, "high": high})
    never = norms[reads == 0]
    # A table that is only read has no weight: of what it once started as nothing is known.
    std: float | None = getattr(layer.table, "std", None)
    width = layer.reader.config.row_width
    mean = None if std is None else std * math.sqrt(2) * math.exp(math.lgamma((width + 1) / 2) - math.lgamma(width / 2))
    untouched = {
        "rows": len(never),
        "mean_norm": float(never.mean()) if len(never) else None,
        "expected": mean,
        "sd": math.sqrt(max(std**2 * width - mean**2, 0) / len(never)) if std and mean and len(never) else None,
    }
    return {"norms": bins, "never_read": untouched}


def draw(result: Result) -> Any:
    """Reads by rank, sharing against chance, norms by reads, and caches; a column for each checkpoint."""
    answers = {name: answer["layers"] for name, answer in result["checkpoints"].items() if answer["layers"]}
    figure, axes = plt.subplots(
        4, len(answers), figsize=(6.2 * len(answers), 15), layout="constrained", squeeze=False, sharey="row"
    )
    for column, (name, layers) in zip(axes.T, answers.items(), strict=True):
        column[0].set_title(name)
        for at, layer in enumerate(layers):
            _draw_table(column, layer, at)
        column[0].set(xscale="log", yscale="log", xlabel="rank of the row, or of the N-gram (grey)")
        column[1].axline((0, 0), slope=1, color=GREY, lw=1)
        column[1].set(xlabel="share of N-grams that share their row, if hashed at random", xlim=(-0.03, 1.03))
        longest = max((known["bin"] for layer in layers for known in layer["norms"]), default=0)
        column[2].set_xticks(range(longest + 1), [bin_name(i) for i in range(longest + 1)], rotation=45, ha="right")
        column[2].tick_params("x", labelsize=8)
        column[2].set(xlabel="times the row was read in training")
        share = np.geomspace(1e-3, 1, 50)
        column[3].plot(share, share, color=GREY, lw=1, label="rows at random")
        column[3].set(xscale="log", xlabel="rows in the cache, share of the table")
        for ax in column:
            ax.grid(alpha=0.25)
            ax.legend(frameon=False, fontsize=8)
    labels = (
        "reads in training",
        "share of N-grams that do",
        "length of rows: 10, 50, 90 %",
        "share of held-out reads",
    )
    for ax, label in zip(axes[:, 0], labels, strict=True):
        ax.set_ylabel(label)
    return figure


def _draw_table(column: Any, layer: dict[str, Any], at: int) -> None:
    lines = dict(zip(dict.fromkeys(known["order"] for known in layer["orders"]), ("-", "--", "-.", ":"), strict=False))
    colour, label = f"C{at}", layer["layer"]
    for head in layer["heads"]:
        order, curve = head["order"], head["zipf"]
        style = {"color": colour, "ls": lines.get(order, ":"), "lw": 1}
        column[0].plot(
            curve["ranks"], curve["reads"], **style, label=None if head["head"] else f"{label}, heads of order {order}"
        )
        if "shared_ngrams" in head:
            known = head["shared_ngrams"]
            column[1].plot(known["expected"], known["value"], f"C{at}{'osv^'[list(lines).index(order) % 4]}", ms=5)
    for i, known in enumerate(layer["orders"]):
        order, curve = known["order"], known["zipf"]
        if at == 0:
            column[0].plot(curve["ranks"], curve["reads"], color=GREY, ls=lines.get(order, ":"), lw=1)
        column[1].plot([], [], f"C{at}{'osv^'[i % 4]}", ms=5, label=f"{label}, order {order}")
        bins = [each for each in layer["norms"] if each["order"] == order]
        x, low, median, high = (np.array([each[key] for each in bins]) for key in ("bin", "low", "median", "high"))
        errors = np.stack([median - low, high - median])
        style = {"color": colour, "ls": lines.get(order, ":"), "ms": 3, "marker": "o", "capsize": 2}
        column[2].errorbar(x + 0.12 * (i - 0.5), median, errors, **style, label=f"{label}, order {order}")
    cache = layer["cache"]
    for (key, told), line in zip(_KEPT.items(), ("-", "--", ":"), strict=True):
        column[3].plot(cache["share"], cache[key], color=colour, ls=line, label=f"{label}, {told}")


_KEPT = {"training": "rows most read in training", "held_out": "rows most read here", "recent": "rows read last"}


def tables(result: Result) -> str:
    """Numbers of every table of every checkpoint."""
    answers = result["checkpoints"]
    without = [html.escape(name) for name, answer in answers.items() if not answer["layers"]]
    parts = [f"<p>Without a memory: {', '.join(without)}.</p>"] if without else []
    parts += [_MEANING]
    for name, answer in answers.items():
        for layer in answer["layers"]:
            parts.append(f"<h3>{html.escape(name)} ({answer['memory']}), {layer['layer']}: {layer['rows']:,} rows</h3>")
            parts.append(f"<p>Reads in training are those of {answer['replayed']}: {layer['reads']:,}.</p>")
            told = [_heads(layer), _orders(layer), _untouched(layer), _cache(layer)]
            parts.append(f"<div class=rows>{''.join(told)}</div>")
    return "\n".join(parts)


_MEANING = """<ul><li>read: rows read at least once in training, and in brackets what as many distinct N-grams hashed at
random would reach; read here: in the held-out text; untrained: held-out reads of rows that training never read
<li>N-grams that share: of the distinct N-grams of training, those whose row another one reads too; reads that share:
the same with each N-gram counted as often as it was read; in brackets what hashing at random would give ± its standard
deviation; minor: reads whose row another N-gram reads more often
<li>share in every head: with some other N-gram in each head, and in brackets if heads were independent; told apart by
no head: N-grams all of whose rows are those of one other
<li>tokens here with a new one: held-out tokens whose N-gram training never met; on trained rows: those of their reads
that find a row which other N-grams have trained
<li>s: exponent of reads ~ rank<sup>&minus;s</sup>, and the ranks it was fitted on; by order that of the N-grams
<li>caches: contents that stay, chosen by reads in training or, the best that any choice can do, by the held-out reads
themselves; or the rows read last, by a cache that is empty at first and sees one sequence after another</ul>
<style>.rows th,.rows td{padding:.2rem .4rem}.rows td{white-space:nowrap}</style>"""


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"  # noqa: RUF001


def _heads(layer: dict[str, Any]) -> str:
    head = ["order, head", "rows", "read", "N-grams that share", "reads that share", "minor", "read here", "untrained"]
    return table([*head, "s"], [_head(known) for known in layer["heads"]])


def _head(known: dict[str, Any]) -> list[str]:
    rows = known["rows"]
    read = _percent(known["read"] / rows)
    if known["read_expected"] is not None:
        read += f" ({100 * known['read_expected'] / rows:.2f})"
    return [
        f"{known['order']}, {known['head']}",
        f"{rows:,}",
        read,
        _shared(known.get("shared_ngrams")),
        _shared(known.get("shared_reads")),
        _percent(known.get("minor_reads")),
        _percent(known["read_held_out"] / rows),
        _percent(known["held_out_reads_of_untrained"]),
        _exponent(known["zipf"]),
    ]


def _exponent(curve: dict[str, Any]) -> str:
    if curve["exponent"] is None:
        return "–"  # noqa: RUF001
    return f"{curve['exponent']:.2f} ({curve['first']} to {curve['last']:,})"


def _shared(known: dict[str, float | None] | None) -> str:
    if known is None or any(value is None for value in known.values()):
        return "–"  # noqa: RUF001
    value, expected, sd = (100 * (each or 0) for each in known.values())
    return f"{value:.2f} % ({expected:.2f} ± {sd:.2f})"


def _orders(layer: dict[str, Any]) -> str:
    rows = []
    for known in layer["orders"]:
        everywhere = [known.get(key) for key in ("shared_in_all", "reads_shared_in_all")]
        told = [_percent(e and e["value"]) + (f" ({100 * e['expected']:.2f})" if e else "") for e in everywhere]
        alike = "–" if "told_apart_by_no_head" not in known else f"{known['told_apart_by_no_head']:,}"  # noqa: RUF001
        new = [_percent(known[key]) for key in ("new_in_held_out", "new_on_trained_rows")]
        rows.append([str(known["order"]), f"{known['ngrams']:,}", *told, alike, *new, _exponent(known["zipf"])])
    head = ["order", "distinct N-grams", "share in every head", "their reads", "told apart by no head"]
    return table([*head, "tokens here with a new one", "on trained rows", "s"], rows)


def _untouched(layer: dict[str, Any]) -> str:
    known = layer["never_read"]
    if known["mean_norm"] is None:
        return "<p>Training read every row.</p>"
    told = f"<p>{known['rows']:,} rows were never read; their mean length is {known['mean_norm']:.5f}"
    if known["expected"] is not None:
        told += f", and as rows are drawn at the start it would be {known['expected']:.5f} ± {known['sd'] or 0:.5f}"
    return told + ".</p>"


def _cache(layer: dict[str, Any]) -> str:
    cache = layer["cache"]
    at = [int(np.argmin(np.abs(np.array(cache["share"]) - share))) for share in (0.01, 0.03, 0.1, 0.3)]
    head = ["held-out reads that a cache serves, if it holds", *(f"{_percent(cache['share'][i])} of rows" for i in at)]
    return table(head, [[told, *(_percent(cache[key][i]) for i in at)] for key, told in _KEPT.items()])


QUESTION = Question("rows", "Rows: what is read, shared and kept", _ABOUT, measure, draw, tables, add_train_tokens)

if __name__ == "__main__":
    sys.exit(main(QUESTION))
