"""Batch-channel normalization (BCN): a batch norm followed by a channel (group) norm.

Paper: arXiv 1903.10520v2, section 4. Released code: classes ``GN`` (``imagenet/models``) and
``BCNorm`` (README) in https://github.com/joe-siyuan-qiao/Batch-Channel-Normalization.

Deviations from the released code:
  * The batch half is the attribute ``bn`` (released: ``pbn``), and the channel half's affine has
    the shape (G,) (released: (1, G, 1)). It is one weight and bias per *group*, as there.
  * The channel half is ``torch.group_norm``, which takes an empty batch, unlike the released
    reshape.
"""

import torch
from detectron2.layers import FrozenBatchNorm2d, NaiveSyncBatchNorm
from torch import nn
from torch.func import functional_call
from torch.nn.modules import module as nn_module

from .estimated_batch_norm import MOVING_UPDATE_RATE, EstimatedBatchNorm2d, check_input
from .kernels.autograd import fused_bcn
from .kernels.dispatch import backend_name, bcn_backend
from .recomputation import recalled, remember, repeats

__all__ = ["DEFAULT_GROUPS", "BatchChannelNorm2d", "channel_norm"]

DEFAULT_GROUPS = 32


# Those that a user registers for all modules; each dictionary is changed in place.
_GLOBAL_HOOKS = (
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)


def channel_norm(
    x: torch.Tensor, num_groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """Group normalization with one weight and bias per group.

    Args:
        x: shape (N, C, H, W); N may be 0.
        num_groups: G, a divisor of C.
        weight, bias: shape (G,).
        eps: added to the variance of each (sample, group).

    Returns:
        Tensor of the shape of ``x``.
    """
    per_group = x.shape[1] // num_groups
    weight, bias = weight.repeat_interleave(per_group), bias.repeat_interleave(per_group)
    # Not the functional, which refuses groups of one number: they are worth their bias.
    return torch.group_norm(x, num_groups, weight, bias, eps)


def readable(x, weight, bias, bn_weight, bn_bias, mean, inverse, eps):
    """BCN as it is defined, on constants mean and inverse = 1 / sqrt(var + eps) of shape (C,)."""
    scale = inverse if bn_weight is None else inverse * bn_weight
    shift = -mean * scale if bn_bias is None else bn_bias - mean * scale
    z = x.to(weight.dtype) * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    return channel_norm(z, weight.shape[0], weight, bias, eps)


def _sync_batch_norm(num_channels: int, eps: float) -> nn.Module:
    # PyTorch's own layer trains on CUDA only. Detectron2's stands in for CPU ranks, in the mode
    # that weighs ranks by their samples and so takes an empty one.
    if torch.cuda.is_available():
        return nn.SyncBatchNorm(num_channels, eps=eps)
    return NaiveSyncBatchNorm(num_channels, eps=eps, stats_mode="N")


class BatchChannelNorm2d(nn.GroupNorm):
    """y = weight_g GN_g(bn(x)) + bias_g, where ``self.bn`` is a batch norm with its own affine.

    The module *is* the channel half and *contains* the batch half, so that everything in
    Detectron2 that goes by type does the right thing: WEIGHT_DECAY_NORM sees the parameters of
    both, freezing turns only ``bn`` into a FrozenBatchNorm2d, and PreciseBN finds ``bn``.

    Where the batch half's statistics are constants to autograd, which is all but training with
    ``"batch"`` or ``"sync"``, both halves run fused (:mod:`.kernels.autograd`), with the same
    results. ``WSBCN_FUSED=off`` in the environment forces the composition.

    State dict: ``weight, bias`` of shape (G,), ``bn.weight, bn.bias, bn.running_mean,
    bn.running_var`` of shape (C,) and ``bn.num_batches_tracked``.
    """

    def __init__(
        self,
        num_channels: int,
        num_groups: int | str = DEFAULT_GROUPS,
        eps: float = 1e-5,
        statistics: str = "estimated",
        update_rate: float = MOVING_UPDATE_RATE,
    ):
        """
        Args:
            num_channels: C, a positive multiple of ``num_groups``.
            num_groups: G; ``"auto"`` for the largest divisor of C up to 32.
            eps: stabilizer of both halves.
            statistics: what the batch half normalizes with in training: ``"estimated"`` (running
                estimates: the micro-batch form), ``"batch"`` (the batch's own moments) or
                ``"sync"`` (those of the batches of all processes).
            update_rate: rate in [0, 1] of the estimates; read by ``"estimated"`` alone.

        Raises:
            ValueError: for an argument out of its range.
        """
        if num_groups == "auto":
            num_groups = max(g for g in range(1, 33) if num_channels % g == 0)
        if not isinstance(num_groups, int):
            raise ValueError(f"unknown number of groups {num_groups!r}: a number, or 'auto'")
        if num_groups < 1 or num_channels < 1 or num_channels % num_groups:
            raise ValueError(
                f"BCN cannot split {num_channels} channels into {num_groups} groups: the number "
                "of channels must be a positive multiple of the number of groups"
            )
        super().__init__(num_groups, num_channels, eps=eps, affine=False)
        self.affine = True
        self.weight = nn.Parameter(torch.ones(num_groups))
        self.bias = nn.Parameter(torch.zeros(num_groups))
        if statistics == "estimated":
            self.bn = EstimatedBatchNorm2d(num_channels, eps=eps, momentum=update_rate)
        elif statistics == "batch":
            self.bn = nn.BatchNorm2d(num_channels, eps=eps)
        elif statistics == "sync":
            self.bn = _sync_batch_norm(num_channels, eps)
        else:
            raise ValueError(
                f"unknown kind of BCN statistics {statistics!r}: use estimated, batch or sync"
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: shape (N, C, H, W); N may be 0.

        Returns:
            Tensor of shape (N, C, H, W).

        Raises:
            ValueError: for an input of another shape, before the estimates move.
        """
        if not torch.jit.is_scripting():
            check_input(x, self.num_channels)
            y = self._fused(x)
            if y is not None:
                return y
            z = self._batch_half(x)
        else:
            z = self.bn(x)
        return channel_norm(z, self.num_groups, self.weight, self.bias, self.eps)

    def _batch_half(self, x: torch.Tensor) -> torch.Tensor:
        bn = self.bn
        if type(bn) is EstimatedBatchNorm2d or not (bn.training and repeats()):
            return bn(x)
        # The batch's own moments are the same again, but must not be counted again.
        return functional_call(bn, {name: t.clone() for name, t in bn.named_buffers()}, (x,))

    @property
    def statistics(self) -> str:
        """What the batch half normalizes with in training, after whatever has become of it."""
        kinds = {
            EstimatedBatchNorm2d: "estimated",
            FrozenBatchNorm2d: "frozen",
            nn.BatchNorm2d: "batch",
            nn.SyncBatchNorm: "sync",
            NaiveSyncBatchNorm: "sync",
        }
        return kinds.get(type(self.bn), type(self.bn).__name__)

    __jit_unused_properties__ = ["statistics"]

    def _fused(self, x: torch.Tensor) -> torch.Tensor | None:
        bn = self.bn
        if not _constant(bn):
            return None
        weight, bias = _tensors(self, "weight", "bias")
        bn_weight, bn_bias, mean, var, count = _tensors(
            bn, "weight", "bias", "running_mean", "running_var", "num_batches_tracked"
        )
        backend = bcn_backend(x, weight, bias, bn_weight, bn_bias, mean, var, count)
        if backend is None:
            return None
        moves = type(bn) is EstimatedBatchNorm2d and bn.training and bn.updates()
        rate = None
        if moves:
            first_runs = recalled(bn, x)
            if first_runs is not None:
                mean, var = first_runs
                moves = False
            elif bn.momentum is None:
                bn.update(x)
            else:
                rate = bn.momentum
        y = fused_bcn(
            backend, readable, x, weight, bias, bn_weight, bn_bias, mean, var, count,
            bn.eps, rate, self.eps,
        )  # fmt: skip
        if moves:
            remember(bn, x)
        return y

    def extra_repr(self) -> str:
        return (
            f"{self.num_channels}, num_groups={self.num_groups}, eps={self.eps:g}, "
            f"statistics={self.statistics}, fused={backend_name(self.weight)}"
        )


def _tensors(module: nn.Module, *names: str) -> list[torch.Tensor | None]:
    # As getattr(module, name, None), which takes a microsecond for what no __dict__ has.
    own = {**module._parameters, **module._buffers}
    return [own[name] if name in own else getattr(module, name, None) for name in names]


def _constant(bn: nn.Module) -> bool:
    """Whether autograd may take the batch half's statistics as constants, and nobody listens."""
    if (
        # PreciseBN counts samples by a hook on the batch norm, which must therefore be called.
        bn._forward_hooks
        or bn._forward_pre_hooks
        or bn._backward_hooks
        or bn._backward_pre_hooks
        or any(_GLOBAL_HOOKS)
    ):
        return False
    # By exact type: a subclass may normalize in another way.
    if type(bn) in (EstimatedBatchNorm2d, FrozenBatchNorm2d):
        return True
    plain = type(bn) in (nn.BatchNorm2d, nn.SyncBatchNorm, NaiveSyncBatchNorm)
    return plain and not bn.training and bn.running_mean is not None
