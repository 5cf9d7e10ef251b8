"""Worlds of processes for tests: started once, joined by gloo, each running what it is told with its rank.

A function that is run this way must be importable by name. What it returns comes back pickled; when it fails anywhere
the whole world is ended and its traceback is raised here.
"""

from __future__ import annotations

import datetime
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from forks import FORKS

_SECONDS = 120


class World:
    """`n` processes."""

    def __init__(self, n: int, store: Path) -> None:
        self.n = n
        self.runs = 0
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(n):
            ours, theirs = FORKS.Pipe()
            process = FORKS.Process(target=_serve, args=(rank, n, str(store), theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(rank, n, *args)` in every process at once; what each returned, by rank."""
        self.runs += 1
        for pipe in self._pipes:
            pipe.send((function, args))
        results: dict[int, Any] = {}
        while len(results) < self.n:
            ready = wait([p for r, p in enumerate(self._pipes) if r not in results], timeout=_SECONDS)
            if not ready:
                self.end()
                raise TimeoutError(f"ranks {sorted(set(range(self.n)) - results.keys())} gave no answer")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = self._pipes.index(pipe)
                fine, value = pipe.recv()
                if not fine:
                    self.end()
                    raise RuntimeError(f"rank {rank}:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(self.n)]

    @property
    def alive(self) -> bool:
        """Whether it can be used."""
        return all(process.is_alive() for process in self._processes)

    def end(self) -> None:
        """Kill all processes."""
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, n: int, store: str, pipe: Connection) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    timeout = datetime.timedelta(seconds=_SECONDS)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=n, timeout=timeout)
    while True:
        function, args = pipe.recv()
        torch.manual_seed(0)
        try:
            pipe.send((True, function(rank, n, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
