"""Processes killed while they save, at random moments: the last good checkpoint is found, and is what was saved.

Every tensor of a saved state holds one number, that of the save: a mixture of two saves would show.
"""

from __future__ import annotations

import datetime
import errno
import os
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import FORKS
from small_model import MODEL, build, optimizer_of, train
from torch import Tensor, nn
from torch.optim import Optimizer

from engram.config import ConfigError
from engram.parallel.checkpoint import CheckpointWriter, checkpoint_folder, last_checkpoint, load, read_run
from engram.parallel.state import entries

CHANGES = {"memory": {**MODEL["memory"], "rows": [5000, 7000]}}  # so that writing takes a while


def trained(mesh: dict[str, Any] | None, rank: int = 0, n: int = 1) -> tuple[nn.Module, list[Optimizer]]:
    """A model after one step, so that its optimisers have states."""
    model = build(mesh, changes=CHANGES)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(1), rank, n)
    return model, list(optimizer.optimizers)


def values(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """The tensors that a checkpoint holds."""
    return {name: tensor for name, tensor in entries(model, optimizers).items() if tensor.dtype != torch.bool}


def save_on_and_on(
    rank: int, n: int, folder: Path, store: Path, asynchronous: bool, folders: int, told: Connection
) -> None:
    """Save states of successive numbers from that after the last saved one on, in `folders` folders in turn; tell each
    number whose checkpoint is done."""
    torch.set_num_threads(1)
    if n > 1:
        os.environ.update(LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
        wait = datetime.timedelta(seconds=30)
        torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=n, timeout=wait)
    model, optimizers = trained(None if n == 1 else {}, rank, n)
    writer = CheckpointWriter(asynchronous)
    last = last_checkpoint(folder)
    number = 0
    if last is not None:
        load(last, model, optimizers)
        number = read_run(last)["number"]
    if n > 1:
        torch.distributed.barrier()  # nobody saves before all have found the last
    told.send(number)
    while True:
        number += 1
        for tensor in values(model, optimizers).values():
            tensor.fill_(number % 100)  # which every type can hold
        place = number if folders == 0 else number % folders
        writer.save(checkpoint_folder(folder, place), model, optimizers, {"number": number})
        told.send(number - 1 if asynchronous else number)


def killed_after(saves: int, seconds: float, first: int, n: int, *args: Any) -> int:
    """Kill processes that save so long after so many saves, `first` a moment before the others; the number of the last
    checkpoint that they told of."""
    pipes, processes = [], []
    for rank in range(n):
        ours, theirs = FORKS.Pipe(duplex=False)
        process = FORKS.Process(target=save_on_and_on, args=(rank, n, *args, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        done = max(pipe.recv() for _ in range(saves + 1) for pipe in pipes)
        time.sleep(seconds)
        processes[first].kill()
        time.sleep(0.05 if n > 1 else 0.0)
    finally:
        for process in processes:
            process.kill()
            process.join()
    for pipe in pipes:
        while pipe.poll():
            try:
                done = max(done, pipe.recv())
            except EOFError:
                break
    return done


def assert_last_is_whole(folder: Path, model: nn.Module, optimizers: list[Optimizer], at_least: int) -> int:
    last = last_checkpoint(folder)
    assert last is not None
    for tensor in values(model, optimizers).values():
        tensor.fill_(-1)
    load(last, model, optimizers)
    number = read_run(last)["number"]
    assert number >= at_least
    for name, tensor in values(model, optimizers).items():
        assert (tensor == number % 100).all(), name
    return number


@pytest.mark.parametrize(
    ("tries", "n", "asynchronous", "folders"),
    [(6, 1, False, 0), (5, 1, True, 0), (3, 1, False, 1), (3, 2, False, 0), (3, 2, True, 0)],
    ids=["alone", "asynchronous", "the-same-folder-again", "two-processes", "two-asynchronous"],
)
def test_a_save_killed_at_any_moment_leaves_the_last_good_checkpoint(
    tmp_path: Path, tries: int, n: int, asynchronous: bool, folders: int
) -> None:
    """20 kills in all; each time the next process goes on in the same folder."""
    moments = random.Random(n * 100 + tries)
    folder = tmp_path / "checkpoints"
    model, optimizers = trained(None)
    began = time.perf_counter()
    CheckpointWriter().save(checkpoint_folder(tmp_path, 0), model, optimizers, {})
    each = time.perf_counter() - began
    number = 0
    for attempt in range(tries):
        settings = folder, tmp_path / f"store-{attempt}", asynchronous, folders
        # Every other time a checkpoint is done before the kill: an asynchronous one when the next save returns.
        saves = attempt % 2 * (1 + asynchronous)
        done = killed_after(saves, moments.uniform(0, 3 * each), attempt % n, n, *settings)
        assert done >= number
        if done or last_checkpoint(folder):  # the very first may not be done yet
            number = assert_last_is_whole(folder, model, optimizers, done)
    assert number > 0


def test_what_killed_saves_left_goes_with_the_next_save(tmp_path: Path) -> None:
    model, optimizers = trained(None)
    for name in (".step-00000003.draft", ".step-00000001.old", ".step-00000004.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("text")
    CheckpointWriter().save(checkpoint_folder(tmp_path, 5), model, optimizers, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


@pytest.mark.parametrize("moment", [".replaced", "00000001"])
def test_a_save_that_ends_in_replacing_a_checkpoint_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    model, optimizers = trained(None)
    save, rename = CheckpointWriter().save, Path.rename
    save(checkpoint_folder(tmp_path, 1), model, optimizers, {"number": 1})

    def failing(self: Path, target: Path) -> Path:
        if target.name.endswith(moment):
            raise OSError(errno.EIO, "gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ConfigError, match="cannot be written: gone"):
        save(checkpoint_folder(tmp_path, 1), model, optimizers, {"number": 2})
    monkeypatch.undo()
    last = last_checkpoint(tmp_path)
    assert last is not None
    assert read_run(last)["number"] == 1
    load(last, model, optimizers)
    save(checkpoint_folder(tmp_path, 1), model, optimizers, {"number": 3})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
