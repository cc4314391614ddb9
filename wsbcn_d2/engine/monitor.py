"""Watching how close a net is to elimination singularities: channels that are never active.

The paper's reason for BCN (arXiv 1903.10520v2, section 4): nets with channel-based norms drift to
where channels are never active, and batch knowledge keeps them away. Measured here, per norm, over
a window of a few consecutive training steps:

inactive
    Share of channels whose pre-activation, the norm's output, is <= 0 at more than 99 % of
    positions. What a shortcut adds later is not part of it.
shift
    |mean| / standard deviation of a channel of that output, averaged over the channels: how far
    the channel lies from what batch statistics alone would give it, which is 0. Affine included,
    because the activation sees it. A channel that never changes counts as ``MAX_SHIFT``.
estimate_error
    For norms with running estimates, |estimated mean - mean over the window| / estimated standard
    deviation of the norm's input, averaged over the channels. As the window is short, it has a
    floor: the scatter of single batches divided by the square root of the window.
"""

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from ..layers import BatchChannelNorm2d, EstimatedBatchNorm2d

__all__ = ["ChannelMonitor", "part_of"]

MAX_SHIFT = 10.0
# Positions per channel and step that "inactive" and "shift" look at: most of the cost would be
# reading every norm's output, and a coarser grid says as much.
_POSITIONS = 1024
_PARTS = (("fpn_", "fpn"), ("bottom_up", "backbone"), ("box_head", "box_head"))
_PARTS += (("mask_head", "mask_head"), ("proposal_generator", "rpn"))


def part_of(name: str) -> str:
    """The part of a model that a module belongs to: ``backbone``, ``fpn``, ``box_head``, ...

    Of a name with or without DDP's prefix, the first known part, else the first component.
    """
    name = name.removeprefix("module.")
    return next((part for mark, part in _PARTS if mark in name), name.split(".")[0])


class ChannelMonitor(HookBase):
    """Log inactive channels, shift and estimate error of ``trainer.model`` every few steps.

    Scalars ``channels/<part>/<quantity>_<mean or max>``, over the part's norms, go to the
    trainer's storage and so to TensorBoard and ``metrics.json``. Between windows nothing is
    attached to the model; a window costs one transfer from the device. In a job of several
    processes, the first one's batches are watched.
    """

    def __init__(self, period: int, window: int = 8, threshold: float = 0.99):
        """
        Args:
            period: iterations from one window's end to the next's.
            window: consecutive steps that are watched; at most ``period``.
            threshold: share of positions above which a channel counts as inactive.

        Raises:
            ValueError: for a period below 1.
        """
        if period < 1:
            raise ValueError(f"the monitor's period must be at least 1, got {period!r}")
        self._period = period
        self._window = max(1, min(window, period))
        self._threshold = threshold
        self._layers: list[_Layer] = []
        self._handles: list = []

    def before_train(self) -> None:
        self._layers = []
        if not comm.is_main_process():
            return
        inner = set()
        for name, module in self.trainer.model.named_modules():
            if module in inner or not isinstance(
                module, (nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
            ):
                continue
            inner.update(module.modules())  # BCN is one norm, not two
            self._layers.append(_Layer(part_of(name), module))

    def before_step(self) -> None:
        if self._steps_to_go() < self._window:
            for layer in self._layers:
                self._handles.append(layer.module.register_forward_hook(layer.observe))

    def after_step(self) -> None:
        if not self._handles:
            return
        self._detach()  # before the next hook: an evaluation must not be watched
        if self._steps_to_go() == 0:
            for name, value in self._collect().items():
                self.trainer.storage.put_scalar(name, value, smoothing_hint=False)

    def after_train(self) -> None:
        self._detach()

    def _steps_to_go(self) -> int:
        return self._period - 1 - self.trainer.iter % self._period

    def _detach(self):
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _collect(self) -> dict[str, float]:
        """Figures of the window that ends here; the layers begin anew."""
        keys, tensors = [], []
        for layer in self._layers:
            for quantity, value in layer.finish(self._threshold).items():
                keys.append(f"channels/{layer.part}/{quantity}")
                tensors.append(value)
        figures: dict[str, list[float]] = {}
        if tensors:
            for key, value in zip(keys, torch.stack(tensors).tolist(), strict=True):
                figures.setdefault(key, []).append(value)
        result = {}
        for key, values in figures.items():
            result[f"{key}_mean"] = sum(values) / len(values)
            result[f"{key}_max"] = max(values)
        return result


class _Layer:
    """Sums over a window of one norm, all kept on its device."""

    def __init__(self, part: str, module: nn.Module):
        self.part = part
        self.module = module
        bn = module.bn if isinstance(module, BatchChannelNorm2d) else module
        self._estimates = bn if isinstance(bn, EstimatedBatchNorm2d) else None
        self._sums: torch.Tensor | None = None
        self._positions = 0
        self._input_means: list[torch.Tensor] = []

    @torch.no_grad()
    def observe(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        """A forward hook."""
        if output.dim() != 4 or output.numel() == 0:
            return
        if self._estimates is not None:
            self._input_means.append(inputs[0].mean((0, 2, 3), dtype=torch.float32))
        stride = max(1, int((output.numel() / output.shape[1] / _POSITIONS) ** 0.5))
        y = output[:, :, ::stride, ::stride].float().transpose(0, 1).flatten(1)
        sums = torch.stack([(y <= 0).float().sum(1), y.sum(1), y.square().sum(1)])
        self._sums = sums if self._sums is None else self._sums + sums
        self._positions += y.shape[1]

    @torch.no_grad()
    def finish(self, threshold: float) -> dict[str, torch.Tensor]:
        """Figures of the window, each a tensor of shape (); empty if nothing passed."""
        sums, means, positions = self._sums, self._input_means, self._positions
        self._sums, self._input_means, self._positions = None, [], 0
        if sums is None:
            return {}
        negative, mean, square = sums / positions
        std = (square - mean.square()).clamp(min=0).sqrt()
        shift = torch.where(mean == 0, 0.0, mean.abs() / std).clamp(max=MAX_SHIFT)
        result = {"inactive": (negative > threshold).float().mean(), "shift": shift.mean()}
        if means:
            bn = self._estimates
            error = (torch.stack(means).mean(0) - bn.running_mean).abs()
            result["estimate_error"] = (error / (bn.running_var + bn.eps).sqrt()).mean()
        return result
