"""What a checkpoint costs to serve: tokens a second, FLOPs, bytes a token and peak memory, in prefill and in decoding.

    python -m eval.cost --checkpoint RUN [--against RUN]

Speeds and memory are measured, FLOPs and bytes follow from the model's shape; the run's loss stands beside them.
"""

from __future__ import annotations

import argparse
import html
import os
import sys
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from engram.config import require
from engram.memory.table import tables_in
from engram.pages import table
from engram.sweep.fit import CONFIDENCE, Interval
from engram.sweep.launch import usable_cores
from eval.shared.command import main
from eval.shared.page import interval
from eval.shared.peak_memory import peaks_of
from eval.shared.question import Asked, Question, Result
from eval.shared.serving import alternate, decode, prefill
from eval.shared.subjects import Subject
from eval.shared.work import Bytes, bytes_read, decoding_flops, prefill_flops

_PHASES = ("prefill", "decoding")
_ABOUT = """<p>What it takes to read a prompt (prefill) and to write on from it a token at a time (decoding), so that a
loss can be set against seconds as well as against FLOPs. <b>Speeds</b> are measured on the hardware named below, on
held-out text; checkpoints take turns in every round. Values are medians over rounds, brackets hold the median with
95&nbsp;% confidence if rounds tell nothing of each other (order statistics). Speeds over the first checkpoint's are
taken round by round, so that other work on the machine counts less: above 1, the other one is faster; if the bracket
holds 1, they are not told apart. <b>FLOPs</b> and <b>bytes</b> follow from the model's shape, as what a token cannot do
without: each weight once for all tokens of a pass, of the experts those that were chosen in this text, the rows of its
N-grams, and what is kept of the tokens before. They say what kind of work it is, the rates beside them how much of the
machine it uses. <b>Peak memory</b> is that of a process which does nothing else, less what it held before it opened
the model.</p>"""


def measure(asked: Asked) -> Result:
    """Every case, of sequences and lengths, for each checkpoint."""
    options = asked.options
    for name in ("lengths", "sequences"):
        values = getattr(options, name)
        require(all(v >= 1 for v in values), name, values, "1 or more each")
    for name, least in (("new_tokens", 1), ("rounds", 6)):
        require(getattr(options, name) >= least, name.replace("_", "-"), getattr(options, name), f"{least} or more")
    longest = asked.subjects[0].model.config.max_seq_len
    lengths = options.lengths or sorted({max(1, longest // 4), longest})
    cases = [(sequences, length) for length in lengths for sequences in options.sequences]
    text = asked.held_out.whole["tokens"].ravel()
    return {
        "rounds": options.rounds,
        "new_tokens": options.new_tokens,
        "threads": torch.get_num_threads(),
        "cores": usable_cores(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "checkpoints": {subject.name: _held(subject) for subject in asked.subjects},
        "cases": [part for case in cases for part in _timed(asked, *case, text)],
        "memory": {subject.name: _memory(asked, subject, cases, text) for subject in asked.subjects},
    }


def _held(subject: Subject) -> dict[str, Any]:
    """What is known of a checkpoint without running it."""
    run, model = subject.run, subject.model
    losses = {} if run is None else run.result.get("val") or {}
    return {
        "loss": losses.get("nats"),
        "corpus": None if run is None else run.data.corpus_hash,
        "parameters": subject.budget.with_embeddings,
        "parameter_bytes": sum(weight.nbytes for weight in model.parameters()),
        "table_bytes": sum(each.weight.nbytes for *_, each in tables_in(model)),
    }


@dataclass
class _Served:
    """A checkpoint that reads and writes the texts of a case, those of one round `[B, T + n]` at a time."""

    asked: Asked
    subject: Subject
    ids: Tensor
    length: int

    def prefill(self, i: int) -> None:
        """Read the prompts of a round."""
        with self.asked.precision():
            self.state, self.loads = prefill(self.subject.model, self.ids[i, :, : self.length], self.new_tokens)

    def decoding(self, i: int) -> None:
        """Write on from them."""
        with self.asked.precision():
            self.step_loads = decode(self.subject.model, self.ids[i, :, self.length :], self.state)

    @property
    def new_tokens(self) -> int:
        """Tokens of a sequence that are decoded."""
        return self.ids.shape[2] - self.length

    def work(self, phase: str) -> tuple[float, Bytes]:
        """FLOPs and bytes of a token in the last round; in decoding, the mean of its steps."""
        model, B, T, n = self.subject.model, self.ids.shape[1], self.length, self.new_tokens
        if phase == "prefill":
            experts = sum(int((load > 0).sum()) for load in self.loads)
            return prefill_flops(model.config, T), bytes_read(model, B * T, experts) / (B * T)
        flops = sum(decoding_flops(model.config, T + t + 1) for t in range(n)) / n
        used = sum(int((load > 0).sum()) for step in self.step_loads for load in step) / n
        return flops, bytes_read(model, B, used, T + (n - 1) / 2, self.state) / B


def _timed(asked: Asked, sequences: int, length: int, text: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Prefill and decoding of one case: seconds of all checkpoints in turn, and what follows from them."""
    n, rounds, device = asked.options.new_tokens, asked.options.rounds, asked.subjects[0].device
    ids = _rows(text, (rounds + 1) * sequences, length + n).view(rounds + 1, sequences, length + n).to(device)
    served = {subject.name: _Served(asked, subject, ids, length) for subject in asked.subjects}
    parts = {name: [each.prefill, each.decoding] for name, each in served.items()}
    seconds = alternate(parts, rounds, device, f"{sequences} x {length} tokens")
    first = seconds[asked.subjects[0].name]
    found = []
    for at, (phase, tokens) in enumerate(zip(_PHASES, (sequences * length, sequences * n), strict=True)):
        answers = {}
        for name, own in seconds.items():
            speed, (flops, needed) = median_of(tokens / own[:, at]), served[name].work(phase)
            answers[name] = {
                "seconds": own[:, at],
                "tokens_per_s": speed,
                "over_first": median_of(first[:, at] / own[:, at]),
                "flops_per_token": flops,
                "flops_per_s": flops * speed.value,
                "bytes_per_token": needed,
                "bytes_per_s": needed.total * speed.value,
            }
        found.append({"phase": phase, "sequences": sequences, "length": length, "checkpoints": answers})
    return found


def _memory(asked: Asked, subject: Subject, cases: list[tuple[int, int]], text: NDArray[np.int64]) -> dict[str, Any]:
    options, n = asked.options, asked.options.new_tokens
    longest = max(sequences * (length + n) for sequences, length in cases)
    ids = _rows(text, 1, max(2, longest)).numpy()[0]
    peaks = peaks_of(subject.path, cases, n, ids, options.device, options.bf16)
    found = [{"sequences": s, "length": t} | peak for (s, t), peak in zip(cases, peaks["cases"], strict=True)]
    return {"model": peaks["model"], "cases": found}


def _rows(text: NDArray[np.int64], rows: int, length: int) -> Tensor:
    """Rows of text `[rows, length]`, one after the other, from the start again where it ends."""
    return torch.from_numpy(np.resize(text, (rows, length)))


def median_of(values: NDArray[np.float64]) -> Interval:
    """The median, between the two values that hold it with 95 % confidence whatever the distribution is (of fewer than
    six values, between the least and the greatest)."""
    ordered, n = np.sort(values), len(values)
    outside = max(int(stats.binom.ppf((1 - CONFIDENCE) / 2, n, 0.5)) - 1, 0)
    return Interval(float(np.median(values)), float(ordered[outside]), float(ordered[n - 1 - outside]))


def draw(result: Result) -> Any:
    """Speeds by case, bytes a token in decoding, and, where losses are known, loss against FLOPs and against time."""
    held = result["checkpoints"]
    known, _ = _losses(held)
    against = len(known) > 0
    figure = plt.figure(figsize=(15, 8.4 if against else 4.2), layout="constrained")
    axes = figure.subplots(1 + against, 3, squeeze=False)
    cases = {phase: [case for case in result["cases"] if case["phase"] == phase] for phase in _PHASES}
    for ax, phase in zip(axes[0], _PHASES, strict=False):
        _draw_speeds(ax, phase, cases[phase])
    _draw_bytes(axes[0][2], cases["decoding"])
    if against:
        last = {phase: cases[phase][-1] for phase in _PHASES}
        losses = {name: held[name]["loss"] for name in known}
        _draw_losses(axes[1][0], losses, last["decoding"], "flops_per_token", "FLOPs of a token, decoding")
        for ax, phase in zip(axes[1][1:], _PHASES, strict=True):
            _draw_losses(ax, losses, last[phase], "seconds", f"microseconds a token, {phase}")
    return figure


def _losses(held: dict[str, Any]) -> tuple[list[str], str]:
    """The checkpoints whose losses are drawn against costs, and why those of others are not, in words; all were
    validated on text of one corpus, or none is drawn."""
    known = [name for name, about in held.items() if about["loss"] is not None]
    corpora = {held[name]["corpus"]: name for name in reversed(known)}  # and the first checkpoint of each
    if len(corpora) > 1:
        several = " and ".join(list(corpora.values())[::-1])
        return [], f"No loss is drawn against costs: {several} were trained and validated on different corpora."
    unknown = ", ".join(name for name in held if name not in known)
    reason = f"Losses drawn against costs leave out {unknown}" if known else "No loss is drawn against costs"
    return known, f"{reason}: the loss of the run's last validation is not known." if unknown else ""


def _draw_speeds(ax: Any, phase: str, cases: list[dict[str, Any]]) -> None:
    for i, name in enumerate(cases[0]["checkpoints"]):
        speeds = [case["checkpoints"][name]["tokens_per_s"] for case in cases]
        values = np.array([[s["value"], s["low"], s["high"]] for s in speeds])
        errors = np.stack([values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]])
        at = np.arange(len(cases)) + 0.08 * i
        ax.errorbar(at, values[:, 0], errors, fmt="o", ms=5, capsize=3, color=f"C{i}", label=name)
    ax.set_xticks(range(len(cases)), [_case(case) for case in cases], fontsize=8)
    ax.set_xlabel("sequences x tokens" + (" read before" if phase == "decoding" else ""))
    ax.set_title(f"{phase}: tokens a second ↑", fontsize=10, loc="left")
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(EngFormatter())
    ax.grid(alpha=0.25)
    ax.legend(frameon=False, fontsize=8)


def _draw_bytes(ax: Any, cases: list[dict[str, Any]]) -> None:
    names = list(cases[0]["checkpoints"])
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        bottom = np.zeros(len(cases))
        at = np.arange(len(cases)) + width * (i + 0.5) - 0.4
        for kind, alpha in (("weights", 1.0), ("rows", 0.6), ("cache", 0.3)):
            values = np.array([case["checkpoints"][name]["bytes_per_token"][kind] for case in cases])
            ax.bar(at, values, width * 0.9, bottom, color=f"C{i}", alpha=alpha, label=None if i else kind)
            bottom += values
    ax.set_xticks(range(len(cases)), [_case(case) for case in cases], fontsize=8)
    ax.set_title("decoding: bytes a token ↓", fontsize=10, loc="left")
    ax.yaxis.set_major_formatter(EngFormatter("B"))
    ax.legend(frameon=False, fontsize=7)


def _draw_losses(ax: Any, losses: dict[str, float], case: dict[str, Any], what: str, label: str) -> None:
    for i, (name, loss) in enumerate(losses.items()):
        answer = case["checkpoints"][name]
        if what == "seconds":
            speed = answer["tokens_per_s"]
            value, ends = 1e6 / speed["value"], (1e6 / speed["high"], 1e6 / speed["low"])
            ax.errorbar(value, loss, xerr=[[value - ends[0]], [ends[1] - value]], fmt="o", color=f"C{i}", capsize=3)
        else:
            value = answer[what]
            ax.plot(value, loss, "o", color=f"C{i}")
        ax.annotate(name, (value, loss), xytext=(5, 5), textcoords="offset points", fontsize=8, color=f"C{i}")
    ax.margins(0.3)
    ax.xaxis.set_major_formatter(EngFormatter())
    ax.set_xlim(left=0 if what == "seconds" else None)
    ax.set_xlabel(f"{label} ({_case(case)})")
    ax.set_ylabel("loss of the run's last validation, nats")
    ax.grid(alpha=0.25)


def _case(case: dict[str, Any]) -> str:
    return f"{case['sequences']} x {case['length']}"


def tables(result: Result) -> str:
    """All numbers, prefill and decoding apart."""
    held = result["checkpoints"]
    first = next(iter(held))
    _, reason = _losses(held)
    parts = [
        *([f"<p>{html.escape(reason)}</p>"] if reason else []),
        table(
            ["", "loss, nats", "parameters", "their bytes", "of them in tables"],
            [
                [
                    html.escape(name),
                    "–" if about["loss"] is None else f"{about['loss']:.4f}",  # noqa: RUF001
                    f"{about['parameters']:,}",
                    _bytes(about["parameter_bytes"]),
                    _bytes(about["table_bytes"]),
                ]
                for name, about in held.items()
            ],
        ),
    ]
    for phase in _PHASES:
        head = [
            "",
            "sequences x tokens",
            "tokens/s",
            f"over {html.escape(first)}",
            "FLOPs a token",
            "FLOP/s",
            "bytes a token",
        ]
        head += ["of weights, rows, cache", "bytes/s", "peak memory"]
        rows = []
        for case in (case for case in result["cases"] if case["phase"] == phase):
            for name, answer in case["checkpoints"].items():
                needed = answer["bytes_per_token"]
                peaks = result["memory"][name]["cases"]
                at = [(p["sequences"], p["length"]) for p in peaks].index((case["sequences"], case["length"]))
                rows.append(
                    [
                        html.escape(name),
                        _case(case),
                        interval(answer["tokens_per_s"], 0),
                        "" if name == first else interval(answer["over_first"], 3),
                        f"{answer['flops_per_token']:,.0f}",
                        f"{answer['flops_per_s'] / 1e9:.2f} G",
                        _bytes(sum(needed.values())),
                        ", ".join(_bytes(needed[kind]) for kind in ("weights", "rows", "cache")),
                        _bytes(answer["bytes_per_s"]),
                        _bytes(peaks[at][phase]),
                    ]
                )
        note = f", {result['new_tokens']} tokens after as many as said" if phase == "decoding" else ""
        parts += [f"<h3>{phase.capitalize()}{note}</h3>", table(head, rows)]
    opened = ", ".join(f"{html.escape(name)} {_bytes(memory['model'])}" for name, memory in result["memory"].items())
    load = "" if result["load"] is None else f"; the machine's load was {result['load']:.1f} when they began"
    parts.append(
        f"<p>{result['rounds']} rounds, on {result['threads']} threads of {result['cores']} cores{load}. Memory held "
        f"once a model is opened and has run on one token: {opened}. With few tokens at once much of the time is not "
        "that of arithmetic or reading.</p>"
    )
    return "\n".join(parts)


def _bytes(n: float | None) -> str:
    """A number of bytes for people."""
    if n is None:
        return "unknown"
    for unit in ("B", "kB", "MB"):
        if abs(n) < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} GB"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the cases."""
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[], metavar="T", help="of prompts (1/4 of max_seq_len, and that)"
    )
    parser.add_argument(
        "--sequences", type=int, nargs="+", default=[1, 8], metavar="B", help="read and written at once"
    )
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="decoded after each prompt")
    parser.add_argument("--rounds", type=int, default=15, help="timed, after one to warm up")


QUESTION = Question("cost", "Speed, work and memory", _ABOUT, measure, draw, tables, add_options)

if __name__ == "__main__":
    sys.exit(main(QUESTION))
