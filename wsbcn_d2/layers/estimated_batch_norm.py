"""Batch normalization by running estimates: the batch half of micro-batch BCN.

Paper: arXiv 1903.10520v2, section 4 and Algorithm 1. Released code: class ``EstBN`` in
https://github.com/joe-siyuan-qiao/Batch-Channel-Normalization (README).

Deviations from the released code:
  * The update rate is a Python float, not a buffer that is read with ``.item()`` in every forward.
  * The first batch sets the estimates outright, instead of blending it into mean 0, variance 1;
    :func:`skip_first_batch_init` brings that back.
  * Empty, NaN and Inf batches, and a frozen affine, leave the estimates alone.
  * Arithmetic and estimates are float32 whatever the type of the input.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .recomputation import recalled, remember

__all__ = [
    "DEFAULT_UPDATE_RATE",
    "MOVING_UPDATE_RATE",
    "EstimatedBatchNorm2d",
    "set_update_rate",
    "skip_first_batch_init",
    "update_estimates",
]

# Of these classes, as the paper describes them: it names no rate, and its released code has 0.
MOVING_UPDATE_RATE = 0.01
# Of the norms that a config names, as it was measured to be better: configs/nuclei/results.
DEFAULT_UPDATE_RATE = 0.0


@torch.no_grad()
def update_estimates(
    mean: torch.Tensor,
    var: torch.Tensor,
    num_batches: torch.Tensor,
    batch_mean: torch.Tensor,
    batch_var: torch.Tensor,
    rate: float | None,
) -> None:
    """Move running estimates, in place, towards the moments of one batch.

    With r the rate: mean += r (batch_mean - mean) and var += r (v - var), where v is the
    batch's mean square around the *old* mean. The first batch (``num_batches`` 0), at every rate,
    and a rate of 1 set the estimates outright, with v around the batch's own mean. A batch whose
    moments are not all finite changes nothing and is not counted. There is no host synchronization.

    Args:
        mean, var: shape (C,), float32; updated.
        num_batches: shape (), int64; updated.
        batch_mean, batch_var: shape (C,): mean and biased variance (around ``batch_mean``).
        rate: update rate r in [0, 1]; None for the average over all batches so far, of their own
            means and variances.
    """
    # Written for few operations: on small maps their number is what the update costs.
    total = (batch_mean + batch_var).sum()
    finite = (total - total) == 0
    new_mean, new_var = batch_mean, batch_var
    if rate is None:
        share = 1 / (num_batches + 1).to(mean.dtype)
        new_mean = mean + share * (batch_mean - mean)
        new_var = var + share * (batch_var - var)
    elif rate < 1:
        delta = batch_mean - mean
        outright = num_batches == 0
        around_old_mean = torch.addcmul(batch_var - var, delta, delta)
        new_mean = torch.where(outright, batch_mean, torch.add(mean, delta, alpha=rate))
        new_var = torch.where(outright, batch_var, torch.add(var, around_old_mean, alpha=rate))
    mean.copy_(torch.where(finite, new_mean, mean))
    var.copy_(torch.where(finite, new_var, var))
    num_batches.add_(finite)


def check_input(x: torch.Tensor, channels: int) -> None:
    """Refuse inputs of another shape: one channel would be broadcast, into the estimates too."""
    # While tracing sizes are tensors, and comparing them is something that PyTorch warns of.
    if x.dim() != 4 or (not torch.jit.is_tracing() and x.shape[1] != channels):
        raise ValueError(f"expected a 4D input (N, {channels}, H, W), got shape {tuple(x.shape)}")


class EstimatedBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that normalizes with its running estimates in training too.

    Training forward: the estimates take one step towards the batch's moments
    (:func:`update_estimates`), then y = weight (x - mean) / sqrt(var + eps) + bias with the
    updated estimates, which are constants to autograd. Evaluation is that of the parent.

    ``momentum`` is the paper's update rate r; None, which ``torch.optim.swa_utils.update_bn`` sets,
    averages over the batches, as in the parent (but with biased variances). A forward repeated
    within a backward pass (activation checkpointing) moves nothing (:mod:`.recomputation`). Being a
    BatchNorm2d, the layer is frozen by ``FrozenBatchNorm2d.convert_frozen_batchnorm``, found by
    PreciseBN (whose momentum of 1 sets the estimates to each batch's own moments) and weighed by
    ``SOLVER.WEIGHT_DECAY_NORM``.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = MOVING_UPDATE_RATE,
        affine: bool = True,
    ):
        """
        Args:
            num_features: channels C.
            eps: added to the variance.
            momentum: update rate r in [0, 1].
            affine: whether to learn a weight and bias per channel. Setting ``requires_grad``
                of the weight to False also stops the updates.

        Raises:
            ValueError: if a number is out of its range.
        """
        _check_rate(momentum)
        if num_features < 1:
            raise ValueError(f"a norm needs at least one channel, got num_features={num_features}")
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: shape (N, C, H, W); float32, float16 or bfloat16; may be empty.

        Returns:
            Tensor of the shape and dtype of ``x``.

        Raises:
            ValueError: for an input of another shape, before the estimates move.
        """
        if torch.jit.is_scripting():
            # The update is not for scripts; without it training would not be this layer's.
            assert not self.training, "script EstimatedBatchNorm2d in evaluation mode"
        else:
            check_input(x, self.num_features)
        if torch.jit.is_scripting() or not self.training:
            # The parent's forward spelled out, since a script has no super().
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        mean, var = self.running_mean, self.running_var
        # numel() is a static shape check, not a device sync: an empty batch has no moments.
        if x.numel() > 0 and self.updates():
            first_runs = recalled(self, x)
            if first_runs is not None:
                mean, var = first_runs
            else:
                self.update(x)
                remember(self, x)
        scale, shift = self._scale_shift(mean, var)
        y = x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
        return y.to(x.dtype)

    def _scale_shift(
        self, mean: torch.Tensor, var: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The affine map per channel that estimates amount to: y = scale x + shift."""
        scale = (var + self.eps).rsqrt()
        # A clone, since autograd keeps the factor and a layer that is used again in the same
        # step (shared heads) updates the buffer in place before the backward pass.
        mean = mean.clone()
        if not self.affine:
            return scale, -mean * scale
        scale = self.weight * scale
        return scale, self.bias - mean * scale

    def __getstate__(self):
        # Copies and pickles wait for no recomputation.
        return {k: v for k, v in self.__dict__.items() if k not in ("_runs", "_lost")}

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # Estimates saved without a count (a frozen batch norm's, a Caffe2 model's) are estimates
        # all the same: with the count at 0 the first batch would overwrite them.
        if prefix + "running_mean" in state_dict:
            state_dict.setdefault(prefix + "num_batches_tracked", torch.tensor(1))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def updates(self) -> bool:
        """Whether a training forward moves the estimates: not in a layer whose affine is frozen.

        At an update rate of 0 the first batch sets them, if anything is to, and they are held.
        """
        return not (self.affine and not self.weight.requires_grad)

    @torch.no_grad()
    def update(self, x: torch.Tensor) -> None:
        """Move the estimates towards the moments of a batch, not empty, by the update rate."""
        x = x.to(torch.promote_types(x.dtype, self.running_mean.dtype))
        batch_var, batch_mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        update_estimates(
            self.running_mean,
            self.running_var,
            self.num_batches_tracked,
            batch_mean,
            batch_var,
            self.momentum,
        )


def _check_rate(rate: float) -> None:
    if not (isinstance(rate, (int, float)) and 0.0 <= rate <= 1.0):
        raise ValueError(f"the update rate must be a number in [0, 1], got {rate!r}")


def set_update_rate(module: nn.Module, rate: float) -> nn.Module:
    """Set the update rate of every :class:`EstimatedBatchNorm2d` within a module.

    Args:
        module: any module.
        rate: update rate r in [0, 1].

    Returns:
        ``module``.

    Raises:
        ValueError: if the rate is out of range; then nothing has been set.
    """
    _check_rate(rate)
    for child in module.modules():
        if isinstance(child, EstimatedBatchNorm2d):
            child.momentum = rate
    return module


@torch.no_grad()
def skip_first_batch_init(module: nn.Module) -> nn.Module:
    """Let new running estimates start from mean 0 and variance 1, as the released code does.

    Every :class:`EstimatedBatchNorm2d` within that has seen no batch counts one, so that its first
    batch moves the estimates by the update rate instead of setting them. Others are left alone.

    Args:
        module: any module.

    Returns:
        ``module``.
    """
    for child in module.modules():
        if isinstance(child, EstimatedBatchNorm2d):
            child.num_batches_tracked.clamp_(min=1)
    return module
