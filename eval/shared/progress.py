"""A progress bar on the terminal, and nothing where standard error is a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def shown(steps: Sequence[T], about: str) -> Iterable[T]:
    """The steps, one by one, behind a bar; none if `about` is empty."""
    console = Console(stderr=True)
    hidden = not about or not console.is_terminal
    return track(steps, about, console=console, transient=True, disable=hidden)
