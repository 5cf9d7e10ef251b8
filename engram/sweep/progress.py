"""What a sweep shows while it runs: a bar for each running point on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from engram.pages import in_short
from engram.sweep.records import read_record

_LINE_SECONDS = 30.0


class Display(Protocol):
    """Told what happens to points, by name; used as a context."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def expect(self, points: int) -> None:
        """How many points the sweep has, told first."""

    def started(self, name: str, progress_file: Path) -> None:
        """A point began or went on; its run writes `progress_file`."""

    def finished(self, name: str, skipped: bool = False) -> None:
        """A point is done, now or (skipped) before."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def refresh(self) -> None:
        """Called a few times a second."""


def make_display() -> Display:
    """Bars if standard output is a terminal, else lines."""
    return BarDisplay() if sys.stdout.isatty() else LineDisplay()


class LineDisplay:
    """One line for each event, and one for each running point every half minute."""

    def __init__(self) -> None:
        self._files: dict[str, Path] = {}
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.note("stopped: finished points are kept, the others go on at their last checkpoint next time")

    def expect(self, points: int) -> None:
        self.note(f"{points} points")

    def started(self, name: str, progress_file: Path) -> None:
        self._files[name] = progress_file
        self.note(f"started {name}")

    def finished(self, name: str, skipped: bool = False) -> None:
        self._files.pop(name, None)
        self.note(f"{'already done' if skipped else 'done'} {name}")

    def note(self, text: str) -> None:
        print(text, flush=True)

    def refresh(self) -> None:
        if time.monotonic() - self._last < _LINE_SECONDS:
            return
        self._last = time.monotonic()
        for name, path in self._files.items():
            if p := read_record(path):
                loss = "" if p["loss"] is None else f", loss {p['loss']:.3f}"
                self.note(f"  {name}: {p['tokens']:,} tokens{loss}, {p['tokens_per_s']:,.0f} tokens/s")


class BarDisplay:
    """A bar for each running point, with loss and speed, and one for the whole sweep, each with the time left.

    Args:
        console: where to draw; standard output if None.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[said]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._tasks: dict[str, tuple[TaskID, Path]] = {}
        self._whole = self._progress.add_task("sweep", said="")
        self._done = self._trained = self._points = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if kind is not None:
            print("stopped: finished points are kept, the others go on at their last checkpoint next time")

    @property
    def renderable(self) -> Progress:
        """What is drawn, for a console."""
        return self._progress

    @property
    def share(self) -> float:
        """How much of the training that this run of the sweep has to do is done, 0 to 1."""
        whole = self._progress.tasks[self._whole]
        return whole.completed / (whole.total or 1)

    def expect(self, points: int) -> None:
        self._points = points

    def started(self, name: str, progress_file: Path) -> None:
        if name not in self._tasks:
            self._tasks[name] = (self._progress.add_task(_without_fingerprint(name), said="starting"), progress_file)

    def finished(self, name: str, skipped: bool = False) -> None:
        if name in self._tasks:
            self._progress.remove_task(self._tasks.pop(name)[0])
        self._done += 1
        self._trained += not skipped
        self.note(f"{'already done' if skipped else 'done'} {name}")

    def note(self, text: str) -> None:
        self._progress.console.print(text, highlight=False)

    def refresh(self) -> None:
        running = 0.0
        for task, path in self._tasks.values():
            if p := read_record(path):
                loss = "" if p["loss"] is None else f"{p['loss']:.3f} "
                said = f"{in_short(p['tokens'])} {loss}{p['tokens_per_s'] / 1e3:.1f}k tok/s"
                self._progress.update(task, completed=p["step"], total=p["steps"], said=said)
                running += p["step"] / p["steps"]
        # Points that were done before take no time now, so they count for nothing in the time left.
        to_train = self._points - (self._done - self._trained)
        said = f"{self._done} of {self._points} done"
        self._progress.update(self._whole, completed=self._trained + running, total=to_train, said=said)


def _without_fingerprint(name: str) -> str:
    return name.rpartition("-")[0]
