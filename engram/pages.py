"""What every report here is made of: an HTML page that needs no other file, its tables, and pictures as PNG.

Table cells and parts of a page are HTML: whoever makes them escapes what is text (`html.escape`). Titles are text. In
figures, names that users chose go through `as_typed`.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no screen is needed

import matplotlib.pyplot as plt

from engram.training.atomic import atomic_file

BLUE, ORANGE, GREY, GREEN = "#1f5f99", "#d9731a", "#808080", "#2a8a57"
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;font-size:13px;margin:1rem 0}th,td{padding:.2rem .6rem;text-align:right;border-bottom:1px
solid #ddd}th:first-child,td:first-child{text-align:left}img{max-width:100%}pre{overflow-x:auto;font-size:12px;
background:#f6f6f6;padding:.8rem}.verdict{font-size:1.15rem;background:#fff4e8;padding:.8rem 1rem}"""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole HTML page with a heading; `title` is text, `parts` are HTML."""
    title = html.escape(title)
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
    return "\n".join([head, f"<h1>{title}</h1>", *parts, "</html>"])


def in_short(count: float) -> str:
    """A count with its unit: 8.19k, 1.72M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return f"{count:.0f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table; the cells are HTML."""
    lines = ["<table><tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</table>"])


def as_typed(name: str) -> str:
    """A name for a figure: in matplotlib two `$` make a formula, and a legend leaves out what begins with `_`."""
    name = name.replace("$", r"\$")
    return f"\N{ZERO WIDTH SPACE}{name}" if name.startswith("_") else name


def picture(figure: Any, alt: str) -> str:
    """A figure as an HTML image that holds its own bytes, and let go of it; `alt` is text."""
    return embedded(png_of(figure, 120), alt)


def saved_picture(figure: Any, path: Path, alt: str) -> str:
    """As `picture`, of a figure that is also written to a file."""
    png = png_of(figure)
    save(png, path)
    return embedded(png, alt)


def embedded(png: bytes, alt: str) -> str:
    """The bytes of a PNG as an HTML image; `alt` is text."""
    return f"<img alt='{html.escape(alt)}' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"


def png_of(figure: Any, dpi: int = 140) -> bytes:
    """A figure as the bytes of a PNG, and let go of it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    plt.close(figure)
    return buffer.getvalue()


def save(png: bytes, path: Path) -> None:
    """Write a PNG, atomically."""
    with atomic_file(path) as draft:
        draft.write_bytes(png)
