"""Ways to keep a table, compared: the same batches served with each in turn, and rates against those without memory."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from typing import Any

import torch
from torch import nn

from engram import EngramLM
from engram.memory import HostTable, MemoryTable, OffloadedTable
from engram.training.environment import freeze_objects
from offloading.replay import ReplayedStep
from offloading.words import Batch


@dataclass
class Side:
    """A way to keep the table: what is put in its place, and what is done, untimed, before each batch."""

    table: MemoryTable | None
    before: Callable[[], None] = lambda: None

    @property
    def replays(self) -> bool:
        """Whether a step can be recorded: not if the host has a part in it."""
        table = self.table
        return not isinstance(table, OffloadedTable) or (isinstance(table, HostTable) and not table.cache_rows)


@dataclass
class Spent:
    """Tokens of prompts, those that followed, and seconds to take prompts in and to continue them."""

    n_prompt: int = 0
    n_new: int = 0
    prefill: float = 0.0
    decode: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def rates(self) -> dict[str, float]:
        """Tokens a second of each phase."""
        return {
            "prefill": self.n_prompt / self.prefill,
            "decode": self.n_new / self.decode,
            "total": (self.n_prompt + self.n_new) / (self.prefill + self.decode),
        }


@dataclass
class Result:
    """Of one side: tokens a second in each round, by phase, seconds of each batch, and what its table did in all."""

    rates: dict[str, list[float]]
    seconds: list[float]
    lookups: int = 0
    hit_rate: float = 0.0
    bytes_per_token: float = 0.0
    wait_share: float = 0.0  # of the time, spent waiting for rows

    def stored(self) -> dict[str, Any]:
        """For a file."""
        rest = asdict(self)
        return rest.pop("rates") | rest


def finished(device: torch.device) -> float:
    """The time when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def serve(model: EngramLM, batch: Batch, device: torch.device, capacity: int, replays: bool) -> Spent:
    """Take prompts in, and continue them, by a recorded step if it `replays`; recording it is not timed."""
    start = finished(device)
    state = model.init_state(len(batch.ids), capacity)
    model.logits(model.step(batch.ids, state, batch.mask).hidden[:, -1])
    prefill = finished(device) - start
    step = ReplayedStep(model, state) if replays else lambda ids: model.logits(model.step(ids, state).hidden[:, -1])
    start = finished(device)
    for ids in batch.following.split(1, dim=1):
        step(ids)
    return Spent(batch.n_prompt, batch.following.numel(), prefill, finished(device) - start)


def capacity_for(batch: Batch) -> int:
    """Room for a batch, in steps of 16, which is how kernels like their masks."""
    return -(-(batch.ids.shape[1] + batch.following.shape[1]) // 16) * 16


@contextmanager
def in_place(model: EngramLM, side: Side) -> Iterator[None]:
    """The model with a side's table, or without memory."""
    memories = model.memory
    (name,) = list(memories)
    if side.table is None:
        model.memory = nn.ModuleDict()
    else:
        memories.get_submodule(name).table = side.table
    try:
        yield
    finally:
        model.memory = memories


def served(model: EngramLM, side: Side, batch: Batch, device: torch.device, replays: bool) -> Spent:
    """What a batch takes with a side's table."""
    side.before()
    with in_place(model, side):
        return serve(model, batch, device, capacity_for(batch), replays)


def warm_up(model: EngramLM, sides: dict[str, Side], batches: list[Batch], device: torch.device, replays: bool) -> None:
    """Serve batches with each side, untimed: kernels are compiled, and caches that fill themselves begin to."""
    began = time.perf_counter()
    for side in sides.values():
        for batch in batches:
            served(model, side, batch.to(device), device, replays)
        if isinstance(side.table, OffloadedTable):
            side.table.reset_stats()
    print(f"warm: {finished(device) - began:.1f} s", flush=True)


def compare(
    title: str,
    model: EngramLM,
    sides: dict[str, Side],
    warming: list[Batch],
    rounds: list[list[Batch]],
    device: torch.device,
    replays: bool,
    save: Callable[[dict[str, Any]], None],
) -> None:
    """Serve each batch with each side in turn; `save` what is known after each, and print it after each round.

    `warming` is served before. `replays`: decode by recorded steps; sides that can't are left out, since a device that
    had less to do before a side's turn is faster in it.
    """
    sides = {name: side for name, side in sides.items() if side.replays or not replays}
    warm_up(model, sides, warming, device, replays)
    freeze_objects()
    _, with_memory, *_ = sides.values()
    turns, all_spent = in_turn(list(sides)), []
    seconds: dict[str, list[float]] = {name: [] for name in sides}  # of each batch
    for drawn in rounds:
        spent = {name: Spent() for name in sides}
        all_spent.append(spent)  # of each round
        for batch in drawn:
            here = batch.to(device)
            if device.type == "cuda":  # a shape that is met for the first time has kernels chosen for it
                served(model, with_memory, here, device, replays)
            for name in next(turns):
                once = served(model, sides[name], here, device, replays)
                spent[name] += once
                seconds[name].append(once.prefill + once.decode)
                rates = ", ".join(f"{phase} {rate:.0f}" for phase, rate in once.rates().items())
                print(f"  {name}: {rates} tokens/s", flush=True)
            results = {
                name: result_of(side.table, [spent[name] for spent in all_spent], seconds[name])
                for name, side in sides.items()
            }
            save({name: result.stored() for name, result in results.items()})
        show(title, results)


def in_turn(names: list[str]) -> Iterator[list[str]]:
    """Orders, there and back, in which all are as often first, second, ...: what came before may tell, as a device that
    is warm is slower."""
    for i in itertools.count():
        at = i % len(names)
        order = names[at:] + names[:at]
        yield from (order, order[::-1])


def result_of(table: MemoryTable | None, rounds: list[Spent], seconds: list[float]) -> Result:
    """What a side's rounds so far come to."""
    result = Result({phase: [spent.rates()[phase] for spent in rounds] for phase in rounds[0].rates()}, seconds)
    if isinstance(table, OffloadedTable):
        stats, whole = table.stats(), sum(rounds, Spent())
        result.lookups, result.hit_rate = stats.lookups, stats.hit_rate
        result.bytes_per_token = stats.bytes_moved / (whole.n_prompt + whole.n_new)
        result.wait_share = stats.wait_seconds / (whole.prefill + whole.decode)
    return result


def show(title: str, results: dict[str, Result]) -> None:
    """Medians over the rounds, of the rates and of their ratios to the first side's in the same round; and how much
    longer a batch took than with the first side, the mean over batches and its standard error."""
    base, *_ = (result.rates for result in results.values())
    first, *_ = (result.seconds for result in results.values())
    print(f"\n{title}: tokens/s, against no memory\n{'':30}" + "".join(f" {phase:>16}" for phase in base)
          + "   hits bytes/token waited  seconds of a batch")  # fmt: skip
    for name, result in results.items():
        cells = []
        for phase, others in base.items():
            rates = result.rates[phase]
            against = statistics.median(rate / other for rate, other in zip(rates, others, strict=True))
            cells.append(f"{statistics.median(rates):8.0f} {against - 1:+7.2%}")
        print(f"{name:30} {' '.join(cells)}  {result.hit_rate:5.1%} {result.bytes_per_token:11.0f} "
              f"{result.wait_share:6.1%}  {mean_of([a / b - 1 for a, b in zip(result.seconds, first, strict=True)])}",
              flush=True)  # fmt: skip


def mean_of(shares: list[float]) -> str:
    """The mean and its standard error, if there are two or more."""
    spread = f" +- {statistics.stdev(shares) / len(shares) ** 0.5:.2%}" if len(shares) > 1 else ""
    return f"{statistics.mean(shares):+.2%}{spread}"
