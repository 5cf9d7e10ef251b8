"""Checkpoints: a run that was stopped ends as one that never was, to the last bit."""

import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
import yaml
from small_run import Run
from torch import Tensor, nn
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, BytesStorageMetadata, MetadataIndex
from torch.serialization import _get_layout

from engram.config import ConfigError
from engram.memory import MemoryTable
from engram.parallel.checkpoint import CheckpointWriter, last_checkpoint, load, open_checkpoint, read_run
from engram.training.module import LitEngramLM
from engram.training.tokenizer import train_bpe

Train = Callable[..., Run]


def tensors(value: Any, where: str = "") -> dict[str, Tensor]:
    """All tensors and numbers of a checkpoint, by path."""
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, (list, tuple)):
        parts = dict(enumerate(value)).items()
    else:
        return {where: torch.as_tensor(value)} if isinstance(value, (Tensor, int, float)) else {}
    return {k: v for key, part in parts for k, v in tensors(part, f"{where}/{key}").items()}


def assert_same_state(one: Run, other: Run) -> None:
    """Weights, routers' biases, moments, schedules, random state and data position."""
    for key in ("tensors", "optimizers", "lr_schedulers", "random_state", "TokenData", "global_step"):
        a, b = tensors(one.checkpoint[key]), tensors(other.checkpoint[key])
        assert a.keys() == b.keys()
        assert a or key == "global_step"
        for name in a:
            assert torch.equal(a[name], b[name]), f"{key}{name}"


MIXED = {"trainer__precision": "bf16-mixed"}
BFLOAT16_BIGRAM = {
    "model__model__memory__kind": "additive_bigram",
    "model__model__memory__table_dtype": "bfloat16",
    "model__optim__table_beta1": 0.0,
}


@pytest.mark.parametrize(
    ("stop", "changes"),
    [
        (4, {}),
        (4, {"model__optim__matrix_optimizer": "muon", **MIXED}),
        (3, {"checkpoint_every": 3, "trainer__max_steps": 9, "trainer__val_check_interval": 9}),
        (2, {"trainer__accumulate_grad_batches": 2, "checkpoint_every": 2}),
        (6, {"model__model__memory__kind": "additive_bigram", "checkpoint_every": 2}),
        (4, {"model__model__memory__table_dtype": "bfloat16", "model__optim__table_second_moment": "row"}),
        (2, {**BFLOAT16_BIGRAM, **MIXED, "trainer__accumulate_grad_batches": 2, "checkpoint_every": 2}),
    ],
)
def test_a_resumed_run_ends_as_one_that_never_stopped(train: Train, stop: int, changes: dict[str, Any]) -> None:
    changes = {"trainer__precision": "32-true", **changes}
    if changes.get("model__model__memory__kind") == "additive_bigram":
        changes["model__model__memory__row_width"] = 8
    whole = train("whole", **changes)
    rest = train("rest", resume=whole.folder / f"step-{stop}", **changes)
    assert whole.code == rest.code == 0
    losses, later = whole.column("train/loss"), rest.column("train/loss")
    assert list(losses) == list(range(changes.get("trainer__max_steps", 8)))
    assert later == {step: loss for step, loss in losses.items() if step >= stop}
    assert_same_state(whole, rest)
    kept = ("history", "val", "tokens", "model", "optim", "data", "seed")
    assert {key: rest.result[key] for key in kept} == {key: whole.result[key] for key in kept}


def test_a_validation_that_falls_on_a_checkpoint_is_neither_lost_nor_doubled(train: Train) -> None:
    whole = train("whole")
    assert [entry["step"] for entry in whole.result["history"]] == [4, 8]
    for stop in (4, 8):
        rest = train(f"from-{stop}", resume=whole.folder / f"step-{stop}")
        assert rest.result["history"] == whole.result["history"]


def test_draws_after_a_resume_are_those_of_the_run_that_never_stopped(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[float] = []
    step = LitEngramLM.training_step

    def drawing_step(self: LitEngramLM, batch: Any, batch_idx: int) -> Tensor:
        drawn.append(torch.rand(()).item())
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LitEngramLM, "training_step", drawing_step)
    whole = train("whole")
    expected = drawn[4:]
    drawn.clear()
    train("rest", resume=whole.folder / "step-4")
    assert drawn == expected
    assert len(set(expected)) == 4


def test_a_killed_process_goes_on_where_its_checkpoint_was(train: Train, tmp_path: Path) -> None:
    """SIGKILL while it trains; resumed in the same folder, whose metrics.csv then has every step once."""
    changes = {"trainer__max_steps": 100, "trainer__val_check_interval": 25, "checkpoint_every": 10}
    whole = train("whole", **changes)
    killed = tmp_path / "killed"
    killed.mkdir()
    settings = yaml.safe_load((whole.folder / "run.yaml").read_text())
    settings["trainer"]["default_root_dir"] = str(killed)
    (killed / "run.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "engram.training.main", "fit", "--config", str(killed / "run.yaml")]
    with (killed / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=Path(__file__).parents[2])
    while last_checkpoint(killed / "checkpoints") is None and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, (killed / "log.txt").read_text()
    assert not (killed / "result.json").exists()
    last = last_checkpoint(killed / "checkpoints")
    assert last is not None
    stopped_at = read_run(last)["global_step"]
    assert 0 < stopped_at < 100
    rest = train("killed", resume=last, **changes)
    later = {step: loss for step, loss in whole.column("train/loss").items() if step >= stopped_at}
    assert {s: loss for s, loss in rest.column("train/loss").items() if s >= stopped_at} == later
    assert list(rest.column("train/loss")) == sorted(set(rest.column("train/loss")))
    assert rest.result["history"] == whole.result["history"]
    assert_same_state(whole, rest)


def ask_to_stop(module: LitEngramLM) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def run_out_of_time(module: LitEngramLM) -> None:
    module.trainer.should_stop = True  # as Lightning's timer does for `trainer.max_time`


@pytest.mark.parametrize(
    ("act", "batch", "stops", "changes"),
    [
        (ask_to_stop, 5, (6, 7), {}),
        (ask_to_stop, 3, (4, 5), {}),  # whose validation comes first
        (ask_to_stop, 5, (6, 7), {"checkpoint_async": True}),
        (ask_to_stop, 4, (3,), {"trainer__accumulate_grad_batches": 2}),
        (ask_to_stop, 5, (3, 4), {"trainer__accumulate_grad_batches": 2}),
        (run_out_of_time, 5, (6,), {}),
        (run_out_of_time, 5, (3,), {"trainer__accumulate_grad_batches": 2}),
    ],
)
def test_a_run_that_ends_early_saves_its_last_step_and_goes_on_as_if_it_had_not(
    train: Train,
    in_batch: Callable[[int, Callable[[LitEngramLM], None]], None],
    act: Callable[[LitEngramLM], None],
    batch: int,
    stops: tuple[int, ...],
    changes: dict[str, Any],
) -> None:
    whole = train("whole", **changes)
    in_batch(batch, act)
    stopped = train("stopped", **changes)
    assert stopped.code == 130
    # A signal may be taken by another thread of the process first, and be noticed a step later.
    at = stopped.checkpoint["global_step"]
    assert at in stops
    assert list(stopped.column("train/loss")) == list(range(at))
    rest = train("stopped", resume=last_checkpoint(stopped.folder / "checkpoints"), **changes)
    assert rest.code == 0
    assert rest.column("train/loss") == whole.column("train/loss")
    assert rest.result["history"] == whole.result["history"]
    assert_same_state(whole, rest)


def test_a_checkpoint_is_refused_by_a_run_with_another_tokenizer_model_optimiser_or_data(
    train: Train, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train("first").folder / "step-4"
    train_bpe(iter(["another text"]), 280).save(str(tmp_path / "tokenizer.json"))
    refusals = {
        "tokenizer is that of '.*tokenizer.json' .*: the model was trained with that of "
        "'BPE of 300 ids trained on files'": {"data__config__tokenizer": str(tmp_path / "tokenizer.json")},
        "the checkpoint holds another model: experts.top_k is 1, the checkpoint's is 2": {
            "model__model__experts__top_k": 1
        },
        "the checkpoint was trained differently: optim.lr is 0.0001, the checkpoint's is 0.003": {
            "model__optim__lr": 1e-4
        },
        "the checkpoint was trained differently: optim.matrix_optimizer is 'muon', the checkpoint's is 'adamw'": {
            "model__optim__matrix_optimizer": "muon"
        },
        "data seed is 9: allowed is that of the checkpoint, 0": {"data__config__seed": 9},
    }
    for i, (message, changes) in enumerate(refusals.items()):
        capsys.readouterr()
        changes = {"data__config__seed": 0, "data__config__tokenizer": "", **changes}
        assert train(f"other{i}", resume=first, **changes).code == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.match(f"error: {message}", said), said


@pytest.mark.parametrize("name", ["run.pt", ".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("damage", ["cut", "text", "junk", "gone"])
def test_a_checkpoint_that_cannot_be_read_is_named(
    train: Train, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train("whole").folder / "step-4"
    path = folder / name
    content = {
        "cut": path.read_bytes()[: path.stat().st_size // 3],
        "text": b"no checkpoint",
        "junk": b"\x80\x02U",  # a pickle that ends amid a number: struct.error
        "gone": None,
    }[damage]
    path.unlink() if content is None else path.write_bytes(content)
    capsys.readouterr()
    assert train("rest", resume=folder).code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert said[0].startswith(f"error: checkpoint {str(folder)!r} cannot be read: ")


def test_what_is_no_checkpoint_of_a_run_is_refused(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    torch.save({"weights": torch.zeros(3)}, foreign / "run.pt")
    for path, message in {
        foreign: f"checkpoint {str(foreign)!r} was not saved by this package's trainer",
        tmp_path
        / "gone": f"ckpt_path is {str(tmp_path / 'gone')!r}: allowed is the folder of a checkpoint, last, or auto",
    }.items():
        capsys.readouterr()
        assert train("rest", resume=path).code == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}"


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["run.pt", ".metadata"])
def test_a_checkpoint_cannot_run_code(tmp_path: Path, name: str) -> None:
    model = nn.Linear(2, 2)
    CheckpointWriter().save(tmp_path / "step-1", model, [], {})
    trap = Trap(tmp_path / "sprung")
    with (tmp_path / "step-1" / name).open("wb") as file:
        torch.save(trap, file) if name == "run.pt" else pickle.dump(trap, file)
    with pytest.raises(ConfigError, match="step-1' cannot be read"):
        load(tmp_path / "step-1", model)
    assert not (tmp_path / "sprung").exists()


METADATA, STORAGE_INFO = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def build(target: bytes, attribute: str, value: bytes, slots: bool) -> bytes:
    """A pickle's instructions that give the object of `target` an attribute, the second way by `setattr`."""
    state = b"}" + text(attribute) + value + b"s"
    return target + (b"N" + state + b"\x86" if slots else state) + b"b"


def test_a_table_of_contents_cannot_have_a_dataclass_run_the_names_of_its_fields(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    CheckpointWriter().save(tmp_path / "step-1", model, [], {})
    code = f"x=__import__('os').mkdir({str(tmp_path / 'sprung')!r}), *"
    field = named(METADATA, "field") + b")R"
    for setting in ("init", "repr", "compare"):
        field = build(field, setting, b"\x89", True)
    with_type = build(named(METADATA, "StorageMeta"), "__annotations__", b"}" + text(code) + text("int") + b"s", True)
    made = named(METADATA, "dataclass") + build(with_type, code, field, True) + b"\x85R"
    (tmp_path / "step-1" / ".metadata").write_bytes(b"\x80\x02" + made + b".")
    with pytest.raises(ConfigError, match="step-1' cannot be read"):
        load(tmp_path / "step-1", model)
    assert not (tmp_path / "sprung").exists()


def test_an_entry_that_is_no_tensor_is_not_unpickled(tmp_path: Path) -> None:
    folder, model = tmp_path / "step-1", nn.Linear(2, 2)
    CheckpointWriter().save(folder, model, [], {})
    torch.save(Trap(tmp_path / "sprung"), folder / "trap.distcp")
    contents = pickle.loads((folder / ".metadata").read_bytes())
    contents.state_dict_metadata["model.weight"] = BytesStorageMetadata()
    size = (folder / "trap.distcp").stat().st_size
    contents.storage_data[MetadataIndex("model.weight")] = _StorageInfo("trap.distcp", 0, size)
    (folder / ".metadata").write_bytes(pickle.dumps(contents))
    with pytest.raises(ConfigError, match="step-1' cannot be read"):
        load(folder, model)
    assert not (tmp_path / "sprung").exists()


SHARED = {
    (STORAGE_INFO, "_StorageInfo"): _StorageInfo,
    ("pathlib", "Path"): Path,
    ("pathlib", "PosixPath"): PosixPath,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,
} | {(METADATA, name): value for name, value in vars(metadata).items() if isinstance(value, type)}


@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize("called", [False, True])
def test_a_table_of_contents_changes_nothing_that_other_code_uses(tmp_path: Path, slots: bool, called: bool) -> None:
    model = nn.Linear(2, 2)
    CheckpointWriter().save(tmp_path / "step-1", model, [], {})
    members = list(_MEM_FORMAT_ENCODING)
    before = [dict(vars(value)) for value in (*SHARED.values(), *members)]
    for module, name in SHARED:
        target = named(module, name)
        if called:
            target += (b"K\x00" if name == "_MEM_FORMAT_ENCODING" else text("torch.strided")) + b"\x85R"
        for attribute in ("__setstate__", "exists", "_value_"):
            changed = build(target, attribute, named(METADATA, "Metadata"), slots)
            (tmp_path / "step-1" / ".metadata").write_bytes(b"\x80\x02" + changed + b".")
            with pytest.raises(ConfigError, match="step-1' cannot be read"):
                load(tmp_path / "step-1", model)
    assert [dict(vars(value)) for value in (*SHARED.values(), *members)] == before


@pytest.mark.parametrize("pathlib", [b"pathlib", b"pathlib._local"])  # before Python 3.13, and since
def test_a_table_of_contents_says_what_torch_wrote(tmp_path: Path, pathlib: bytes) -> None:
    model = nn.ModuleDict({"dense": nn.Linear(2, 3, dtype=torch.bfloat16), "table": MemoryTable(1000, 8)})
    CheckpointWriter().save(tmp_path / "step-1", model, [], {})
    path = tmp_path / "step-1" / ".metadata"
    written = pickle.loads(path.read_bytes())
    path.write_bytes(re.sub(rb"cpathlib[._a-z]*\n", b"c" + pathlib + b"\n", pickle.dumps(written, 2)))
    reader, saved = open_checkpoint(tmp_path / "step-1")
    assert reader.read_metadata().storage_data == written.storage_data
    assert saved.keys() == written.state_dict_metadata.keys()
    for name, entry in written.state_dict_metadata.items():
        assert (saved[name].size, saved[name].chunks) == (entry.size, entry.chunks)
        assert saved[name].properties.dtype == entry.properties.dtype


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_half_written(tmp_path: Path, asynchronous: bool) -> None:
    """The limit on file size is how a test can fill a disk: the write fails in its middle."""
    model, writer = nn.Linear(400, 100), CheckpointWriter(asynchronous)
    writer.save(tmp_path / "step-1", model, [], {})
    writer.wait()
    old = {path.name: path.read_bytes() for path in (tmp_path / "step-1").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"checkpoint '.*step-2' cannot be written: .*File too large"):
            (writer.save(tmp_path / "step-2", model, [], {}), writer.wait())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in (tmp_path / "step-1").iterdir()} == old
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_a_run_whose_disk_is_full_stops_with_one_line(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    train("warm")  # makes the token files
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        run = train("full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    folder = run.folder / "checkpoints" / "step-00000004"
    assert said[-1].startswith(f"error: checkpoint {str(folder)!r} cannot be written: ")
    assert said[-1].endswith("File too large")
    assert "Traceback" not in "\n".join(said)
    assert list((run.folder / "checkpoints").iterdir()) == []
    assert not (run.folder / "result.json").exists()
