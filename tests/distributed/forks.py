"""Processes for tests, forked from one that has imported all that takes long: they start at once."""

import multiprocessing

FORKS = multiprocessing.get_context("forkserver")
# What a first optimiser and a first step of FSDP2 import is among it.
FORKS.set_forkserver_preload(
    ["engram.parallel.apply", "engram.parallel.checkpoint", "engram.training.optim", "torch._dynamo"]
)
