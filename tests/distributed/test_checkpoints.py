"""A checkpoint saved on one mesh goes on on any other, optimiser included, and becomes one set of safetensors."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_model import MODEL, build, optimizer_of, train, whole_parameters
from torch import Tensor
from world import World

from engram.config import ConfigError
from engram.inference import offload
from engram.parallel import state
from engram.parallel.checkpoint import CheckpointWriter, checkpoint_folder, checkpoints_in, last_checkpoint, load
from engram.parallel.consolidate import INDEX, WEIGHTS, consolidate

WorldOf = Callable[[int], World]
Mesh = dict[str, Any]
BEFORE, AFTER = range(4), range(4, 8)
# 10 experts on 4 processes: FSDP2 cuts them unevenly. Tables have 206 and 238 rows.
UNEVEN = {"experts": {**MODEL["experts"], "n_experts": 10}}
ADAMW = {"matrix_optimizer": "adamw", "lr": 3e-4}
MUON = {"matrix_optimizer": "muon", "lr": 3e-4, "table_second_moment": "row"}


def first_half(
    rank: int, n: int, folder: Path, mesh: Mesh | None, optim: dict[str, Any], asynchronous: bool = False
) -> dict[str, Tensor]:
    """Train, and save; the parameters saved."""
    model = build(mesh, changes=UNEVEN)
    optimizer = optimizer_of(model, **optim)
    train(model, optimizer, BEFORE, rank, n)
    writer = CheckpointWriter(asynchronous)
    writer.save(checkpoint_folder(folder, len(BEFORE)), model, optimizer.optimizers, {"seen": len(BEFORE)})
    saved = {name: value.clone() for name, value in whole_parameters(model).items()}
    if asynchronous:  # what is being written must not be what is being trained
        train(model, optimizer, AFTER, rank, n)
    writer.wait()
    return saved


def second_half(rank: int, n: int, folder: Path, mesh: Mesh | None, optim: dict[str, Any]) -> list[float]:
    """Go on from the checkpoint; losses."""
    model = build(mesh, changes=UNEVEN)
    optimizer = optimizer_of(model, **optim)
    path = last_checkpoint(folder)
    assert path is not None
    load(path, model, optimizer.optimizers)
    return train(model, optimizer, AFTER, rank, n).loss


def uninterrupted(optim: dict[str, Any]) -> list[float]:
    model = build(changes=UNEVEN)
    optimizer = optimizer_of(model, **optim)
    train(model, optimizer, BEFORE)
    return train(model, optimizer, AFTER).loss


def run(world_of: WorldOf, n: int, function: Callable[..., Any], *args: Any) -> Any:
    """In one process here, or in a world: what rank 0 returned."""
    return function(0, 1, *args) if n == 1 else world_of(n).run(function, *args)[0]


SAVED = {
    "one": (1, None),
    "two": (2, {"expert": 2}),
    "four": (4, {"table": 4}),
    "four by groups": (4, {"replicate": 2, "expert": 2, "table": 2}),
}
LOADED = {**SAVED, "two copies": (2, {"replicate": 2, "table": 1}), "four sharded": (4, {"shard": 4, "table": 2})}


@pytest.mark.parametrize("saved", SAVED)
def test_training_goes_on_the_same_on_any_mesh(world_of: WorldOf, tmp_path: Path, saved: str) -> None:
    optim = MUON if saved == "two" else ADAMW
    n, mesh = SAVED[saved]
    run(world_of, n, first_half, tmp_path, mesh, optim)
    expected = uninterrupted(optim)
    for n, mesh in LOADED.values():
        assert run(world_of, n, second_half, tmp_path, mesh, optim) == pytest.approx(expected, abs=1e-5, rel=0)


@pytest.mark.parametrize(("n", "mesh"), [(1, None), (4, {"expert": 2, "table": 4})])
def test_a_save_that_goes_on_during_training_holds_the_step_it_was_called_at(
    world_of: WorldOf, tmp_path: Path, n: int, mesh: Mesh | None
) -> None:
    saved = run(world_of, n, first_half, tmp_path, mesh, ADAMW, True)
    model = build(changes=UNEVEN)
    load(tmp_path / "step-00000004", model)
    for name, value in model.named_parameters():
        assert torch.equal(value, saved[name]), name


@pytest.mark.parametrize("file_bytes", [2**30, 30_000])
def test_a_checkpoint_of_four_becomes_one_set_of_safetensors(
    world_of: WorldOf, tmp_path: Path, file_bytes: int
) -> None:
    saved = run(world_of, 4, first_half, tmp_path, {"expert": 2, "table": 4}, ADAMW)
    out = tmp_path / "model"
    out.mkdir()
    extra = {"token_lookup": torch.arange(7)}
    files = consolidate(tmp_path / "step-00000004", out, extra, file_bytes=file_bytes)
    tensors = {name: value for path in files for name, value in load_file(path).items()}
    if file_bytes < 2**30:
        index = json.loads((out / INDEX).read_text())
        assert len(files) > 3
        assert {name: index["weight_map"][name] for name in tensors} == {
            name: path.name for path in files for name in load_file(path)
        }
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        assert all(path.stat().st_size < file_bytes + 5000 for path in files if len(load_file(path)) > 1)
    else:
        assert [path.name for path in files] == [WEIGHTS]
    assert torch.equal(tensors.pop("token_lookup"), torch.arange(7))
    model = build(changes=UNEVEN)
    model.load_state_dict(tensors)  # every name, buffers too
    assert all(torch.equal(tensors[name], value) for name, value in saved.items())


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    first_half(0, 1, tmp_path, None, ADAMW)
    folder = tmp_path / "step-00000004"
    for changes in ({"d_model": 40}, {"n_layers": 3}, {"memory": None}):
        other = build(changes={**UNEVEN, **changes})
        optimizer = optimizer_of(other, **ADAMW)
        if changes == {"memory": None}:  # asks for less than there is: the model alone can be had
            load(folder, other)
            continue
        with pytest.raises(ConfigError, match=r"step-00000004' cannot be read: "):
            load(folder, other, optimizer.optimizers)


@pytest.mark.parametrize("lost", ["from-50", "from-"])  # ten rows, and all
def test_a_checkpoint_that_lacks_rows_of_a_table_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    folder, model = tmp_path / "step-00000004", build()
    monkeypatch.setattr(state, "_PIECE_BYTES", 10 * 4 * 4)  # ten rows
    CheckpointWriter().save(folder, model, [], {})
    load(folder, model)
    contents = pickle.loads((folder / ".metadata").read_bytes())
    saved = contents.state_dict_metadata
    names = [name for name in saved if name.startswith("model.memory.1.table.weight/") and lost in name]
    n_rows = sum(saved.pop(name).size[0] for name in names)
    (folder / ".metadata").write_bytes(pickle.dumps(contents))
    assert n_rows == (10 if lost == "from-50" else len(model.memory["1"].table.weight))
    with pytest.raises(ConfigError, match=r"cannot be read: it lacks .* of model\.memory\.1\.table\.weight"):
        load(folder, model)


def test_a_checkpoint_of_a_model_whose_tables_are_read_only_is_neither_saved_nor_loaded(tmp_path: Path) -> None:
    model, other = build(), build()
    writer, folder = CheckpointWriter(), tmp_path / "step-00000004"
    writer.save(folder, model, [], {"seen": 4})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for table in offload(other, "host").values():
        table.requires_grad_(False)
    for attempt in (lambda: writer.save(tmp_path / "step-00000008", other, [], {}), lambda: load(folder, other)):
        with pytest.raises(ConfigError, match=r"memory\.0\.table is 'HostTable': .* load.* save_model"):
            attempt()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_new_checkpoint_takes_the_place_of_the_old(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    writer = CheckpointWriter()
    for step in (3, 20, 100):
        writer.save(checkpoint_folder(tmp_path, step), model, [], {"step": step})
        assert [path.name for path in checkpoints_in(tmp_path)] == [f"step-{step:08d}"]
        assert [path.name for path in tmp_path.iterdir()] == [f"step-{step:08d}"]
