"""Building and loading ``cpu.cpp``.

The source includes no PyTorch header, so building takes a second or two; the result is kept
in the user's cache folder (``$XDG_CACHE_HOME`` or ``~/.cache``, under ``wsbcn_d2``) by source,
compiler, flags and processor.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

__all__ = ["load"]

_SOURCE = Path(__file__).with_name("cpu.cpp")
# Last, after those of $CXX: fast mathematics has no NaN, which the estimates must be kept from.
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"),
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
    if hasattr(os, "getuid") and (about.st_uid != os.getuid() or about.st_mode & 0o022):
        raise OSError(f"{folder} can be written by others, so code is not loaded from it")
    return folder


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _build(real: str) -> Path:
    """Path of the library for one type, compiled if the cache has none."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler:
        raise OSError("there is no C++ compiler (c++, g++ or $CXX)")
    command = [*compiler.split(), *_FLAGS, f"-DREAL={real}"]
    version = subprocess.run(
        [command[0], "--version"], capture_output=True, text=True, check=True
    ).stdout
    key = [_SOURCE.read_text("utf-8"), *command, version, platform.machine(), _processor()]
    digest = hashlib.sha256("\0".join(key).encode()).hexdigest()[:16]
    folder = _cache_folder()
    path = folder / f"kernels-{real}-{digest}.so"
    if not path.is_file():
        # Moved into place when complete: other processes build it at the same time.
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work) / path.name
            subprocess.run(
                [*command, str(_SOURCE), "-o", str(made)],
                capture_output=True, text=True, check=True, timeout=120,
            )  # fmt: skip
            made.replace(path)
    return path


def load(real: str) -> ctypes.CDLL:
    """The kernels for one type of C++.

    Raises:
        OSError: if they cannot be built or loaded, with the reason in one line.
    """
    try:
        library = ctypes.CDLL(str(_build(real)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # no home: RuntimeError
        reason = getattr(error, "stderr", None) or str(error)
        reason = next((line for line in reason.splitlines() if "error" in line), reason)
        raise OSError(reason.strip()) from error
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library
