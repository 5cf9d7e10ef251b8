"""Checkpoints that any number of processes can save and any other number load: `torch.distributed.checkpoint`.

A checkpoint is a folder: tensors in files of each process, a table of contents, and in `run.pt` all that is no tensor
of model or optimiser. It takes its name when everything in it is written; a save that is killed leaves one without.
"""

from __future__ import annotations

import math
import os
import queue
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.optim import Optimizer

from engram.config import ConfigError
from engram.parallel.contents import CONTENTS, SafeReader
from engram.parallel.state import Owned, Piece, entries, optimizer_state, parameters_of

CHECKPOINTS = "checkpoints"  # in a run's folder
_RUN, _SUFFIX, _REPLACED = "run.pt", ".distcp", ".replaced"
_FILE_BYTES = 2**29


def checkpoint_folder(parent: Path, step: int) -> Path:
    """Where the checkpoint of a step is saved."""
    return parent / f"step-{step:08d}"


def checkpoints_in(parent: Path) -> list[Path]:
    """The whole checkpoints in a folder, by step; one that a save was killed in replacing stands under another name."""
    found = [path for path in parent.glob("step-*") if is_checkpoint(path)]
    replaced = [
        path for path in parent.glob(f".step-*{_REPLACED}") if is_checkpoint(path) and not _named(path).exists()
    ]
    return sorted((*replaced, *found), key=lambda path: _named(path).name)


def last_checkpoint(parent: Path) -> Path | None:
    """The whole checkpoint of the latest step in a folder; None if there is none."""
    return next(reversed(checkpoints_in(parent)), None)


class CheckpointWriter:
    """Saves checkpoints one after the other. Every process makes one, and calls it when the others do.

    Args:
        asynchronous: copy what is to be saved and write it while training goes on.
    """

    def __init__(self, asynchronous: bool = False) -> None:
        self.asynchronous = asynchronous
        # The thread that writes talks to those of other processes, in a group of its own: training goes on meanwhile.
        self._group = dist.new_group(backend="gloo") if asynchronous and _is_spread() else None
        self._pending: tuple[Path, Future[Any]] | None = None

    def save(self, folder: Path, model: nn.Module, optimizers: Sequence[Optimizer], run: dict[str, Any]) -> None:
        """Save a model, its optimisers and what else there is to know of a run to `folder`, whole or not at all.

        When that is done all other checkpoints beside it are removed. What an asynchronous save could not
        do, the next call or `wait` tells.

        Raises `ConfigError` naming the folder when the disk refuses, and naming a table that is read-only.
        """
        self.wait()
        writer = _WholeFolderWriter(folder, {**run, "optimizers": _without_tensors(model, optimizers)})
        tensors = entries(model, optimizers)
        with _writing(folder):
            if not self.asynchronous:
                dcp.save(tensors, storage_writer=writer, no_dist=not _is_spread())
                return
            saving = dcp.async_save(tensors, storage_writer=writer, process_group=self._group, no_dist=not _is_spread())
        assert isinstance(saving, Future)
        self._pending = folder, saving

    def wait(self) -> None:
        """Wait for an asynchronous save. Raises `ConfigError` naming its folder if the disk refused."""
        if self._pending is not None:
            (folder, saving), self._pending = self._pending, None
            with _writing(folder):
                saving.result()


def read_run(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds that is no tensor of model or optimiser. Runs no code that the file might hold.

    Raises `ConfigError` naming the folder if it is no checkpoint.
    """
    with named_errors(folder, "read"):
        return dict(torch.load(folder / _RUN, map_location="cpu", weights_only=True))


def load(folder: Path, model: nn.Module, optimizers: Sequence[Optimizer] = ()) -> None:
    """Load a checkpoint into a model and its optimisers, in place; every process calls this.

    Raises `ConfigError` naming the folder if it can't be read, or is of another model, or if a table is read-only.
    """
    run = read_run(folder)
    with named_errors(folder, "read"):
        reader, saved = open_checkpoint(folder)
        _make_states(model, optimizers, run["optimizers"], saved)
        fill(entries(model, optimizers), saved, reader, no_dist=not _is_spread())


def open_checkpoint(folder: Path) -> tuple[SafeReader, dict[str, Any]]:
    """A reader, and what `torch.distributed.checkpoint` tells of each entry."""
    reader = SafeReader(folder)
    return reader, dict(reader.read_metadata().state_dict_metadata)


def fill(wanted: dict[str, Tensor], saved: dict[str, Any], reader: SafeReader, no_dist: bool = True) -> None:
    """Fill tensors from a checkpoint, by the names of its entries; pieces of tables may be other pieces there.

    Raises `ConfigError` if it lacks one, or a row of one.
    """
    missing = [name for name in wanted if Piece.parse(name) is None and name not in saved]
    if missing:
        raise ConfigError(f"it lacks {missing[0]}")
    here = {name: tensor for name, tensor in wanted.items() if name in saved}
    dcp.load(here, storage_reader=reader, no_dist=no_dist)
    _fill_other_rows({name: tensor for name, tensor in wanted.items() if name not in saved}, saved, reader)


def _make_states(
    model: nn.Module, optimizers: Sequence[Optimizer], kept: dict[str, Any], saved: dict[str, Any]
) -> None:
    """Give optimisers a checkpoint's settings of groups, and states of the shapes that it holds."""
    for optimizer, groups in zip(optimizers, kept["groups"], strict=True) if optimizers else ():
        for group, settings in zip(optimizer.param_groups, groups, strict=True):
            group.update(settings)
    shapes: dict[str, dict[str, TensorStorageMetadata]] = {}
    for entry, described in saved.items():
        piece = Piece.parse(entry)
        whole = piece.name if piece else entry
        if whole.startswith("optimizer."):
            name, _, key = whole.removeprefix("optimizer.").rpartition(".")
            shapes.setdefault(name, {})[key] = described
    optimizer_of = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    for name, owned in parameters_of(model).items():
        if owned.value in optimizer_of:
            states = {key: _state_like(owned, described) for key, described in shapes.get(name, {}).items()}
            states |= kept["numbers"].get(name, {})
            if states:
                optimizer_of[owned.value].state[owned.value] = states


def _state_like(owned: Owned, described: TensorStorageMetadata) -> Any:
    """An optimiser's state of a parameter: one number, one tensor like it, or so many numbers for each of its rows."""
    dtype = described.properties.dtype
    if not described.size:
        return torch.zeros((), dtype=dtype, device=owned.value.device)
    if owned.rows is not None:
        return owned.value.new_zeros(len(owned.value), described.size[1], dtype=dtype)
    return torch.zeros_like(owned.value, dtype=dtype)


def _fill_other_rows(wanted: dict[str, Tensor], saved: dict[str, Any], reader: FileSystemReader) -> None:
    """Fill pieces of tables that were saved in other pieces, by another number of processes.

    Raises `ConfigError` if rows are in none of these.
    """
    pieces = {name: piece for name in wanted if (piece := Piece.parse(name)) is not None}
    missing = {name: len(wanted[name]) for name in pieces}
    for entry, described in saved.items():
        there = Piece.parse(entry)
        if there is None:
            continue
        here = {
            name: piece
            for name, piece in pieces.items()
            if piece.name == there.name and (piece.first - there.first) % math.gcd(piece.stride, there.stride) == 0
        }
        if here:
            values = torch.empty(described.size, dtype=described.properties.dtype)
            dcp.load({entry: values}, storage_reader=reader, no_dist=True)
            rows = there.rows(len(values))
            for name, piece in here.items():
                past = rows - piece.first
                at = past.div(piece.stride, rounding_mode="floor") - piece.start
                mine = (past % piece.stride == 0) & (at >= 0) & (at < len(wanted[name]))
                wanted[name][at[mine]] = values[mine].to(wanted[name].device)
                missing[name] -= int(mine.sum())
    for name, count in missing.items():
        if count > 0:
            raise ConfigError(f"it lacks {count} rows of {pieces[name].name} from row {pieces[name].rows(1)[0]} on")


def _without_tensors(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """What optimisers keep that is no tensor: settings of groups, and numbers by parameter."""
    numbers = {
        name: {k: v for k, v in optimizer_state(p.value, optimizers).items() if not isinstance(v, Tensor)}
        for name, p in parameters_of(model).items()
    }
    groups = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in optimizers]
    return {"groups": groups, "numbers": {name: kept for name, kept in numbers.items() if kept}}


class _WholeFolderWriter(FileSystemWriter):
    """Writes to a folder beside the one asked for, which takes its name when all processes have written."""

    def __init__(self, folder: Path, run: dict[str, Any]) -> None:
        self._folder, self._run = folder, run
        super().__init__(_draft(folder))

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        if is_coordinator:  # nobody writes before this process has seen everybody's plan
            shutil.rmtree(_draft(self._folder), ignore_errors=True)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[Any]:
        """Write some items to each file: what is copied to be written is kept until a file is done."""
        files: queue.Queue[tuple[Path, str, list[WriteItem]]] = queue.Queue()
        for number, items in enumerate(_divided(plan.items)):
            name = f"{plan.storage_data.prefix}{number}{_SUFFIX}"
            files.put((_draft(self._folder) / name, name, items))
        return self._write_data(planner, files)

    def finish(self, metadata: Metadata, results: Any) -> None:
        """What one process does last."""
        super().finish(metadata, results)
        draft = _draft(self._folder)
        with (draft / _RUN).open("wb") as file:
            torch.save(self._run, file)
            file.flush()
            os.fsync(file.fileno())
        if self._folder.exists():  # of a run that trained these steps before
            shutil.rmtree(_replaced(self._folder), ignore_errors=True)
            self._folder.rename(_replaced(self._folder))
        draft.rename(self._folder)
        shutil.rmtree(_replaced(self._folder), ignore_errors=True)
        for path in checkpoints_in(self._folder.parent):
            if path != self._folder:
                remove_checkpoint(path)
        for leftover in self._folder.parent.glob(".step-*"):  # of this save, and of others that were killed
            shutil.rmtree(leftover, ignore_errors=True)


def _divided(items: Sequence[WriteItem]) -> Iterator[list[WriteItem]]:
    """Items in their order, as many together as one file may hold; at least one list."""
    together: list[WriteItem] = []
    size = 0
    for item in items:
        data = item.tensor_data
        assert data is not None
        n_bytes = math.prod(data.chunk.sizes) * data.properties.dtype.itemsize
        if together and size + n_bytes > _FILE_BYTES:
            yield together
            together, size = [], 0
        together.append(item)
        size += n_bytes
    yield together


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, which is none any more before it is no longer whole."""
    if folder.is_dir():
        old = _old(_named(folder))
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        shutil.rmtree(old, ignore_errors=True)


def _draft(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.draft")


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{_REPLACED}")


def _named(folder: Path) -> Path:
    """The name of a checkpoint that may stand as one that is replaced."""
    return folder.with_name(folder.name.removeprefix(".").removesuffix(_REPLACED))


def find_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint of a run's folder, or the folder itself if it is one; None if there is none."""
    checkpoint = last_checkpoint(folder / CHECKPOINTS) or folder
    return checkpoint if is_checkpoint(checkpoint) else None


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, and whole."""
    return all((folder / name).is_file() for name in (_RUN, CONTENTS))


def _is_spread() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Leave nothing that is half written, and name the folder."""
    with named_errors(folder, "written"):
        try:
            yield
        except (Exception, CheckpointException):  # which is no Exception
            # Not by others: while they fail, of waiting too long, this process may be giving the draft its name.
            if not _is_spread() or dist.get_rank() == 0:
                shutil.rmtree(_draft(folder), ignore_errors=True)
            raise


@contextmanager
def named_errors(folder: Path, done: str) -> Iterator[None]:
    """Turn whatever goes wrong into an error that names the checkpoint: its files may hold anything."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        raise ConfigError(f"checkpoint {str(folder)!r} cannot be {done}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """What the operating system said, if it was that, or whoever failed first."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(error).split())[:200] or type(error).__name__
