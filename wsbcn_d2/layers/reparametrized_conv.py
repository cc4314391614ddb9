"""Convolutions by a function of their parameters: where its value is kept, shared, or made again.

On a CPU it is made again in backward (:mod:`.recomputed_conv`), on a GPU it is kept. Where one
convolution runs several times in a forward (:func:`standardize_once`), its weight is made once, and
kept.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from detectron2.layers import Conv2d, DeformConv, ModulatedDeformConv
from torch import nn
from torch.nn import functional as F

from .recomputation import packing
from .recomputed_conv import recomputed_conv2d, recomputes

__all__ = [
    "Recipe",
    "ReparametrizedConv2d",
    "autocast_dtype",
    "normalized_convs",
    "standardize_once",
]


#: A function and the parameters, ``weight`` first, of which it makes the used weight.
Recipe = tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]


def normalized_convs(module: nn.Module) -> list[Conv2d]:
    """The convolutions of a module whose type is exactly Detectron2's and that carry a norm.

    Args:
        module: any module; may itself be a convolution.

    Returns:
        In the order of ``named_modules``.

    Raises:
        ValueError: for a deformable convolution that carries a norm.
    """
    convs = []
    for name, child in module.named_modules():
        if getattr(child, "norm", None) is None:
            continue
        if isinstance(child, (DeformConv, ModulatedDeformConv)):
            raise ValueError(
                f"cannot standardize the deformable convolution {name!r}: set "
                "MODEL.RESNETS.DEFORM_ON_PER_STAGE to False for every stage, or use the "
                "stock backbone"
            )
        if type(child) is Conv2d:
            convs.append(child)
    return convs


class ReparametrizedConv2d(Conv2d):
    """Detectron2's ``Conv2d`` (with ``norm`` and ``activation``) on a function of its parameters.

    Subclasses say which: :meth:`used_weight` and, for those that are not scripted, :meth:`recipe`;
    what weights they take, :meth:`_check`, and what they keep beside them, :meth:`_begin`.
    """

    @classmethod
    def convert(
        cls, module: nn.Module, *, formula: str = "unbiased", eps: float = 1e-5
    ) -> nn.Module:
        """Reparametrize, in place, every convolution of ``module`` that carries a norm.

        Replaced are the modules whose type is exactly :class:`detectron2.layers.Conv2d` and
        whose ``norm`` is not None. Convolutions without a norm (RPN, predictors, the mask
        deconvolution) stay plain, as the paper prescribes. Identity, parameters, buffers, hooks
        and aliases are kept (the class of the object changes, not the object): Detectron2's FPN
        runs its convolutions from plain lists that a replacing conversion would miss.

        Args:
            module: any module; may itself be a convolution.
            formula: of :class:`WSConv2d` alone, one of :data:`WS_FORMULAS`.
            eps: stabilizer of the reparametrization.

        Returns:
            ``module``.

        Raises:
            ValueError: for an unknown formula, one element per filter (but in WN), or a deformable
                convolution that carries a norm; then nothing has been converted.
        """
        cls.adopt(normalized_convs(module), formula, eps)
        return module

    @classmethod
    def adopt(cls, convs: list[Conv2d], formula: str, eps: float) -> None:
        """What :meth:`convert` does, to these convolutions: to all, or after an error none."""
        for conv in convs:
            cls._check(conv.weight, formula)
        for conv in convs:
            conv.__class__ = cls
            conv._begin(formula, eps)

    def used_weight(self) -> torch.Tensor:
        """The weight of the convolution, shape (C_out, C_in/groups, kh, kw)."""
        raise NotImplementedError

    def recipe(self) -> Recipe:
        """How the weight is made, in the type of the parameters, under autocast too."""
        raise NotImplementedError

    def _in_one(self, x: torch.Tensor) -> torch.Tensor | None:
        """The convolution and its weight as one node of autograd, where there is such a node."""
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: shape (N, C_in, H, W); N, H or W may be 0.

        Returns:
            Tensor of shape (N, C_out, H', W').
        """
        if torch.jit.is_scripting():
            x = F.conv2d(
                x,
                self.used_weight(),
                self.bias,
                self.stride,
                self.padding,
                self.dilation,
                self.groups,
            )
        else:
            x = self._convolve(x)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x

    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        # Same contract as the parent, which stops here with an assertion.
        assert not (self.training and x.numel() == 0 and isinstance(self.norm, nn.SyncBatchNorm)), (
            "SyncBatchNorm does not support empty inputs!"
        )
        weight = _shared_weight(self)
        if weight is None:
            if recomputes(self, x):
                weight_of, parameters = self.recipe()
                return recomputed_conv2d(self, x, weight_of, *parameters)
            y = self._in_one(x)
            if y is not None:
                return y
            weight = self.used_weight()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def __setattr__(self, name, value):
        # Such functions scale the raw weight, which standardization then undoes. They cannot be
        # told from a user who sets a new weight but by who calls.
        if name in ("weight", "bias") and "fuse_conv" in sys._getframe(1).f_code.co_name:
            raise ValueError(
                f"a {type(self).__name__} cannot take a norm into its weight, which is "
                "reparametrized at each use: fuse a copy of the model made by wsbcn_d2.fold"
            )
        super().__setattr__(name, value)


# What standardize_once shares, in each thread for itself: weights by their convolutions' ids, and
# the mode that they were made in.
_scope: ContextVar[tuple[dict[int, torch.Tensor | None], tuple] | None] = ContextVar(
    "standardize_once", default=None
)


def _mode() -> tuple:
    """On what a weight depends beside its parameters: who records, and in which precision.

    Within a forward these change where activation checkpointing begins. What runs there is run
    again alone, and so must make its own weights the first time.
    """
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        packing(),
    )


@contextlib.contextmanager
def standardize_once(module: nn.Module) -> Iterator[None]:
    """Within, each :class:`ReparametrizedConv2d` computes its weight at the first use alone.

    For one forward, in this thread, of a head whose convolutions run on every feature level.
    Parameters must not change within; the next forward computes anew.
    """
    convs = [id(child) for child in module.modules() if isinstance(child, ReparametrizedConv2d)]
    token = _scope.set((dict.fromkeys(convs), _mode()))
    try:
        yield
    finally:
        _scope.reset(token)


def _shared_weight(conv: ReparametrizedConv2d) -> torch.Tensor | None:
    scope = None if torch.compiler.is_compiling() else _scope.get()
    if scope is None:
        return None
    weights, mode = scope
    if id(conv) not in weights or mode != _mode():
        return None
    if weights[id(conv)] is None:
        weights[id(conv)] = conv.used_weight()
    return weights[id(conv)]


def autocast_dtype(weight: torch.Tensor) -> torch.dtype | None:
    """The type in which autocast would have a convolution read its weight; None for its own."""
    if weight.dtype is not torch.float32 or not (weight.is_cuda or weight.is_cpu):
        return None
    device = "cuda" if weight.is_cuda else "cpu"
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
