"""Questions on a device that is not the CPU, whatever machine the tests run on."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asking import answer_of

# Never imported: from then on all of this process would take that device for its accelerator.
SCRIPT = Path(__file__).with_name("second_device.py")
TEXT = ["--tokens", "1024"]
# `cost` measures memory in a process of its own, which knows nothing of such a device.
QUESTIONS = {
    "loss": TEXT,
    "suppress": [*TEXT, "--examples", "8"],
    "lens": TEXT,
    "gates": TEXT,
    "rows": TEXT,
    "routing": TEXT,
    "needle": ["--examples", "1", "--kinds", "single"],
    "probes": ["--examples", "8"],
}


def _numbers(value: Any) -> Iterator[float]:
    """All numbers of a JSON, in order."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _numbers(each)
    elif isinstance(value, int | float):
        yield value


def test_questions_give_the_same_on_another_device_and_leave_nothing_on_the_cpu(
    told_run: Path, experts_run: Path, tmp_path: Path
) -> None:
    asked = {name: [told_run, *more] for name, more in QUESTIONS.items()}
    asked["cka"] = [told_run, "--against", experts_run, *TEXT]
    there = tmp_path / "there"
    lines = [f"{name} --checkpoint {' '.join(map(str, more))} --output {there}" for name, more in asked.items()]
    done = subprocess.run([sys.executable, str(SCRIPT), *lines], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, (checkpoint, *more) in asked.items():
        expected = answer_of(name, tmp_path / "here", checkpoint, *more, "--device", "cpu")["result"]
        record = json.loads((there / f"{name}.json").read_text())
        assert record["options"]["device"] == "second"
        numbers, others = [*_numbers(expected)], [*_numbers(record["result"])]
        assert len(numbers) == len(others) > 20
        same = [
            other == pytest.approx(number, rel=1e-3, abs=1e-4) for number, other in zip(numbers, others, strict=True)
        ]
        # Kernels of the CPU are not used there: the last bit differs, and what is nearly a tie may fall otherwise.
        assert sum(same) > 0.98 * len(same), name
