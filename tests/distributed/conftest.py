"""Worlds of 2 and 4 processes, started when a test first asks for one."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from world import World

# That a world is good for: each leaves process groups behind, whose threads gloo never ends, and each of these looks
# for work a hundred times a second. For the same reason no world outlives the tests of a file.
RUNS = 8


@pytest.fixture(scope="module")
def world_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], World]]:
    worlds: dict[int, World] = {}

    def of(n: int) -> World:
        if n in worlds and worlds[n].runs >= RUNS:
            worlds.pop(n).end()
        if n not in worlds or not worlds[n].alive:
            store: Path = tmp_path_factory.mktemp("world") / "store"
            worlds[n] = World(n, store)
        return worlds[n]

    yield of
    for world in worlds.values():
        world.end()
