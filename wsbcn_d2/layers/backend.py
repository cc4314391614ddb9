"""Which code runs a layer: fused or readable. Both compute the same."""

import functools
import os

import torch
from torch import nn
from torch.autograd import forward_ad

from .kernels import load_kernels

__all__ = ["BACKENDS", "backend_for", "requested_backend", "supports"]

#: Values of ``WSBCN_FUSED`` in the environment. ``cpp``: C++ kernels on a CPU, built at first use.
#: ``native``: PyTorch's own norm kernels, nothing compiled. ``compile``: BCN by kernels that
#: ``torch.compile`` makes at first use. ``off``: the readable forms. ``auto``: ``compile`` on CUDA
#: where Triton is installed, ``cpp`` on a CPU where there is a compiler, else ``native``.
BACKENDS = ("auto", "cpp", "native", "compile", "off")


def requested_backend() -> str:
    """The value of ``WSBCN_FUSED``, "auto" if unset.

    Raises:
        ValueError: if it is none of :data:`BACKENDS`.
    """
    backend = os.environ.get("WSBCN_FUSED") or "auto"
    if backend not in BACKENDS:
        raise ValueError(f"WSBCN_FUSED={backend!r}: use one of {', '.join(BACKENDS)}")
    return backend


@functools.lru_cache(maxsize=1)
def _has_triton() -> bool:
    from torch.utils._triton import has_triton

    return has_triton()


def backend_for(device: torch.device, dtype: torch.dtype) -> str:
    """What serves an input on ``device`` with parameters of type ``dtype``.

    Returns:
        "cpp", "native", "compile" or "off".
    """
    backend = requested_backend()
    if backend == "auto" and device.type == "cuda" and _has_triton():
        return "compile"
    if backend in ("auto", "cpp"):
        buildable = device.type == "cpu" and dtype in (torch.float32, torch.float64)
        return "cpp" if buildable and load_kernels(dtype) else "native"
    return backend


def supports(x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the fused forms take this input, with parameters of type ``dtype``.

    They do not under function transforms and forward-mode differentiation, for tensor
    subclasses, and for devices and types on which they have not been tried.
    """
    return (
        type(x) in (torch.Tensor, nn.Parameter)
        and x.device.type in ("cpu", "cuda")
        and dtype in (torch.float32, torch.float64)
        and (x.dtype == dtype or x.dtype in (torch.float16, torch.bfloat16))
        and forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )
