"""``cuda_nodes.cpp``: autograd nodes that launch what Triton has compiled, without Python.

An ``autograd.Function`` costs the host more than a whole ``nn.GroupNorm`` of PyTorch does, before
it computes anything, and at one or two images a step waits for the host. What is written here in
C++ serves the usual case on CUDA; where it cannot be built, Python's functions serve everything.
"""

import ctypes
import functools
import logging
from collections.abc import Callable
from types import ModuleType

import torch

from . import build

__all__ = ["answers", "nodes"]

_logger = logging.getLogger(__name__)
_answers: dict[str, Callable] = {}


def answers(function: Callable) -> Callable:
    """Decorator of what the nodes may ask of Python, by the name of the function."""
    _answers[function.__name__] = function
    return function


def _ask(what: str, *args):
    return _answers[what](*args)


def _launcher() -> int:
    return ctypes.cast(ctypes.CDLL("libcuda.so.1").cuLaunchKernel, ctypes.c_void_p).value


@functools.cache
def nodes() -> ModuleType | None:
    """The module of the nodes; None, with one warning, if it cannot be built.

    Its functions return None (``takes_bcn``: False) for what is not the usual case:
    ``takes_bcn(x, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_count)``, ``bcn`` of the
    same and ``(bn_eps, rate, eps, readable)``, ``ws(weight, formula, eps, dtype, readable)``.
    ``forget()`` forgets all launches.
    """
    if torch.version.hip is not None:
        return None
    try:
        module = build.load_module("cuda_nodes")
        module.start(_launcher() if torch.cuda.is_available() else 0, _ask)
    except (OSError, AttributeError) as error:
        _logger.warning(
            "no autograd nodes in C++, Python's serve instead: the same results, at three times "
            "the host time a layer: %s",
            error,
        )
        return None
    return module
