"""Training hooks for running estimates; usable from any Detectron2 trainer."""

import logging

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from ..layers import EstimatedBatchNorm2d, set_update_rate
from .sync import EstimateSynchronizer

__all__ = ["EstimateSync", "UpdateRateSchedule"]

SCHEDULES = ("constant", "lr")


def _estimated_norms(model: nn.Module) -> list[EstimatedBatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, EstimatedBatchNorm2d)]


class UpdateRateSchedule(HookBase):
    """Set the update rate of all running estimates of ``trainer.model`` before each step."""

    def __init__(self, update_rate: float | None = None, schedule: str = "constant"):
        """
        Args:
            update_rate: base rate r in [0, 1]; None for what the model's norms have.
            schedule: ``"constant"``: r at every step; ``"lr"``: r times the learning rate's
                current factor, lr / base lr of the first parameter group, at most 1.

        Raises:
            ValueError: for an unknown schedule or a rate out of range.
        """
        if schedule not in SCHEDULES:
            raise ValueError(
                f"unknown MODEL.BCN.UPDATE_RATE_SCHEDULE {schedule!r}: use one of "
                + ", ".join(SCHEDULES)
            )
        if update_rate is not None:
            set_update_rate(nn.Identity(), update_rate)  # nothing to set: only the range check
        self._rate = update_rate
        self._schedule = schedule
        self._norms: list[EstimatedBatchNorm2d] = []

    def before_train(self):
        self._norms = _estimated_norms(self.trainer.model)
        if self._norms:
            if self._rate is None:
                self._rate = self._norms[0].momentum
            logging.getLogger(__name__).info(
                f"Running estimates of {len(self._norms)} norms: update rate {self._rate:g}, "
                f"schedule {self._schedule}"
            )

    def before_step(self):
        rate = self._rate
        if self._schedule == "lr":
            group = self.trainer.optimizer.param_groups[0]
            # "initial_lr" is written by every PyTorch scheduler when it is attached.
            rate = min(1.0, rate * group["lr"] / group["initial_lr"])
        for norm in self._norms:
            norm.momentum = rate
        if self._norms:
            self.trainer.storage.put_scalar("bcn_update_rate", rate, smoothing_hint=False)


class EstimateSync(HookBase):
    """Average the running estimates over all processes after each step, in one collective.

    On one process it does nothing. See :class:`wsbcn_d2.engine.sync.EstimateSynchronizer`.
    """

    def __init__(self):
        self._synchronizer: EstimateSynchronizer | None = None

    def before_train(self):
        norms = _estimated_norms(self.trainer.model)
        if norms and comm.get_world_size() > 1:
            self._synchronizer = EstimateSynchronizer(norms)

    def after_step(self):
        if self._synchronizer is not None:
            with torch.no_grad():
                self._synchronizer.synchronize()
