"""Training on a CUDA device: a run that goes on there, or is resumed there, has the losses it would have."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_run import Run

Train = Callable[..., Run]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ON_GPU = {"trainer__accelerator": "gpu", "trainer__devices": 1}


def losses(run: Run) -> list[float]:
    """Of the last four steps, in training and at their end in validation."""
    assert run.code == 0
    trained, validated = run.column("train/loss"), run.column("val/nats")
    return [trained[step] for step in sorted(trained)[-4:]] + [validated[max(validated)]]


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-3), ("bf16-mixed", 1e-2)])
@pytest.mark.parametrize("matrix_optimizer", ["adamw", "muon"])
def test_a_run_of_the_cpu_goes_on_alike_on_a_gpu(
    precision: str, tolerance: float, matrix_optimizer: str, train: Train
) -> None:
    """First values are drawn on the device, so that only a checkpoint begins alike on both."""
    same = {"trainer__precision": precision, "model__optim__matrix_optimizer": matrix_optimizer}
    on_cpu = train("cpu", **same)
    moved = train("gpu", on_cpu.folder / "step-4", **same, **ON_GPU)
    assert torch.cuda.get_device_name() in moved.result["device"]
    assert losses(moved) == pytest.approx(losses(on_cpu), rel=tolerance)


def test_a_run_that_is_resumed_on_a_gpu_goes_on_as_if_it_had_not_stopped(train: Train) -> None:
    whole = train("whole", **ON_GPU)
    resumed = train("resumed", whole.folder / "step-4", **ON_GPU)
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-4)
