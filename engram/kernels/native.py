"""The C++ kernels for the CPU: compiled on first use for this machine, kept in the user's cache, then just loaded.

Compiling takes some ten seconds and needs a C++ compiler with OpenMP (`$CXX`, or c++), as Triton needs one on a GPU.
Without it a warning says so and the references do the same work in plain torch.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock

_SOURCES = Path(__file__).parent / "cpu"
_FLAGS = (
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-std=c++20",
    "-fopenmp",
    "-fPIC",
    "-Wall",
    "-Wno-unknown-pragmas",
)


_loaded: bool | None = None  # what came of it, once tried


def load_native() -> bool:
    """Load the C++ kernels, after compiling them if this machine has not yet; False, with a warning, if that fails.

    Only the first call in a process does anything, so that torch.compile, which comes later, reads a constant here.
    """
    global _loaded
    if _loaded is None:
        _loaded = _load()
    return _loaded


def _load() -> bool:
    try:
        torch.ops.load_library(str(_built()))
    except (OSError, subprocess.CalledProcessError) as error:
        why = (error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)).strip()
        warnings.warn(f"engram runs without its C++ kernels, which could not be built: {why[:2000]}", stacklevel=3)
        return False
    return True


def _built() -> Path:
    """The compiled library, from the cache or made now."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler found; set CXX")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "engram"
    path = cache / f"kernels-{_fingerprint(compiler)}.so"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):  # processes that start together wait for the first one's work
            if not path.exists():
                print("engram: compiling its CPU kernels, once for this machine ...", file=sys.stderr, flush=True)
                with tempfile.TemporaryDirectory(dir=cache) as folder:  # renamed when whole
                    _compile(compiler, Path(folder)).replace(path)
    return path


def _compile(compiler: str, folder: Path) -> Path:
    root = Path(torch.__file__).parent
    headers = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    start = [compiler, *_FLAGS, abi, *headers]
    torch_h = Path(shutil.copy(_SOURCES / "torch.h", folder))
    command = [*start, "-x", "c++-header", str(torch_h), "-o", f"{torch_h}.gch"]
    subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
    start += ["-include", str(torch_h)]  # the compiler takes what it compiled of it, lying beside it

    def compiled(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        subprocess.run([*start, "-c", str(source), "-o", str(target)], check=True, stderr=subprocess.PIPE, text=True)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # a compiler takes half a gigabyte
        objects = list(threads.map(compiled, sorted(_SOURCES.glob("*.cpp"))))
    target = folder / "kernels.so"
    libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    command = [compiler, "-shared", "-fopenmp", *objects, "-o", str(target), *libraries]
    subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
    return target


def _fingerprint(compiler: str) -> str:
    """Of all that decides the machine code: sources, flags, torch, compiler and processor."""
    parts = [path.read_text() for path in sorted(_SOURCES.iterdir()) if path.suffix in (".cpp", ".h")]
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    parts += [*_FLAGS, torch.__version__, compiler, version, _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Architecture and instruction sets, since the cache may lie in a home folder that unlike machines share."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()} {flags}"
