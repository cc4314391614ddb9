"""Building and loading ``cpu.cpp`` and ``cuda_nodes.cpp``.

The first includes no PyTorch header, so building takes a second or two; the second, which a GPU
alone needs, takes half a minute. Results are kept in the user's cache folder (``$XDG_CACHE_HOME``
or ``~/.cache``, under ``wsbcn_d2``) by source, compiler, flags and processor.
"""

import contextlib
import ctypes
import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

__all__ = ["load", "load_module"]

_HERE = Path(__file__).parent
# Last, after those of $CXX: fast mathematics has no NaN, which the estimates must be kept from.
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp"),
    *("-fno-fast-math", "-fno-finite-math-only", "-fno-unsafe-math-optimizations"),
)

_ADDRESS, _SIZE, _REAL, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
_ARGUMENTS = {
    "bcn_forward": [_SIZE] * 4 + [_ADDRESS] * 15 + [_REAL] * 3 + [_INT],
    "bcn_backward": [_SIZE] * 4 + [_ADDRESS] * 16 + [_INT],
    "ws_forward": [_SIZE] * 2 + [_ADDRESS] * 3 + [_INT, _REAL, _INT],
    "ws_backward": [_SIZE] * 2 + [_ADDRESS] * 4 + [_INT, _REAL, _INT],
}


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "wsbcn_d2"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder.stat()
    if about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise OSError(f"{folder} can be written by others, so code is not loaded from it")
    return folder


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _build(
    source: Path, flags: tuple[str, ...], libraries: tuple[str, ...] = (), seconds: int = 120
) -> Path:
    """Path of what a source is compiled to, which is done if the cache has none."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler:
        raise OSError("there is no C++ compiler (c++, g++ or $CXX)")
    command = [*compiler.split(), "-fPIC", "-shared", *flags]
    version = subprocess.run(
        [command[0], "--version"], capture_output=True, text=True, check=True
    ).stdout
    sources = [source, *sorted(_HERE.glob("*.h"))]
    key = [path.read_text("utf-8") for path in sources]
    key += [*command, version, platform.machine(), _processor()]
    digest = hashlib.sha256("\0".join(key).encode()).hexdigest()[:16]
    folder = _cache_folder()
    path = folder / f"{source.stem}-{digest}.so"
    if not path.is_file():
        # Moved into place when complete: other processes build it at the same time.
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work) / path.name
            subprocess.run(
                [*command, str(source), "-o", str(made), *libraries],
                capture_output=True, text=True, check=True, timeout=seconds,
            )  # fmt: skip
            made.replace(path)
    return path


@contextlib.contextmanager
def _saying_why() -> Iterator[None]:
    """Whatever goes wrong within is an OSError of one line."""
    try:
        yield
    # No home: RuntimeError. A library that does not fit: ImportError.
    except (OSError, RuntimeError, ImportError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        reason = next((line for line in reason.splitlines() if "error" in line), reason)
        raise OSError(reason.strip()) from error


def load(real: str) -> ctypes.CDLL:
    """The kernels of ``cpu.cpp`` for one type of C++.

    Raises:
        OSError: if they cannot be built or loaded, with the reason in one line.
    """
    flags = *_FLAGS, f"-DREAL={real}"
    with _saying_why():
        library = ctypes.CDLL(str(_build(_HERE / "cpu.cpp", flags)))
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def load_module(name: str) -> ModuleType:
    """A Python module from a source of that name beside this file, which may use PyTorch.

    Raises:
        OSError: if it cannot be built or loaded, with the reason in one line.
    """
    home = Path(torch.__file__).parent
    headers = home / "include", home / "include/torch/csrc/api/include"
    flags = (
        *("-std=c++20", "-O2", f"-DTORCH_VERSION={torch.__version__}"),
        *(f"-I{folder}" for folder in (*headers, sysconfig.get_paths()["include"])),
    )
    # PyTorch has loaded its libraries already; their names are enough.
    libraries = f"-L{home / 'lib'}", "-ltorch_python", "-ltorch_cpu", "-lc10"
    with _saying_why():
        path = _build(_HERE / f"{name}.cpp", flags, libraries, seconds=600)
        loader = importlib.machinery.ExtensionFileLoader(name, str(path))
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
        loader.exec_module(module)
    return module
