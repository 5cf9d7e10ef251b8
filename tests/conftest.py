"""Settings every test runs under: offline, one thread, no denormals, a fixed seed."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # else torch.compile starts processes that import torch first

import pytest
import torch

torch.set_num_threads(1)
torch.set_flush_denormal(True)  # without it the backward of a convolution on tiny values is 10x and more slower


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
