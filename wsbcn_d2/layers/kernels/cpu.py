"""BCN and WS in C++ on a CPU: what :mod:`.dispatch` asks of a backend, on ``cpu.cpp``.

Calls take raw addresses and share PyTorch's pool of threads. Inputs of another layout or of half
precision are copied to contiguous float32 (float64) ones first, and results back.
"""

import ctypes
import logging
import threading

import torch
from torch import nn

from . import build

__all__ = [
    "TYPES",
    "bcn_backward",
    "bcn_constants",
    "bcn_forward",
    "failed",
    "load_kernels",
    "nodes",
    "takes_bcn",
    "takes_ws",
    "ws_backward",
    "ws_forward",
]

_logger = logging.getLogger(__name__)

#: Types of the parameters that are served, and their names in C++.
TYPES = {torch.float32: "float", torch.float64: "double"}
_HALF = (torch.float16, torch.bfloat16)
# In the order of the enumeration in the source.
_FORMULAS = ("biased", "unbiased", "unbiased_std")
# Below this, starting threads costs more than they save (as ATen's own grain size).
_GRAIN = 32768

_libraries: dict[torch.dtype, ctypes.CDLL | None] = {}
_loading = threading.Lock()


def load_kernels(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels for float32 or float64; None, with one warning, if they cannot be built."""
    if dtype in _libraries:
        return _libraries[dtype]
    with _loading:
        if dtype not in _libraries:
            try:
                _libraries[dtype] = build.load(TYPES[dtype])
            except OSError as error:
                if None not in _libraries.values():
                    _logger.warning(
                        "no C++ kernels, the readable forms serve instead: the same results, "
                        "BCN at about 5 times the time, WS at 3: %s",
                        error,
                    )
                _libraries[dtype] = None
    return _libraries[dtype]


def nodes() -> None:
    """See :mod:`.dispatch`: none, Python's functions serve."""


def failed(dtype: torch.dtype) -> bool:
    """Whether the kernels for a type have been asked for in vain."""
    return dtype in _libraries and _libraries[dtype] is None


def _fits(tensor: torch.Tensor | None, dtype: torch.dtype, numel: int) -> bool:
    """Whether an address is all that a kernel needs to know of a parameter or buffer."""
    return tensor is None or (
        tensor.dtype == dtype
        and tensor.numel() == numel
        and tensor.is_contiguous()
        and tensor.is_cpu
        and type(tensor) in (torch.Tensor, nn.Parameter)
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
    )


def takes_bcn(x, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_count) -> bool:
    """See :mod:`.dispatch`."""
    dtype, groups, channels = weight.dtype, weight.numel(), x.shape[1]
    return (
        dtype in TYPES
        and x.is_cpu
        and (x.dtype == dtype or x.dtype in _HALF)
        and channels % groups == 0
        and all(_fits(tensor, dtype, groups) for tensor in (weight, bias))
        and all(_fits(t, dtype, channels) for t in (bn_weight, bn_bias, bn_mean, bn_var))
        and _fits(bn_count, torch.int64, 1)
        and load_kernels(dtype) is not None
    )


def takes_ws(weight) -> bool:
    """See :mod:`.dispatch`."""
    dtype = torch.float32 if weight.dtype in _HALF else weight.dtype
    return dtype in TYPES and weight.is_cpu and load_kernels(dtype) is not None


def _layout(x: torch.Tensor) -> torch.memory_format:
    """That in which results for an input come."""
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _numbers(
    x: torch.Tensor, dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format
) -> torch.Tensor:
    """The same tensor with its numbers in memory as they are: no lazy sign, no lazy zeros."""
    if x._is_zerotensor():
        return torch.zeros(x.shape, dtype=dtype).contiguous(memory_format=layout)
    x = x.resolve_neg().to(dtype=dtype)
    if layout == torch.contiguous_format and _layout(x) == torch.channels_last:
        # PyTorch transposes matrices ten times as fast as it changes the layout.
        out = torch.empty_like(x, memory_format=layout)
        for sample, into in zip(x.permute(0, 2, 3, 1).flatten(1, 2), out.flatten(2), strict=True):
            into.copy_(sample.t())
        return out
    return x.contiguous(memory_format=layout)


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _threads(x: torch.Tensor) -> int:
    return torch.get_num_threads() if x.numel() >= _GRAIN else 1


def bcn_forward(
    x, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_count, bn_eps, rate, eps, dtype
):  # fmt: skip
    """See :mod:`.dispatch`."""
    wide = _numbers(x, weight.dtype)
    n, c, h, w = wide.shape
    groups = weight.numel()
    new = wide.new_empty
    rows = new(n, c), new(n, c), new(c), new(c), new(n, groups), new(n, groups)
    y = torch.empty_like(wide)
    load_kernels(weight.dtype).bcn_forward(
        n, c, groups, h * w, *map(_address, (wide, weight, bn_weight, bn_bias, *rows, y, bias)),
        *map(_address, (bn_mean, bn_var, None if rate is None else bn_count)),
        bn_eps, rate or 0.0, eps, _threads(wide),
    )  # fmt: skip
    return y.to(dtype=dtype or x.dtype, memory_format=_layout(x)), rows


def bcn_constants(saved):
    """See :mod:`.dispatch`."""
    return saved[2], saved[3]


def bcn_backward(dy, x, weight, bn_weight, bn_bias, saved, needs):
    """See :mod:`.dispatch`."""
    dy, wide = _numbers(dy, weight.dtype), _numbers(x, weight.dtype)
    n, c, h, w = wide.shape
    needs_x, needs_bn = needs
    dx = torch.empty_like(wide) if needs_x else None
    d_weight, d_bias = torch.empty_like(weight), torch.empty_like(weight)
    mean = saved[2]
    d_bn = (torch.empty_like(mean), torch.empty_like(mean)) if needs_bn else (None, None)
    load_kernels(weight.dtype).bcn_backward(
        n, c, weight.numel(), h * w,
        *map(_address, (wide, weight, bn_weight, bn_bias, *saved)),
        *map(_address, (dy, dx, d_weight, d_bias, *d_bn)), _threads(wide),
    )  # fmt: skip
    if needs_x:
        dx = dx.to(dtype=x.dtype, memory_format=_layout(x))
    return dx, d_weight, d_bias, *d_bn


def ws_forward(weight, formula, eps, dtype):
    """See :mod:`.dispatch`."""
    # A filter's elements count alike, so a channels_last weight is standardized as it lies.
    wide = torch.float32 if weight.dtype in _HALF else weight.dtype
    filters = _numbers(weight, wide, _layout(weight))
    rows = filters.shape[0]
    out, stats = torch.empty_like(filters), filters.new_empty(3, rows)
    load_kernels(wide).ws_forward(
        rows, filters.numel() // rows, *map(_address, (filters, out, stats)),
        _FORMULAS.index(formula), eps, _threads(filters),
    )  # fmt: skip
    return out.to(dtype or weight.dtype), (stats,)


def ws_backward(dy, weight, saved, formula, eps):
    """See :mod:`.dispatch`."""
    (stats,), layout = saved, _layout(weight)
    filters, dy = _numbers(weight, stats.dtype, layout), _numbers(dy, stats.dtype, layout)
    dw, rows = torch.empty_like(filters), filters.shape[0]
    load_kernels(stats.dtype).ws_backward(
        rows, filters.numel() // rows, *map(_address, (filters, dy, dw, stats)),
        _FORMULAS.index(formula), 4 * torch.finfo(stats.dtype).eps, _threads(filters),
    )  # fmt: skip
    return dw.to(weight.dtype)
