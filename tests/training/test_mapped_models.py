"""A model's tensors lie in its file, mapped: a large table is there at once, and training writes to none of it."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_run import MODEL, built, merge

from engram.backbone import EngramLM
from engram.config import ModelConfig
from engram.tensor_files import create, header_bytes, map_tensors, read_header
from engram.training.checksums import tensor_checksums, write_checksums
from engram.training.identity import origin_of
from engram.training.optim import OptimConfig, build_optimizer
from engram.training.weights import load_model, save_model

TABLE = "memory.1.table.weight"
WEIGHTS = "model.safetensors"


def losses(model: EngramLM, steps: int) -> list[float]:
    optimizer = build_optimizer(model.train(), OptimConfig(lr=1e-2))
    ids = torch.randint(0, 300, (steps, 2, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for batch in ids:
        loss = torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_a_loaded_model_is_trained_as_any_other_and_its_files_stay_as_they_are(tmp_path: Path) -> None:
    model = built()
    folder = save_model(model, tmp_path / "m")
    loaded = load_model(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    rows = loaded.memory["1"].table.weight.detach().clone()
    assert losses(loaded, 3) == losses(model, 3)
    assert not torch.equal(loaded.memory["1"].table.weight, rows)
    for own, other in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(own, other)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    save_model(loaded, folder)  # over the very file in which its table lies
    assert torch.equal(load_model(folder).memory["1"].table.weight, model.memory["1"].table.weight)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="space can't be reserved")
def test_a_file_that_is_written_through_a_map_has_its_space_from_the_start(tmp_path: Path) -> None:
    """Or the process would be killed, without a word, at the first page for which a full disk has no room."""
    path = tmp_path / WEIGHTS
    create(path, {"table": (torch.Size([1000, 1000]), torch.float32)}, {})
    assert path.stat().st_blocks * 512 >= 4_000_000


@pytest.fixture
def holes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large files that take no space."""
    monkeypatch.setattr(os, "posix_fallocate", lambda file, start, size: os.ftruncate(file, size), raising=False)


LARGE = merge(
    MODEL,
    {"memory.n_heads": 8, "memory.row_width": 80, "memory.rows": [3_920_000, 3_920_000], "memory.compress": False},
)
LOAD_AND_ASK = """
import sys, time
import torch
from engram.training.weights import load_model
def megabytes(kind):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1024
before, start = megabytes("RssAnon"), time.perf_counter()
model = load_model(sys.argv[1]).eval()
seconds = time.perf_counter() - start
with torch.no_grad():
    model(torch.arange(32)[None])
print(seconds, megabytes("RssAnon") - before, megabytes("VmHWM"))  # which unlike ru_maxrss begins with the program
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel about memory")
@pytest.mark.usefixtures("holes")
def test_a_table_of_20_gigabytes_is_there_within_seconds_and_takes_no_memory(tmp_path: Path) -> None:
    config = ModelConfig.from_dict(LARGE)
    with torch.device("meta"):
        state = EngramLM(config).state_dict()
    path = tmp_path / WEIGHTS
    tensors = create(path, {k: (v.shape, v.dtype) for k, v in state.items()}, {"engram": origin_of(config, None, None)})
    assert tensors[TABLE].nbytes > 20e9
    if path.stat().st_blocks * 512 > 1e9:
        pytest.skip("a file with holes takes as much of this disk as one without")
    with torch.no_grad():
        for name, value in (
            EngramLM(ModelConfig.from_dict(merge(LARGE, {"memory.rows": [97, 131]}))).state_dict().items()
        ):
            if name != TABLE:
                tensors[name].copy_(value)
    del tensors
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    write_checksums(tmp_path, [])
    saved = json.loads((tmp_path / "checksums.json").read_text())
    header = read_header(path)
    small = tensor_checksums(path, header, header.entries.keys() - {TABLE})
    saved["files"][WEIGHTS] = {"header": hashlib.sha256(header_bytes(path)).hexdigest(), "tensors": small}
    (tmp_path / "checksums.json").write_text(json.dumps(saved))
    done = subprocess.run([sys.executable, "-c", LOAD_AND_ASK, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, anonymous, peak = map(float, done.stdout.split())
    assert seconds < 5
    assert anonymous < 100
    assert peak < 1000


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel about memory")
@pytest.mark.usefixtures("holes")
def test_a_file_larger_than_memory_is_mapped_and_written_to_in_places(tmp_path: Path) -> None:
    """The kernel would refuse to reserve memory for all of it."""
    n_rows = int(1.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 256)
    path = tmp_path / "large.safetensors"
    create(path, {"table": (torch.Size([n_rows, 64]), torch.float32)}, {"format": "pt"})["table"][7] = 5
    if path.stat().st_blocks * 512 > 1e9:
        pytest.skip("a file with holes takes as much of this disk as one without")
    table = map_tensors(path, read_header(path))["table"]
    table[n_rows - 1] = 3
    assert table[[7, n_rows - 1, n_rows // 2]].sum(1).tolist() == [5 * 64, 3 * 64, 0]
    assert map_tensors(path, read_header(path))["table"][n_rows - 1].sum() == 0
