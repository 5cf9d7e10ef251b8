"""Questions shared out among processes get the answers that one process gives."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from small_model import MODEL, build
from world import World

from engram.training.probes import Answers, Question, ask


def questions() -> list[Question]:
    """13 of different lengths, with one or two answers."""
    random, found = Random(0), []
    for i in range(13):
        ids = [random.randrange(MODEL["vocab_size"]) for _ in range(4 + i)]
        found.append(Question(ids, [(2, 3), (3 + i, 4 + i)] if i % 2 else [(2 + i, 4 + i)]))
    return found


def asked(rank: int, n: int, mesh: dict[str, Any] | None, batch_size: int) -> Answers:
    model = build(mesh, torch.float64).eval()
    return ask(model, questions(), batch_size, rank=rank, n_ranks=n)


@pytest.mark.parametrize("batch_size", [1, 3, 8])  # of which the last leaves a process without questions, or nearly so
def test_two_processes_get_the_answers_of_one(world_of: Callable[[int], World], batch_size: int) -> None:
    alone = asked(0, 1, None, 4)
    assert alone.nats.std() > 0.1
    for mesh in ({}, {"expert": 2, "table": 2}):
        for found in world_of(2).run(asked, mesh, batch_size):
            np.testing.assert_allclose(found.nats, alone.nats, rtol=1e-9)
            assert found.right.tolist() == alone.right.tolist()
            assert found.question.tolist() == alone.question.tolist()
