"""The page of a folder of answers: one self-contained HTML file for readers who did not run anything.

It is made anew of all the JSON files and pictures that are there each time another question is answered.
"""

from __future__ import annotations

import hashlib
import html
import importlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from engram.pages import embedded, page, table
from engram.training.atomic import atomic_file
from eval import QUESTIONS
from eval.shared.strata import explained

PAGE = "report.html"
FORMAT = 1  # of an answer's JSON: another number wherever a page of before could no longer be made of it


def write_page(folder: Path) -> Path:
    """Write the page of a folder's answers; returns its path."""
    found = [_read(folder / f"{name}.json") for name in QUESTIONS if (folder / f"{name}.json").is_file()]
    records = [record for record in found if record.get("format") == FORMAT]
    names = list(dict.fromkeys(checkpoint["name"] for record in records for checkpoint in record["checkpoints"]))
    others = [record["question"] for record in found if record not in records]
    sections = (part for record in records for part in _section(record, folder))
    parts = [_contents(records), _outdated(others), _warning(records), *sections]
    with atomic_file(folder / PAGE) as draft:
        draft.write_text(page(" and ".join(names), parts), encoding="utf-8")
    return folder / PAGE


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _contents(records: Sequence[dict[str, Any]]) -> str:
    items = (f"<li><a href='#{r['question']}'>{html.escape(QUESTIONS[r['question']])}</a>" for r in records)
    return "<ul>" + "".join(items) + "</ul>"


def _outdated(questions: Sequence[str]) -> str:
    """What a reader must know of answers that this version can't read."""
    told = "answered by another version of engram, and not shown: ask again"
    return f"<p><b>{', '.join(questions)}: {told}.</b></p>" if questions else ""


def _warning(records: Sequence[dict[str, Any]]) -> str:
    """What a reader must know if a name stands for different checkpoints in different answers."""
    known: dict[str, set[tuple[Any, ...]]] = {}
    for checkpoint in (each for record in records for each in record["checkpoints"]):
        about = tuple(checkpoint[what] for what in ("total", "active", "tokens", "seed", "corpus_hash"))
        known.setdefault(checkpoint["name"], set()).add(about)
    changed = ", ".join(html.escape(name) for name, abouts in known.items() if len(abouts) > 1)
    told = "not the same checkpoint in all sections: see their &ldquo;Checkpoints and settings&rdquo;"
    return f"<p><b>{changed}: {told}.</b></p>" if changed else ""


def _section(record: dict[str, Any], folder: Path) -> Iterable[str]:
    name = record["question"]
    question = importlib.import_module(f"eval.{name}").QUESTION
    names = ", ".join(html.escape(checkpoint["name"]) for checkpoint in record["checkpoints"])
    yield f"<h2 id={name}>{html.escape(question.title)}</h2><p>Asked of: {names}.</p>{question.about}"
    if "hot_from" in record["options"]:
        options, first = record["options"], record["checkpoints"][0]
        yield explained(record["result"]["order"], options["hot_from"], first, options["train_tokens"])
    yield _picture(record, folder / f"{name}.png", question.title)
    yield question.tables(record["result"])
    yield "<details><summary>Checkpoints and settings</summary>"
    yield table(
        ["checkpoint", "rho", "parameters", "a token uses", "memory", "trained on, tokens", "seed", "corpus"],
        [_checkpoint(checkpoint) for checkpoint in record["checkpoints"]],
    )
    n_tokens = record["held_out_tokens"]
    text = {} if n_tokens is None else {"held-out text at hand, tokens": f"{n_tokens:,}"}
    settings = {**record["options"], **text, "hardware": record["device"], **record["versions"]}
    yield table(["", ""], [[html.escape(str(k)), html.escape(str(v))] for k, v in settings.items()]) + "</details>"


def _picture(record: dict[str, Any], path: Path, title: str) -> str:
    """The picture of an answer, or what keeps it from being shown."""
    try:
        png = path.read_bytes()
    except FileNotFoundError:
        return f"<p><b>The picture is missing: there is no {path.name}. Ask again to have it drawn.</b></p>"
    if record["picture_sha256"] != hashlib.sha256(png).hexdigest():
        return f"<p><b>No picture: {path.name} is not that of these numbers. Ask again to have it drawn.</b></p>"
    return embedded(png, title)


def _checkpoint(known: dict[str, Any]) -> list[str]:
    return [
        html.escape(known["name"]),
        f"{known['rho']:.3f}",
        f"{known['total']:,}",
        f"{known['active']:,}",
        known["memory"] or "none",
        "unknown" if known["tokens"] is None else f"{known['tokens']:,}",
        "unknown" if known["seed"] is None else str(known["seed"]),
        "unknown" if known["corpus_hash"] is None else known["corpus_hash"][:12],
    ]


def interval(known: dict[str, float | None], digits: int, sign: str = "", unit: str = "") -> str:
    """An interval of an answer, as a page tells it; `sign` "+" shows the sign of what is positive too."""
    value, low, high = (known[name] for name in ("value", "low", "high"))
    if value is None:
        return "–"  # noqa: RUF001
    ends = "" if low is None or high is None else f" ({low:{sign}.{digits}f} to {high:{sign}.{digits}f})"
    return f"{value:{sign}.{digits}f}{unit}{ends}"


def percent(known: dict[str, float | None], digits: int = 1) -> str:
    """An interval of shares, in percent."""
    return interval({name: None if value is None else 100 * value for name, value in known.items()}, digits, unit=" %")
