"""Building the C++ kernels: kept between processes, and done without where they can't be built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engram.kernels import load_native

LAYER = """
import torch
from engram import Engram
from engram.config import MemoryConfig
torch.manual_seed(0)
layer = Engram(MemoryConfig(layers=(0,), rows=(31, 37), n_heads=2, row_width=4, d_model=8, vocab_size=60, branches=2))
out = layer(torch.randn(2, 5, 2, 8), torch.randint(0, 60, (2, 5)))
out.square().sum().backward()
print(torch._C._dispatch_has_kernel_for_dispatch_key("engram::fuse_memory", "CPU"), out.sum().item())
"""


Done = subprocess.CompletedProcess[str]


def run(cache: Path, compiler: str | None) -> Done:
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    environment |= {"CXX": compiler} if compiler else {}
    return subprocess.run([sys.executable, "-c", LAYER], env=environment, capture_output=True, text=True, check=True)


@pytest.fixture(scope="module")
def after_another() -> Done:
    """A process of a user whose kernels another process has compiled: this one, at the latest."""
    assert load_native()
    return run(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"), None)


def test_a_layer_works_the_same_without_a_compiler(tmp_path: Path, after_another: Done) -> None:
    without = run(tmp_path, "/nowhere/c++")
    native, value = after_another.stdout.split()
    native_without, value_without = without.stdout.split()
    assert "engram runs without its C++ kernels" in without.stderr
    assert (native, native_without) == ("True", "False")
    assert float(value) == pytest.approx(float(value_without), rel=1e-4)


def test_kernels_are_compiled_once(after_another: Done) -> None:
    assert "compiling" not in after_another.stderr


def test_a_broken_build_is_told(tmp_path: Path) -> None:
    fake = tmp_path / "c++"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && echo fake && exit 0\necho no such flag >&2\nexit 1\n')
    fake.chmod(0o755)
    broken = run(tmp_path / "cache", str(fake))
    assert "compiling" in broken.stderr
    assert "no such flag" in broken.stderr
    assert broken.stdout.split()[0] == "False"
    assert list((tmp_path / "cache").rglob("*.so")) == []
