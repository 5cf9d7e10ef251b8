"""The C++ kernels for the CPU: compiled on first use for this machine, kept in the user's cache, then just loaded.

Compiling takes some ten seconds and needs a C++ compiler with OpenMP (`$CXX`, or c++), as Triton needs one on a GPU.
Without it a warning says so and the references do the same work in plain torch.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
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
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # RuntimeError: there is no home folder
        why = (error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)).strip()
        warnings.warn(f"engram runs without its C++ kernels, which could not be built: {why[:2000]}", stacklevel=3)
        return False
    return True


def _built() -> Path:
    """The compiled library, from the cache or made now."""
    compiler = shlex.split(os.environ.get("CXX", "")) or _compilers()[:1]
    if not compiler:
        raise FileNotFoundError("no C++ compiler found; set CXX")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "engram"
    name = f"kernels-{_fingerprint(compiler)}"
    path = _whole(cache, name)
    if path is None:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{name}.lock"):  # processes that start together wait for the first one's work
            path = _whole(cache, name)
            if path is None:
                print("engram: compiling its CPU kernels, once for this machine ...", file=sys.stderr, flush=True)
                with tempfile.TemporaryDirectory(dir=cache) as folder:  # renamed when whole
                    made = _compile(compiler, Path(folder))
                    path = made.replace(cache / f"{name}-{made.stat().st_size}.so")
    return path


def _compilers() -> list[str]:
    return [path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))]


def _whole(cache: Path, name: str) -> Path | None:
    """The library of this name in the cache, if it is as long as it says and was not cut short."""
    return next((path for path in cache.glob(f"{name}-*.so") if path.stem == f"{name}-{path.stat().st_size}"), None)


def _compile(compiler: list[str], folder: Path) -> Path:
    root = Path(torch.__file__).parent
    headers = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    start = [*compiler, *_FLAGS, abi, *headers]
    torch_h = Path(shutil.copy(_SOURCES / "torch.h", folder))
    command = [*start, "-x", "c++-header", str(torch_h), "-o", f"{torch_h}.gch"]
    _run(command)
    start += ["-include", str(torch_h)]  # the compiler takes what it compiled of it, lying beside it

    def compiled(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        _run([*start, "-c", str(source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # a compiler takes half a gigabyte
        objects = list(threads.map(compiled, sorted(_SOURCES.glob("*.cpp"))))
    target = folder / "kernels.so"
    libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    command = [*compiler, "-shared", "-fopenmp", *objects, "-o", str(target), *libraries]
    _run(command)
    return target


def _run(command: list[str]) -> str:
    """What a command prints. A compiler's words may be in any encoding."""
    return subprocess.run(command, check=True, capture_output=True, text=True, errors="replace").stdout


def _fingerprint(compiler: list[str]) -> str:
    """Of all that decides the machine code: sources, flags, torch, compiler and processor."""
    parts = [path.read_text() for path in sorted(_SOURCES.iterdir()) if path.suffix in (".cpp", ".h")]
    parts += [*_FLAGS, torch.__version__, *compiler, _run([*compiler, "--version"]), _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Architecture and instruction sets, since the cache may lie in a home folder that unlike machines share."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()} {flags}"
