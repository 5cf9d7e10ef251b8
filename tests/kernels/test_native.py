"""Building the C++ kernels: kept between processes, and done without where they can't be built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engram.kernels import load_native, native

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


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that wants the option -m64 and makes "library" of all, in a process that has loaded no kernels yet."""
    path = tmp_path / "some compiler"
    path.write_text("""#!/bin/sh
[ "$1" = -m64 ] || exit 1
[ "$2" = --version ] && echo fake && exit 0
while [ "$1" != -o ]; do shift; done
printf library > "$2"
""")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{path}' -m64")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "_loaded", None)
    return path


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The libraries that were loaded, of which none really is."""
    paths: list[Path] = []
    monkeypatch.setattr(torch.ops, "load_library", lambda path: paths.append(Path(path)))
    return paths


@pytest.mark.usefixtures("compiler")
def test_a_compiler_may_have_options(loaded: list[Path]) -> None:
    assert load_native()
    assert loaded[0].read_text() == "library"


@pytest.mark.usefixtures("compiler")
def test_a_library_that_was_cut_short_is_compiled_anew(
    loaded: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_native()
    for whole in (True, False):
        capsys.readouterr()
        if not whole:
            loaded[0].write_text("lib")
        monkeypatch.setattr(native, "_loaded", None)
        assert load_native()
        assert loaded[-1].read_text() == "library"
        assert ("compiling" in capsys.readouterr().err) is not whole


def test_without_a_home_folder_there_are_no_kernels(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container, under a user that it does not know."""
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)
    with pytest.warns(UserWarning, match="runs without its C.. kernels, .* home directory"):
        assert not load_native()


def test_a_compiler_may_speak_in_any_encoding(compiler: Path) -> None:
    compiler.write_bytes(b"#!/bin/sh\necho 'fichier non trouv\xe9' >&2\nexit 1\n")
    with pytest.warns(UserWarning, match="fichier non trouv\ufffd"):
        assert not load_native()


def test_a_broken_build_is_told(tmp_path: Path) -> None:
    fake = tmp_path / "c++"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && echo fake && exit 0\necho no such flag >&2\nexit 1\n')
    fake.chmod(0o755)
    broken = run(tmp_path / "cache", str(fake))
    assert "compiling" in broken.stderr
    assert "no such flag" in broken.stderr
    assert broken.stdout.split()[0] == "False"
    assert list((tmp_path / "cache").rglob("*.so")) == []
