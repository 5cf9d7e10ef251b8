"""Text whose tokens are coloured by a number, as HTML that needs no script: one text, several layers to choose from.

Each token carries its shade for every layer; radio buttons pick by CSS which of them is shown.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

_STYLE = """<style>.heat{display:grid;grid-template-columns:repeat(auto-fit,minmax(26rem,1fr));gap:1rem}
.heat>div{border:1px solid #ddd;padding:.6rem .8rem}.heat label{margin-right:.8rem;font-size:13px}
.heat pre{white-space:pre-wrap;overflow-wrap:anywhere;font:12px/1.7 ui-monospace,monospace;padding:0;background:#fff;
margin:.2rem 0 .8rem}.heat pre span{background:rgb(217 115 26/calc(var(--now)*1%))}
.heat i{color:#888;font-style:normal}.heat h4,.heat h5{margin:.2rem 0}.heat .scale{display:none;font-size:12px}
.heat .scale b{display:inline-block;width:8rem;height:.7rem;margin:0 .4rem;border:1px solid #ddd;
background:linear-gradient(90deg,#fff,rgb(217 115 26))}</style>"""
_MARKS = {" ": "<i>·</i><wbr>", "\n": "<i>⏎</i>\n", "\t": "<i>⇥</i>\t", "\r": "<i>␍</i>"}


@dataclass(frozen=True)
class Shades:
    """A choice of a map: numbers of all texts' tokens, of which `low` is shown white and `high` in full colour."""

    name: str
    low: float
    high: float
    values: Sequence[Sequence[float]]

    def of(self, text: int, token: int) -> int:
        """From 0 to 100."""
        width = self.high - self.low
        return round(100 * min(max((self.values[text][token] - self.low) / width, 0), 1)) if width > 0 else 0


@dataclass(frozen=True)
class Text:
    """A stretch of text: a heading, its tokens as text, and what is told of each by itself."""

    heading: str
    pieces: Sequence[str]
    told: Sequence[str]


def visible(piece: str) -> str:
    """A piece of text as HTML that shows white space and control characters."""
    return "".join(_MARKS.get(c) or html.escape(_control_picture(c)) for c in piece)


def _control_picture(character: str) -> str:
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else character


def heat_map(key: str, title: str, choices: Sequence[Shades], texts: Sequence[Text]) -> str:
    """One map; the first choice is shown at first. `key`, of letters and digits, is its own on the page; all else is
    text."""
    buttons, scales, rules = [], [], []
    for i, choice in enumerate(choices):
        name = f"{key}-{i}"
        checked = " checked" if i == 0 else ""
        buttons.append(f"<input type=radio name={key} id={name}{checked}><label for={name}>{html.escape(choice.name)}")
        buttons.append("</label>")
        scales.append(f"<p class='scale {name}'>{choice.low:.2f}<b></b>{choice.high:.2f}</p>")
        rules.append(f"#{name}:checked~pre span{{--now:var(--s{i})}}#{name}:checked~.{name}{{display:block}}")
    parts = [f"<div><h4>{html.escape(title)}</h4><style>{''.join(rules)}</style>", *buttons, *scales]
    for k, text in enumerate(texts):
        tokens = []
        for t, (piece, told) in enumerate(zip(text.pieces, text.told, strict=True)):
            shades = ";".join(f"--s{i}:{choice.of(k, t)}" for i, choice in enumerate(choices))
            note = html.escape(f"{told}\n" + "\n".join(f"{c.name}: {c.values[k][t]:.3f}" for c in choices))
            note = note.replace("\n", "&#10;")
            tokens.append(f'<span style="{shades}" title="{note}">{visible(piece)}</span>')
        parts.append(f"<h5>{html.escape(text.heading)}</h5><pre>{''.join(tokens)}</pre>")
    return "".join(parts) + "</div>"


def side_by_side(maps: Sequence[str]) -> str:
    """Maps of one page section."""
    return f"{_STYLE}<div class=heat>{''.join(maps)}</div>"
