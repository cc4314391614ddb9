"""Training hooks: running estimates, resuming; usable from any Detectron2 trainer."""

import logging

import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from torch import nn

from ..layers import EstimatedBatchNorm2d, set_update_rate
from .sync import EstimateSynchronizer

__all__ = ["EstimateSync", "ResumedSchedule", "UpdateRateSchedule"]

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

    def before_train(self) -> None:
        self._norms = _estimated_norms(self.trainer.model)
        if self._norms:
            if self._rate is None:
                self._rate = self._norms[0].momentum
            logging.getLogger(__name__).info(
                f"Running estimates of {len(self._norms)} norms: update rate {self._rate:g}, "
                f"schedule {self._schedule}"
            )

    def before_step(self) -> None:
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

    def before_train(self) -> None:
        norms = _estimated_norms(self.trainer.model)
        if norms and comm.get_world_size() > 1:
            self._synchronizer = EstimateSynchronizer(norms)

    def after_step(self) -> None:
        if self._synchronizer is not None:
            self._synchronizer.synchronize()


class ResumedSchedule(HookBase):
    """Say what a resumed run's schedule and its checkpoint's differ in, and which one holds.

    A checkpoint brings the optimizer's options (learning rate, momentum, weight decay), while the
    lengths and steps are the config's. ``take="config"`` makes all of it the config's. It has to
    stand before the hook of the learning-rate scheduler.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        options: dict[str, object],
        lengths: dict[str, object],
        *,
        take: str = "checkpoint",
        key: str = "SOLVER.ON_RESUME",
    ):
        """
        Args:
            optimizer: as built from the config, before a checkpoint is loaded.
            options: keys and values of the config that the optimizer is built from.
            lengths: keys and values of the config that say how the learning rate goes on.
            take: ``"checkpoint"`` or ``"config"``: whose options hold.
            key: what the config calls ``take``.

        Raises:
            ValueError: for another ``take``.
        """
        if take not in ("checkpoint", "config"):
            raise ValueError(f"{key} {take!r}: say 'checkpoint' or 'config'")
        self._optimizer, self._take, self._key = optimizer, take, key
        self._options, self._lengths = options, lengths
        self._own = [
            {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
        ]
        for group in self._own:  # a scheduler that is attached already has scaled it
            group["lr"] = group["initial_lr"] = group.get("initial_lr", group["lr"])
        self._saved: dict[str, object] | None = None

    def state_dict(self) -> dict:
        return {"schedule": {**self._options, **self._lengths}}

    def load_state_dict(self, state_dict: dict) -> None:
        self._saved = state_dict["schedule"]

    def before_train(self) -> None:
        if self.trainer.start_iter == 0:
            return
        differences = self._differences()
        if differences:
            logging.getLogger(__name__).warning(
                "The schedule of the checkpoint and of the config differ: " + "; ".join(differences)
            )
        if self._take == "config":
            self._use_own()

    def _differences(self) -> list[str]:
        # Of a checkpoint of another trainer, the optimizer alone is known.
        optimizer = {next(iter(self._options)): self._optimizer.param_groups[0].get("initial_lr")}
        saved = optimizer if self._saved is None else self._saved
        result = []
        for name, value in {**self._options, **self._lengths}.items():
            before = saved.get(name, value)
            if before == value:
                continue
            what = f"; {before} holds (for the config's, {self._key} config)"
            if name in self._lengths or self._take == "config":
                what = f", which holds (to go on as before, set {before})"
            result.append(f"{name} was {before}, is {value}{what}")
        return result

    def _use_own(self) -> None:
        for group, own in zip(self._optimizer.param_groups, self._own, strict=True):
            group.update(own)
        for hook in self.trainer._hooks:
            scheduler = hook.scheduler if isinstance(hook, hooks.LRScheduler) else None
            if hasattr(scheduler, "base_lrs"):  # one of fvcore's reads them when training starts
                scheduler.base_lrs = [own["lr"] for own in self._own]
                for group, rate in zip(
                    self._optimizer.param_groups, scheduler.get_lr(), strict=True
                ):
                    group["lr"] = rate
