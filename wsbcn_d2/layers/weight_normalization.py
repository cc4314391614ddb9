"""The weight reparametrizations that the paper compares weight standardization (WS) with.

  * WN, weight normalization: w = g v / ||v||. Salimans and Kingma, arXiv 1602.07868.
  * CWN, centred weight normalization: w = g (v - m) / ||v - m||, m the mean of v. Huang et al.,
    "Centered Weight Normalization in Accelerating Training of Deep Neural Networks", ICCV 2017.

v is one output filter, and its length g is learned; WS has no such length, as the norm that
follows rescales anyway. Up to a constant, the biased formula of WS is CWN with g = sqrt(n).

Deviations:
  * ||v|| is sqrt(sum(v^2) + eps), so that gradients are finite for a zero (constant) filter.
  * g starts as the length that v has, also in CWN: the conversion of a convolution changes nothing
    (WN) or only centres its filters (CWN).
  * No bias is learned beside g: a norm follows every convolution here.
"""

import math
from typing import Final

import torch
from torch import nn

from .reparametrized_conv import Recipe, ReparametrizedConv2d
from .weight_standardization import WSConv2d

__all__ = ["WS_KINDS", "CWNConv2d", "WNConv2d", "convert_convs", "normalize_weight"]


def _filters(weight: torch.Tensor, centred: bool) -> torch.Tensor:
    """(C_out, n) float32 at least."""
    if weight.dtype in (torch.float16, torch.bfloat16):
        weight = weight.float()
    filters = weight.reshape(weight.shape[0], -1)
    return filters - filters.mean(dim=1, keepdim=True) if centred else filters


def _length(filters: torch.Tensor, eps: float) -> torch.Tensor:
    return (filters.square().sum(dim=1) + eps).sqrt()


def normalize_weight(
    weight: torch.Tensor, length: torch.Tensor, *, centred: bool = False, eps: float = 1e-5
) -> torch.Tensor:
    """Give every output filter of a convolution weight a length.

    Args:
        weight: v, shape (C_out, C_in/groups, kh, kw), floating point.
        length: g, shape (C_out,).
        centred: subtract each filter's mean first (CWN).
        eps: stabilizer, added to the squared length.

    Returns:
        Tensor of the shape and dtype of ``weight``; half precision is computed in float32.
    """
    return _normalize(weight, length, centred, eps)


# Apart, because TorchScript takes no keyword-only arguments with defaults.
def _normalize(
    weight: torch.Tensor, length: torch.Tensor, centred: bool, eps: float
) -> torch.Tensor:
    filters = _filters(weight, centred)
    out = filters * (length.to(filters.dtype) / _length(filters, eps)).unsqueeze(1)
    return out.reshape(weight.shape).to(weight.dtype)


class WNConv2d(ReparametrizedConv2d):
    """Detectron2's ``Conv2d`` (with ``norm`` and ``activation``) on normalized weights.

    Beside the parent's parameters (``weight`` is v) it has ``weight_g``, shape (C_out,), so that
    checkpoints of another kind lack a backbone parameter and are refused.
    """

    centred: Final[bool] = False
    ws_formula: Final[str] = "wn"  # what checkpoints record
    ws_eps: Final[float]

    def __init__(self, *args, ws_eps: float = 1e-5, **kwargs):
        """
        Args:
            *args, **kwargs: those of :class:`detectron2.layers.Conv2d`.
            ws_eps: stabilizer of the normalization.

        Raises:
            ValueError: in CWN, for one element per filter.
        """
        super().__init__(*args, **kwargs)
        self._check(self.weight)
        self._begin(self.ws_formula, ws_eps)

    @classmethod
    def _check(cls, weight: torch.Tensor, formula: str = "") -> None:
        if cls.centred and math.prod(weight.shape[1:]) < 2:
            raise ValueError(
                f"a convolution weight of shape {tuple(weight.shape)} has one element per "
                "filter: nothing to centre; use a plain convolution here"
            )

    @torch.no_grad()
    def _begin(self, formula: str, eps: float) -> None:
        weight = self.weight
        length = _length(_filters(weight, self.centred), eps).to(weight.dtype)
        self.ws_eps = eps
        # A stage that is frozen already stays frozen.
        self.weight_g = nn.Parameter(length, requires_grad=weight.requires_grad)

    def used_weight(self) -> torch.Tensor:
        """The normalized weight."""
        return _normalize(self.weight, self.weight_g, self.centred, self.ws_eps)

    def recipe(self) -> Recipe:
        centred, eps = self.centred, self.ws_eps
        return lambda v, g: _normalize(v, g, centred, eps), (self.weight, self.weight_g)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.ws_formula}, ws_eps={self.ws_eps:g}"


class CWNConv2d(WNConv2d):
    """:class:`WNConv2d` with centred filters."""

    centred: Final[bool] = True
    ws_formula: Final[str] = "cwn"


_CLASSES = {"ws": WSConv2d, "wn": WNConv2d, "cwn": CWNConv2d, "none": None}
#: Values of MODEL.WS.KIND.
WS_KINDS = tuple(_CLASSES)


def conv_class(kind: str) -> type[ReparametrizedConv2d] | None:
    """The convolution of a kind, None for "none".

    Raises:
        ValueError: for a kind that is not one of :data:`WS_KINDS`.
    """
    if kind not in _CLASSES:
        raise ValueError(f"unknown MODEL.WS.KIND {kind!r}: use one of {', '.join(WS_KINDS)}")
    return _CLASSES[kind]


def convert_convs(
    module: nn.Module, *, kind: str = "ws", formula: str = "unbiased", eps: float = 1e-5
) -> nn.Module:
    """Reparametrize, in place, every convolution of ``module`` that carries a norm.

    Args:
        module: any module; may itself be a convolution.
        kind: one of :data:`WS_KINDS`; "none" converts nothing.
        formula: of kind "ws", see :func:`wsbcn_d2.layers.standardize_weight`.
        eps: stabilizer.

    Returns:
        ``module``.

    Raises:
        ValueError: for an unknown kind, and as the kind's own conversion.
    """
    kind_of_conv = conv_class(kind)
    return kind_of_conv.convert(module, formula=formula, eps=eps) if kind_of_conv else module
