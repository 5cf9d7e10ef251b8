"""What every comparison here shares: alternating timing, a table of ratios, the hardware's name, the result file.

Sides run in turn on the same inputs (A B A B ...), and a side's time is the median over the rounds, so that a busy
moment of the machine or its warming up falls on all alike. Nothing that is slower than its peer is left out.
"""

from __future__ import annotations

import importlib
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from engram.training.atomic import write_json

RESULTS = Path(__file__).parent / "results"
PEERS = Path(__file__).parent.parent / ".peers"
CALL_LIMIT_S = 20.0
MIN_ROUNDS = 5
MEMORY_LIMIT = 8 * 2**30
LOAD_BEFORE = os.getloadavg()[0]

Side = Callable[[Any], object]
Measured = float | str  # seconds, or why there are none


def hardware() -> dict[str, str | int | float]:
    """CPU, threads and versions that a result was measured with, and how busy others kept the machine before."""
    info = Path("/proc/cpuinfo")
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line) if info.exists() else {}
    named = {name.strip(): value.strip() for name, value in fields.items()}
    cpu = named.get("model name", platform.processor() or platform.machine())
    if "cpu family" in named:
        cpu += f" (family {named['cpu family']}, model {named['model']})"
    return {
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load before": LOAD_BEFORE,
    }


def alternate(
    sides: Mapping[str, Side | str],
    draw: Callable[[], Any],
    *,
    rounds: int = 41,
    sample_s: float = 0.01,
    budget_s: float = 3.0,
) -> dict[str, Measured]:
    """Median seconds of a call of each side, all sides in turn on the same fresh inputs, which `draw` makes untimed.

    A sample of short calls is the mean of several, `sample_s` long for the slowest side. After two calls that warm up
    there are up to `rounds` rounds; a side that has used its share of `budget_s` leaves after five. A side given as a
    string has no time but that reason, as one has whose first call passes `CALL_LIMIT_S`.
    """
    result: dict[str, Measured] = {name: side for name, side in sides.items() if isinstance(side, str)}
    running = {name: side for name, side in sides.items() if not isinstance(side, str)}
    share = budget_s / max(len(running), 1)
    once: dict[str, float] = {}
    for _ in range(2):
        x = draw()
        for name, side in list(running.items()):
            if once.get(name, 0.0) < share:
                once[name] = _seconds(side, [x])
            if once[name] > CALL_LIMIT_S:
                result[name] = f"> {CALL_LIMIT_S:.0f} s"
                del running[name]
    calls = min(max(int(sample_s / max([once[name] for name in running], default=1.0)), 1), 50)
    samples: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        inputs = [draw() for _ in range(calls)]
        for name, side in running.items():
            if len(samples[name]) < MIN_ROUNDS or sum(samples[name]) * calls < share:
                samples[name].append(_seconds(side, inputs))
    return result | {name: statistics.median(values) for name, values in samples.items()}


def _seconds(side: Side, inputs: Sequence[Any]) -> float:
    start = time.perf_counter()
    for x in inputs:
        side(x)
    return (time.perf_counter() - start) / len(inputs)


# on a CUDA device


Call = Callable[[], Any]
PAUSE = 2_000_000  # cycles, about a millisecond


def gpu_hardware() -> dict[str, str | int | float]:
    """As `hardware`, with the device and the Triton."""
    import triton

    device = torch.cuda.get_device_properties(0)
    return {**hardware(), "gpu": device.name, "gpu_memory": device.total_memory, "triton": triton.__version__}


def alternate_on_gpu(calls: Mapping[str, Call | str], rounds: int = 20) -> dict[str, Measured]:
    """Median seconds of each side's call on the device, in turn, each with a cold L2 cache and its launches queued
    behind a pause, so that the host's time does not count.

    A side given as a string has no time but that reason, as has a peer that fails; the side `ours` must not.
    """
    result: dict[str, Measured] = {}
    running: dict[str, Call] = {}
    for name, call in calls.items():
        if isinstance(call, str):
            result[name] = call
            continue
        try:
            for _ in range(3):
                call()
            torch.cuda.synchronize()
            running[name] = call
        except torch.OutOfMemoryError:
            result[name] = "out of memory"
        except Exception as error:  # a peer that fails is told of, and the others go on
            if name == "ours":
                raise
            result[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]
        torch.cuda.empty_cache()
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, call in running.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(PAUSE)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end) / 1e3)
    result |= {name: statistics.median(values) for name, values in times.items()}
    return {name: result[name] for name in calls}


def copy_rate() -> float:
    """Bytes that a copy of 2 GiB on the device reads and writes in a second."""
    source = torch.randint(0, 255, (2**31,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = alternate_on_gpu({"ours": lambda: target.copy_(source)})["ours"]
    assert isinstance(seconds, float)
    return 2 * source.numel() / seconds


def dense_rate() -> float:
    """FLOPs a second of a bfloat16 product of 8192 x 8192 random matrices on the device."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    seconds = alternate_on_gpu({"ours": lambda: a @ b})["ours"]
    assert isinstance(seconds, float)
    return 2 * 8192**3 / seconds


class Table:
    """Prints a line for each case as it is measured: its sizes, our milliseconds, and each peer's time over ours.

    A ratio above 1 is a peer that takes longer than we do. The first of `sides` is ours; those named in `bounds` are
    no peers but what nothing can be much faster than.
    """

    def __init__(self, title: str, sizes: Sequence[str], sides: Sequence[str], bounds: Sequence[str] = ()) -> None:
        self.title, self.sizes, self.sides, self.bounds = title, tuple(sizes), tuple(sides), bounds
        self.rows: list[dict[str, Any]] = []
        print(f"\n{title}")
        ours, *peers = self.sides
        print(self._line(sizes, [f"{ours} ms", *peers]))

    def add(self, case: Sequence[object], seconds: Mapping[str, Measured]) -> None:
        """One case: its sizes, in the order of the columns, and what `alternate` gave."""
        ours = seconds[self.sides[0]]
        ratios: dict[str, float | str] = {}
        for peer in self.sides[1:]:
            theirs = seconds[peer]
            if isinstance(theirs, str) or isinstance(ours, str):
                ratios[peer] = theirs if isinstance(theirs, str) else f"{theirs * 1e3:.3g} ms"
            else:
                ratios[peer] = theirs / ours
        self.rows.append({**dict(zip(self.sizes, case, strict=True)), "seconds": dict(seconds), "ratios": ratios})
        cells = [r if isinstance(r, str) else f"{r:.2f}x" for r in ratios.values()]
        print(self._line(case, [ours if isinstance(ours, str) else f"{ours * 1e3:.3f}", *cells]), flush=True)

    def summary(self) -> None:
        """Of each peer, the best of them and each bound: least, greatest and median ratio, how many are below 1."""
        peers = [side for side in self.sides[1:] if side not in self.bounds]
        found = {p: [r for row in self.rows if isinstance(r := row["ratios"][p], float)] for p in self.sides[1:]}
        if len(peers) > 1:
            each = [[r for p in peers if isinstance(r := row["ratios"][p], float)] for row in self.rows]
            found["best peer"] = [min(ratios) for ratios in each if ratios]
        for name, ratios in found.items():
            if ratios:
                print(
                    f"  {name}: {min(ratios):.2f}x to {max(ratios):.2f}x, median {statistics.median(ratios):.2f}x; "
                    f"below 1 in {sum(r < 1 for r in ratios)} of {len(ratios)} cases"
                )

    def _line(self, sizes: Sequence[object], cells: Sequence[str]) -> str:
        widths = [max(len(name), 9) for name in self.sizes]
        left = " ".join(f"{size!s:>{width}}" for size, width in zip(sizes, widths, strict=True))
        widths = [max(len(name) + 3, 10) for name in self.sides]
        return f"{left} |" + " ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def finish(name: str, tables: Sequence[Table], **more: Any) -> None:
    """Print what each table comes to and the hardware, and write `results/NAME.json`; `more`, such as the arguments,
    goes there too."""
    for table in tables:
        print(f"\n{table.title}")
        table.summary()
    print(f"\n{' | '.join(f'{key} {value}' for key, value in hardware().items())}")
    store(name, {"hardware": hardware(), "tables": {table.title: table.rows for table in tables}, **more})


def store(name: str, data: Any) -> None:
    """Write `results/NAME.json` and say where it is."""
    path = RESULTS / f"{name}.json"
    write_json(path, data)
    print(path)


def import_peer(package: str, version: str, module: str) -> ModuleType | str:
    """A module of a package that is kept apart from ours, in `.peers/PACKAGE`, and installed there when first asked
    for without its dependencies; or why there is none."""
    folder = PEERS / package
    if not folder.exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        done = subprocess.run([*install, f"{package}=={version}"], capture_output=True, text=True, check=False)
        if done.returncode:
            return f"{package} {version} cannot be installed: {done.stderr.strip().splitlines()[-1]}"
    sys.path.append(str(folder))
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever the peer raises, the other comparisons go on
        return f"{package} {version} cannot be imported: {error}"
