"""BCN and WS in C++ for contiguous tensors on a CPU (``kernels.cpp``), built at first use.

The source includes no PyTorch header, so building takes a second or two; the result is kept
in the user's cache folder (``$XDG_CACHE_HOME`` or ``~/.cache``, under ``wsbcn_d2``) by source,
compiler, flags and processor. Calls take raw addresses and share PyTorch's pool of threads.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

__all__ = ["bcn_backward", "bcn_forward", "load_kernels", "takes", "ws_backward", "ws_forward"]

_logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
_TYPES = {torch.float32: "float", torch.float64: "double"}
# In the order of the enumeration in the source.
_FORMULAS = ("biased", "unbiased", "unbiased_std")
# Below this, starting threads costs more than they save (as ATen's own grain size).
_GRAIN = 32768

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


@functools.cache
def load_kernels(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels for float32 or float64; None, said once in the log, if they cannot be built."""
    try:
        library = ctypes.CDLL(str(_build(_TYPES[dtype])))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # no home: RuntimeError
        reason = getattr(error, "stderr", None) or str(error)
        reason = next((line for line in reason.splitlines() if "error" in line), reason)
        _logger.info("no C++ kernels, PyTorch's own norms serve instead: %s", reason.strip())
        return None
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def takes(x: torch.Tensor, by_channel: Iterable, by_group: Iterable, groups: int) -> bool:
    """Whether the addresses of these tensors may be handed over.

    Args:
        x: shape (N, C, H, W).
        by_channel: tensors, or None, that must have C elements.
        by_group: likewise with ``groups``.
    """

    def fits(tensor, numel):
        return tensor is None or (
            tensor.dtype == x.dtype
            and tensor.numel() == numel
            and tensor.is_contiguous()
            and tensor.is_cpu
        )

    channels = x.shape[1]
    return (
        x.is_cpu
        and x.is_contiguous()
        and channels % groups == 0
        and all(fits(tensor, channels) for tensor in by_channel)
        and all(fits(tensor, groups) for tensor in by_group)
    )


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _threads(x: torch.Tensor) -> int:
    return torch.get_num_threads() if x.numel() >= _GRAIN else 1


def bcn_forward(
    x, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_count, bn_eps, rate, eps
):  # fmt: skip
    """The forward pass of :mod:`.fused_bcn`: output and rows to keep."""
    n, c, h, w = x.shape
    groups = weight.numel()
    new = x.new_empty
    rows = new(n, c), new(n, c), new(c), new(c), new(n, groups), new(n, groups)
    y = torch.empty_like(x)
    load_kernels(x.dtype).bcn_forward(
        n, c, groups, h * w, *map(_address, (x, weight, bn_weight, bn_bias, *rows, y, bias)),
        *map(_address, (bn_mean, bn_var, bn_count)),
        bn_eps, rate or 0.0, eps, _threads(x),
    )  # fmt: skip
    if bn_count is not None and not bn_mean.is_inference():
        # Autograd has not seen the estimates move.
        for moved in (bn_mean, bn_var, bn_count):
            torch.autograd.graph.increment_version(moved)
    return y, *rows


def bcn_backward(dy, x, weight, bn_weight, bn_bias, m, v, mean, inverse, mu, r, needs):
    """The backward pass of :mod:`.fused_bcn`: gradients of x and of the four parameters."""
    n, c, h, w = x.shape
    needs_x, needs_bn = needs
    dx = torch.empty_like(x) if needs_x else None
    d_weight, d_bias = torch.empty_like(weight), torch.empty_like(weight)
    d_bn = (torch.empty_like(mean), torch.empty_like(mean)) if needs_bn else (None, None)
    saved = x, weight, bn_weight, bn_bias, m, v, mean, inverse, mu, r
    load_kernels(x.dtype).bcn_backward(
        n, c, weight.numel(), h * w,
        *map(_address, (*saved, dy, dx, d_weight, d_bias, *d_bn)), _threads(x),
    )  # fmt: skip
    return dx, d_weight, d_bias, *d_bn


def ws_forward(filters: torch.Tensor, formula: str, eps: float):
    """The forward pass of :mod:`.fused_ws`: standardized filters; their mean, variance, scale."""
    rows = filters.shape[0]
    out, stats = torch.empty_like(filters), filters.new_empty(3, rows)
    load_kernels(filters.dtype).ws_forward(
        rows, filters.numel() // rows, *map(_address, (filters, out, stats)),
        _FORMULAS.index(formula), eps, _threads(filters),
    )  # fmt: skip
    return out, stats


def ws_backward(dy, filters, stats, formula: str):
    """The backward pass of :mod:`.fused_ws`: the gradient of the filters."""
    dw, rows = torch.empty_like(filters), filters.shape[0]
    load_kernels(filters.dtype).ws_backward(
        rows, filters.numel() // rows, *map(_address, (filters, dy, dw, stats)),
        _FORMULAS.index(formula), 4 * torch.finfo(filters.dtype).eps, _threads(filters),
    )  # fmt: skip
    return dw
