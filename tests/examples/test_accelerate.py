"""The examples with `accelerate`, run as a user runs them; models dispatched as they do it answer as loaded whole."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator, load_checkpoint_and_dispatch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch import Tensor

from engram import EngramLM, ModelConfig
from engram.training.optim import OptimConfig, build_optimizer
from engram.training.weights import load_model, save_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STEPS = 4
MODEL: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "n_layers": 2,
    "dense_width": 48,
    "attention": {"kind": "gqa", "n_heads": 4, "n_kv_heads": 2, "head_dim": 8},
    "experts": {"n_experts": 4, "top_k": 2, "width": 16, "shared_width": 16},
}
MEMORY: dict[str, Any] = {"layers": (1,), "n_heads": 2, "row_width": 8, "rows": (50, 50)}


def run(*command: str) -> str:
    """What a command prints, with Python's modules as programs."""
    env = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def train(folder: Path, n: int, script: Path = EXAMPLES / "accelerate_training.py") -> list[str]:
    """Train by the example in `n` processes; the lines that tell of its steps."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []
    printed = run(*launcher, str(script), f"--steps={STEPS}", f"--folder={folder}")
    return [line for line in printed.splitlines() if line.startswith("step")]


def in_float64(folder: Path) -> Path:
    """A script that is the example with another number type, in which sums in another order are the same.

    With an eps of 1e-8 Adam would turn the rounding of gradients of that size into steps 1e-9 apart, for some texts.
    """
    script = folder / "in_float64.py"
    script.write_text(f"""
import argparse, dataclasses, pathlib, sys
import torch
sys.path.insert(0, {str(EXAMPLES)!r})
import accelerate_training as example
model_of_config = example.EngramLM
example.EngramLM = lambda config: model_of_config(config).double()
example.OPTIM = dataclasses.replace(example.OPTIM, eps=1e-3)
torch.set_default_dtype(torch.float64)
parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int)
parser.add_argument("--folder", type=pathlib.Path)
example.main(**vars(parser.parse_args()))
""")
    return script


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("alone")
    return folder / "model", train(folder, 1)


@pytest.fixture
def inference(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import big_model_inference

    return big_model_inference


@pytest.fixture
def one_process() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def dispatched(inference: ModuleType, folder: Path, place: str) -> EngramLM:
    """With tables on the `cpu` or on `disk`; or with `all` of it on disk but one norm, as accelerate asks for some."""
    model = inference.empty_model(folder)
    on_disk = {name: "cpu" if name == "norm" else "disk" for name, _ in model.named_children()}
    places = on_disk if place == "all" else inference.device_map(model, place)
    load_checkpoint_and_dispatch(
        model, str(folder), places, offload_folder=str(folder / "offloaded"), preload_module_classes=["Block"]
    )
    return model.eval()


def saved(folder: Path, memory: dict[str, Any], branches: int = 1) -> Path:
    """A model with changes to its memory, and with a token compression, on disk."""
    config = ModelConfig.from_dict({**MODEL, "branches": branches, "memory": {**MEMORY, **memory}})
    lookup = torch.arange(config.vocab_size) // 2
    model = EngramLM(config, lookup)
    with torch.no_grad():  # much larger than rows start, so that every difference in them shows
        for name, parameter in model.named_parameters():
            if name.endswith("table.weight"):
                parameter.normal_()
    return save_model(model, folder, lookup)


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def test_a_users_own_loop_on_two_processes_trains_the_model_of_one(
    alone: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """In float32 by its losses, in float64 by its parameters too: in float32 Adam takes whole steps by the rounding of
    a gradient that is all but zero."""
    assert len(alone[1]) == STEPS
    losses = [[float(line.split()[2]) for line in lines] for lines in (train(tmp_path / "float32", 2), alone[1])]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)  # printed to four places
    script = in_float64(tmp_path)
    assert train(tmp_path / "two", 2, script) == train(tmp_path / "one", 1, script)
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("two", "one"))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() < 1e-12, name


def test_the_trained_model_goes_on_with_its_table_on_disk(alone: tuple[Path, list[str]], inference: ModuleType) -> None:
    script = str(EXAMPLES / "big_model_inference.py")
    printed = run(script, str(alone[0]), "--table=disk", "--text=The memory ", "-n=8")
    ids = inference.continued(load_model(alone[0]).eval(), list(b"The memory "), 8)
    assert printed == bytes(ids).decode(errors="replace") + "\n"


def test_a_prepared_optimizer_goes_on_from_its_state(one_process: Accelerator) -> None:
    """Moments of tables included; with a schedule that reaches every group."""
    ids = torch.randint(64, (3, 2, 12))
    model = EngramLM(ModelConfig.from_dict({**MODEL, "memory": {**MEMORY, "compress": False}}))
    copy = deepcopy(model)

    def prepared(model: EngramLM) -> Any:
        optimizer = build_optimizer(model, OptimConfig(matrix_optimizer="adamw"))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.5**step] * len(optimizer.param_groups))
        return one_process.prepare(model, optimizer, scheduler)

    def step(model: EngramLM, optimizer: Any, scheduler: Any, ids: Tensor) -> None:
        one_process.backward(model(ids).logsumexp(-1).mean())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    ours, optimizer, scheduler = prepared(model)
    step(ours, optimizer, scheduler, ids[0])
    resumed, its_optimizer, its_scheduler = prepared(copy)
    resumed.load_state_dict(ours.state_dict())
    its_scheduler.load_state_dict(scheduler.state_dict())
    its_optimizer.load_state_dict(optimizer.state_dict())
    for batch in ids[1:]:
        step(ours, optimizer, scheduler, batch)
        step(resumed, its_optimizer, its_scheduler, batch)
    assert len({group["lr"] for group in optimizer.param_groups}) == 2
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in its_optimizer.param_groups]
    for name, value in ours.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@pytest.mark.parametrize("place", ["cpu", "disk", "all"])
@pytest.mark.parametrize("kind", ["engram", "over_encoding", "additive_bigram"])
def test_a_dispatched_model_answers_as_one_loaded_whole(
    inference: ModuleType, tmp_path: Path, kind: str, place: str
) -> None:
    as_wide_as_the_model = {"orders": (2,), "rows": (50,), "row_width": 16} if kind == "additive_bigram" else {}
    folder = saved(tmp_path, {"kind": kind, **as_wide_as_the_model}, branches=2 if place == "all" else 1)
    ids = torch.randint(64, (2, 12))
    with torch.no_grad():
        assert torch.equal(dispatched(inference, folder, place)(ids), load_model(folder).eval()(ids))


def test_a_dispatched_memory_decodes_with_its_weights_on_disk(inference: ModuleType, tmp_path: Path) -> None:
    folder = saved(tmp_path, {})
    ids, hidden = torch.randint(64, (2, 12)), torch.randn(2, 12, 32)
    updates = []
    for model in (dispatched(inference, folder, "all"), load_model(folder)):
        layer: Any = model.memory["1"]
        first, state = layer.step(hidden[:, :7], ids[:, :7], layer.init_state(2))
        updates.append(torch.cat([first, layer.step(hidden[:, 7:], ids[:, 7:], state)[0]], 1))
    assert torch.equal(*updates)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel about memory")
def test_a_table_on_the_cpu_stays_in_its_file(inference: ModuleType, tmp_path: Path) -> None:
    folder = saved(tmp_path, {"rows": (200_000, 200_000), "row_width": 32})
    n_bytes = (folder / "model.safetensors").stat().st_size
    assert n_bytes > 100_000_000
    before = anonymous_bytes()
    model = dispatched(inference, folder, "cpu")
    with torch.no_grad():
        model(torch.randint(64, (8, 64)))
    assert anonymous_bytes() - before < n_bytes / 8
