"""Which kernels run a layer on its input: the one place that chooses.

A backend is a module; all of them compute the same as the readable forms of the layers.

``bcn_forward(x, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_count, bn_eps, rate, eps,
dtype) -> (y, saved)``. x is (N, C, H, W), weight and bias (G,), the others (C,); bn_weight and
bn_bias may be None. ``rate`` None leaves the estimates alone, else they move in place before they
are used. ``dtype`` is that of y, None for that of x. ``saved`` are the tensors to keep for
backward besides x and the parameters.

``bcn_backward(dy, x, weight, bn_weight, bn_bias, saved, needs) -> (dx, d_weight, d_bias,
d_bn_weight, d_bn_bias)`` with ``needs = (needs_x, needs_bn)``. ``bcn_constants(saved) -> (mean,
inverse)``, each (C,): the estimates that were used, the variance as 1 / sqrt(var + bn_eps).

``ws_forward(weight, formula, eps, dtype) -> (out, saved)`` and
``ws_backward(dy, weight, saved, formula, eps) -> d_weight``.

``nodes()`` is None or what does all of it, in C++, where it can (:mod:`.cuda_nodes`).

``takes_bcn(x, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_count) -> bool`` and
``takes_ws(weight) -> bool``: whether these tensors, which are plain ones, may be handed over.
"""

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType

import torch
from torch import nn
from torch.autograd import forward_ad

from . import cpu

__all__ = ["BACKENDS", "backend_name", "bcn_backend", "plain", "requested_backend", "ws_backend"]

_logger = logging.getLogger(__name__)

#: Values of ``WSBCN_FUSED`` in the environment. ``auto``: C++ kernels on a CPU, built at first
#: use, and Triton's on a GPU. ``cpp`` and ``triton``: these alone, where they take the tensors.
#: ``off``: the readable forms.
BACKENDS = ("auto", "cpp", "triton", "off")


def requested_backend() -> str:
    """The value of ``WSBCN_FUSED``, "auto" if unset.

    Raises:
        ValueError: if it is none of :data:`BACKENDS`.
    """
    backend = os.environ.get("WSBCN_FUSED") or "auto"
    if backend not in BACKENDS:
        raise ValueError(f"WSBCN_FUSED={backend!r}: use one of {', '.join(BACKENDS)}")
    return backend


def plain(x: torch.Tensor) -> bool:
    """Whether kernels may run: not in graphs that others make, nor on what is no plain tensor.

    A graph that somebody compiles, traces or exports gets the readable form: Inductor fuses it by
    itself, and an exported graph should hold operations that others know.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and type(x) in (torch.Tensor, nn.Parameter)
        and forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


@functools.cache
def _triton_works() -> bool:
    try:
        importlib.import_module("triton")
        trouble = importlib.import_module(".triton_launch", __package__).trouble()
    except ImportError as error:
        trouble = str(error)
    if trouble is not None:
        _logger.warning(
            "no Triton kernels, the readable forms serve instead: the same results by ten times "
            "as many launches: %s",
            trouble,
        )
    return trouble is None


@functools.cache
def _triton(kind: str) -> ModuleType | None:
    return importlib.import_module(f".triton_{kind}", __package__) if _triton_works() else None


def _backend(kind: str, x: torch.Tensor) -> ModuleType | None:
    if not plain(x) or not x.numel():
        return None
    wanted = requested_backend()
    if wanted == "off":
        return None
    if wanted == "triton" or (wanted == "auto" and x.is_cuda):
        return _triton(kind)
    return cpu if x.is_cpu else None


def bcn_backend(x: torch.Tensor, *tensors: torch.Tensor | None) -> ModuleType | None:
    """What serves a BCN, or None for the readable form.

    Args:
        x: the input, shape (N, C, H, W).
        *tensors: weight, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_count of the layer.
    """
    backend = _backend("bcn", x)
    return backend if backend is not None and backend.takes_bcn(x, *tensors) else None


def ws_backend(weight: torch.Tensor) -> ModuleType | None:
    """What standardizes a weight, or None for the readable form."""
    backend = _backend("ws", weight)
    return backend if backend is not None and backend.takes_ws(weight) else None


def backend_name(tensor: torch.Tensor) -> str:
    """What serves most inputs of a layer with such a parameter; builds and imports nothing."""
    wanted = requested_backend()
    if wanted == "auto":
        wanted = {"cpu": "cpp", "cuda": "triton"}.get(tensor.device.type, "off")
    if wanted == "triton":
        return wanted if importlib.util.find_spec("triton") else "off"
    fits = wanted == "cpp" and tensor.is_cpu and tensor.dtype in cpu.TYPES
    return wanted if fits and not cpu.failed(tensor.dtype) else "off"
