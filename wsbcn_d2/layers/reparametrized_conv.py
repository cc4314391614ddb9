"""Convolutions by a function of their parameters: where its value is kept, shared, or made again.

On a CPU autograd would keep the standardized copy of every weight from forward to backward: 126 MB
in an R-50-FPN Mask R-CNN, 6 % of the memory of a step on one image. Standardizing once more takes
less than 1 % of the convolution's own backward. On a GPU launches cost more than that memory, and
the plain convolution runs on a weight that is kept. Where one convolution runs several times in a
forward (:func:`standardize_once`), its weight is made once, and kept.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from detectron2.layers import Conv2d, DeformConv, ModulatedDeformConv
from torch import nn
from torch.nn import functional as F

from .kernels.autograd import gradients
from .kernels.dispatch import plain, requested_backend
from .recomputation import packing

__all__ = [
    "Recipe",
    "ReparametrizedConv2d",
    "autocast_dtype",
    "normalized_convs",
    "recomputed_conv2d",
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
            if _recomputes(self, x):
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


def _recomputes(conv: nn.Conv2d, x: torch.Tensor) -> bool:
    # Only training gains. Under autocast what is kept is the weight's copy in half precision.
    return (
        x.is_cpu
        and torch.is_grad_enabled()
        and conv.weight.requires_grad
        and plain(x)
        and x.numel() > 0
        and x.dtype == conv.weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and isinstance(conv.padding, tuple)
        and not torch.is_autocast_enabled("cpu")
        and requested_backend() != "off"
    )


def recomputed_conv2d(
    conv: nn.Conv2d,
    x: torch.Tensor,
    weight_of: Callable[..., torch.Tensor],
    *parameters: torch.Tensor,
) -> torch.Tensor:
    """``F.conv2d(x, weight_of(*parameters), ...)`` with the other arguments of ``conv``.

    Args:
        conv: whose ``padding`` is in numbers.
        x: shape (N, C_in, H, W), of the type of the weight.
        weight_of: a differentiable function of its arguments alone.
        *parameters: its arguments.

    Returns:
        Tensor of shape (N, C_out, H', W'), bit by bit that of the plain call, as its gradients.
    """
    how = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return _RecomputedConv.apply(weight_of, how, x, conv.bias, *parameters)


class _RecomputedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight_of, how, x, bias, *parameters):
        ctx.save_for_backward(x, bias, *parameters)
        ctx.weight_of, ctx.how = weight_of, how
        return F.conv2d(x, weight_of(*parameters), bias, *how)

    @staticmethod
    def backward(ctx, dy):
        x, bias, *parameters = ctx.saved_tensors
        needs_x, needs_bias, *needs = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # create_graph=True
            y = F.conv2d(x, ctx.weight_of(*parameters), bias, *ctx.how)
            inputs = (x, bias, *parameters)
            needs = ctx.needs_input_grad[2:]
            return None, None, *gradients(y, inputs, needs, dy, create_graph=True)
        stride, padding, dilation, groups = ctx.how
        with torch.enable_grad():
            leaves = [
                parameter.detach().requires_grad_(need)
                for parameter, need in zip(parameters, needs, strict=True)
            ]
            weight = ctx.weight_of(*leaves)
        dx, dw, db = torch.ops.aten.convolution_backward(
            dy, x, weight.detach(), None if bias is None else bias.shape,
            stride, padding, dilation, False, (0, 0), groups, (needs_x, any(needs), needs_bias),
        )  # fmt: skip
        return None, None, dx, db, *gradients(weight, leaves, needs, dw)
