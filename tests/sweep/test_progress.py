"""What a sweep shows while it runs: on a terminal of 80 columns, and in a log."""

import io
import json
from pathlib import Path

from rich.console import Console

from engram.sweep.progress import BarDisplay, LineDisplay

NAMES = [f"engram-rho{rho:.3f}-seed0-0123abcd" for rho in (0.0, 0.5, 1.0)]


def write_progress(path: Path, step: int) -> None:
    path.write_text(json.dumps({"step": step, "steps": 8, "tokens": 1e6, "loss": 3.25, "tokens_per_s": 21_000.0}))


def test_bars_fit_a_terminal_and_tell_points_loss_speed_and_what_is_done(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=80, height=30, force_terminal=True)
    display = BarDisplay(console)
    with display:
        display.expect(3)
        display.finished(NAMES[0], skipped=True)
        display.started(NAMES[1], tmp_path / "progress.json")
        write_progress(tmp_path / "progress.json", 4)
        display.refresh()
        with console.capture() as captured:
            console.print(display.renderable)
    lines = [line for line in Console(file=io.StringIO()).render_str(captured.get()).plain.splitlines() if line]
    whole, point = (next(line for line in lines if start in line) for start in ("1 of 3 done", "engram-rho0.500-seed0"))
    assert "3.250" in point
    assert "21.0k tok/s" in point
    assert "…" not in whole + point


def test_the_whole_bar_counts_running_parts_and_leaves_out_what_was_done_before(tmp_path: Path) -> None:
    display = BarDisplay(Console(file=io.StringIO()))
    display.expect(3)
    display.finished(NAMES[0], skipped=True)
    display.started(NAMES[1], tmp_path / "progress.json")
    write_progress(tmp_path / "progress.json", 4)
    display.refresh()
    assert display.share == 0.5 / 2
    display.finished(NAMES[1])
    display.refresh()
    assert display.share == 1 / 2


def test_lines_name_what_happens(capsys: object) -> None:
    display = LineDisplay()
    display.expect(3)
    display.started(NAMES[0], Path("absent"))
    display.refresh()
    display.finished(NAMES[0])
    assert capsys.readouterr().out.splitlines() == ["3 points", f"started {NAMES[0]}", f"done {NAMES[0]}"]  # type: ignore[attr-defined]
