"""Memory tables go to disk and come back without a second copy in memory.

Run as a script, this file trains, trains on from the checkpoint, loads the trained model, and prints by how many bytes
anonymous memory grew meanwhile: pages of a mapped file that nobody writes to are no copies, the kernel may drop them.
"""

import gc
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_run import merge

STATUS = Path("/proc/self/status")
ROWS, WIDTH = 800_000, 64
TABLE = ROWS * WIDTH * 2  # bytes: 98 MiB in bfloat16
MOMENTS = 2 * ROWS * WIDTH * 4 + ROWS * 4  # two in float32, and the steps


def anonymous() -> int:
    """Bytes of anonymous memory in RAM."""
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("RssAnon")) * 1024


class Watch:
    """Watches anonymous memory from its making on."""

    def __init__(self) -> None:
        gc.collect()
        self.start = self.peak = anonymous()
        self.goes_on = True
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while self.goes_on:
            self.peak = max(self.peak, anonymous())
            time.sleep(0.002)

    def stop(self) -> int:
        """The peak."""
        self.goes_on = False
        self.thread.join()
        return max(self.peak, anonymous())


def growths(settings: str) -> dict[str, int]:
    """Growth of anonymous memory over each save; from the start of a resumed run to its first step, beyond table and
    moments; and over loading the trained model, beyond its weights without the table."""
    from engram.training import environment, recorder
    from engram.training.main import main
    from engram.training.module import LitEngramLM
    from engram.training.strategy import MeshStrategy
    from engram.training.weights import load_model

    environment.keep_freed_memory = lambda: None  # kept memory that is used again would hide copies
    grown = {}

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            watch = Watch()
            result = function(*args, **options)
            grown[name] = watch.stop() - watch.start
            return result

        return call

    def at_first_step(module: LitEngramLM) -> None:
        grown["resuming"] = watch.stop() - watch.start - TABLE - MOMENTS
        on_train_start(module)

    MeshStrategy.save_checkpoint = watched("saving a checkpoint", MeshStrategy.save_checkpoint)
    recorder.save_model = watched("saving a model", recorder.save_model)
    assert main(["fit", "--config", settings, "--save_weights", "false"]) == 0
    on_train_start, LitEngramLM.on_train_start = LitEngramLM.on_train_start, at_first_step
    watch = Watch()
    assert main(["fit", "--config", settings, "--trainer.max_steps", "3", "--ckpt_path", "last"]) == 0
    folder = Path(settings).parent
    # A file that stays mapped keeps its place on the disk, also when another has taken its name.
    grown["mapped files"] = Path("/proc/self/maps").read_text().count(f"{folder.name}/")
    watch = Watch()
    model = load_model(folder / "model")
    grown["loading a model"] = watch.stop() - watch.start - sum(p.nbytes for p in model.parameters()) + TABLE
    return grown


@pytest.mark.skipif(not STATUS.exists() or "RssAnon" not in STATUS.read_text(), reason="needs Linux's /proc")
def test_a_table_and_its_moments_stream_to_disk_and_back(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "watched"
    folder.mkdir()
    changes = {
        "model.model.memory.rows": [ROWS // 4, ROWS // 4],
        "model.model.memory.row_width": WIDTH,
        "model.model.memory.table_dtype": "bfloat16",
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 1,
        "trainer.limit_val_batches": 1,
        "trainer.default_root_dir": str(folder),
        "checkpoint_every": 2,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(merge(settings, changes)))
    try:
        command = [sys.executable, __file__, str(folder / "run.yaml")]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    finally:
        shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout.splitlines()[-1])
    assert grown.pop("mapped files") == 0
    assert len(grown) == 4
    assert {name: size for name, size in grown.items() if abs(size) > TABLE / 5} == {}


if __name__ == "__main__":
    print(json.dumps(growths(sys.argv[1])))
