"""Weight standardization (WS) of convolutions.

Paper: Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight
Standardization", arXiv 1903.10520v2, section 3. Official code:
https://github.com/joe-siyuan-qiao/WeightStandardization and
https://github.com/joe-siyuan-qiao/Batch-Channel-Normalization.

Deviations:
  * The released code spells one idea in three ways (see :data:`WS_FORMULAS`). They are not
    interchangeable: weights trained with one lose 5-14 % of their last-stage signal under another.
    The formula is therefore an explicit argument.
  * Statistics are float32 at least, also under autocast and for half-precision weights.
  * Convolutions are converted in place, and only those that carry a norm.
"""

import math
from typing import Final

import torch
from torch.nn import functional as F

from .kernels.autograd import fused_standardize
from .kernels.dispatch import plain, ws_backend
from .reparametrized_conv import Recipe, ReparametrizedConv2d, autocast_dtype

__all__ = ["WS_FORMULAS", "WSConv2d", "standardize_weight"]

#: Valid values of ``formula``: where epsilon stands and which variance is meant.
WS_FORMULAS = ("biased", "unbiased", "unbiased_std")


def standardize_weight(
    weight: torch.Tensor, *, formula: str = "unbiased", eps: float = 1e-5
) -> torch.Tensor:
    """Standardize every output filter of a convolution weight.

    With n = C_in/groups * kh * kw, and m, v the mean and biased variance of one filter w:

    ================  ==================================  =====================================
    formula           value                               used by
    ================  ==================================  =====================================
    ``biased``        (w - m) / sqrt(v + eps)             the paper's equation; timm
    ``unbiased``      (w - m) / sqrt(v n/(n-1) + eps)     the authors' ImageNet BCN+WS weights
    ``unbiased_std``  (w - m) / (sqrt(v n/(n-1)) + eps)   the authors' GN+WS weights; mmdetection
    ================  ==================================  =====================================

    Gradients flow through m and v and are finite for a constant filter.

    Args:
        weight: shape (C_out, C_in/groups, kh, kw), floating point.
        formula: one of :data:`WS_FORMULAS`.
        eps: stabilizer, as placed by the formula.

    Returns:
        Tensor of the shape and dtype of ``weight``; statistics of half-precision weights are
        computed in float32.

    Raises:
        ValueError: for an unknown formula, or filters of a single element.
    """
    _check_filters(weight, formula)
    if weight.shape[0] == 0:
        return weight
    return _standardize_as(weight, formula, eps, None)


def _standardize_as(
    weight: torch.Tensor, formula: str, eps: float, dtype: torch.dtype | None
) -> torch.Tensor:
    backend = ws_backend(weight)
    if backend is not None:
        return fused_standardize(backend, readable, weight, formula, eps, dtype)
    out = readable(weight, formula, eps)
    return out if dtype is None else out.to(dtype)


def readable(weight: torch.Tensor, formula: str, eps: float) -> torch.Tensor:
    """The readable form of :func:`standardize_weight`."""
    filters = weight.flatten(1)
    if weight.dtype in (torch.float16, torch.bfloat16):
        filters = filters.float()
    c_out, fan_in = filters.shape
    # Bessel's correction turns the biased variance v into v * correction.
    correction = fan_in / (fan_in - 1)
    if formula == "unbiased_std":
        centred = filters - filters.mean(dim=1, keepdim=True)
        norm = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
        out = centred / (norm / math.sqrt(fan_in - 1) + eps)
    else:
        # A group norm with one group per filter is one fused kernel.
        scale = 1.0
        if formula == "unbiased":
            eps, scale = eps / correction, math.sqrt(1 / correction)
        out = F.group_norm(filters.reshape(1, c_out, fan_in), c_out, eps=eps)[0] * scale
    return out.reshape(weight.shape).to(weight.dtype)


def _check_filters(weight: torch.Tensor, formula: str) -> None:
    """Validate the arguments of :func:`standardize_weight`."""
    if formula not in WS_FORMULAS:
        raise ValueError(
            f"unknown weight-standardization formula {formula!r}: use one of "
            + ", ".join(WS_FORMULAS)
        )
    if math.prod(weight.shape[1:]) < 2:
        raise ValueError(
            f"a convolution weight of shape {tuple(weight.shape)} has one element per filter: "
            "nothing to standardize; use a plain convolution here"
        )


class WSConv2d(ReparametrizedConv2d):
    """Detectron2's ``Conv2d`` (with ``norm`` and ``activation``) on standardized weights.

    Parameters and state-dict keys are those of the parent: the raw weight is stored, and
    standardized at each use (:mod:`.reparametrized_conv`).
    """

    ws_formula: Final[str]
    ws_eps: Final[float]

    def __init__(self, *args, ws_formula: str = "unbiased", ws_eps: float = 1e-5, **kwargs):
        """
        Args:
            *args, **kwargs: those of :class:`detectron2.layers.Conv2d`.
            ws_formula: one of :data:`WS_FORMULAS`.
            ws_eps: stabilizer of the standardization.

        Raises:
            ValueError: for an unknown formula, or one element per filter.
        """
        super().__init__(*args, **kwargs)
        self._check(self.weight, ws_formula)
        self._begin(ws_formula, ws_eps)

    @classmethod
    def _check(cls, weight: torch.Tensor, formula: str) -> None:
        _check_filters(weight, formula)

    def _begin(self, formula: str, eps: float) -> None:
        self.ws_formula = formula
        self.ws_eps = eps

    def used_weight(self) -> torch.Tensor:
        """The standardized weight, under autocast in the type in which it is read."""
        weight, formula, eps = self.weight, self.ws_formula, self.ws_eps
        if torch.jit.is_scripting():
            return readable(weight, formula, eps)
        else:  # TorchScript compiles what comes after a return
            return _standardize_as(weight, formula, eps, autocast_dtype(weight))

    def _in_one(self, x: torch.Tensor) -> torch.Tensor | None:
        weight = self.weight
        backend = ws_backend(weight) if plain(x) else None
        nodes = None if backend is None else backend.nodes()
        if nodes is None:
            return None
        return nodes.ws_conv(
            x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups,
            self.ws_formula, self.ws_eps, readable,
        )  # fmt: skip

    def recipe(self) -> Recipe:
        formula, eps = self.ws_formula, self.ws_eps
        return lambda weight: _standardize_as(weight, formula, eps, None), (self.weight,)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ws_formula={self.ws_formula}, ws_eps={self.ws_eps:g}"
