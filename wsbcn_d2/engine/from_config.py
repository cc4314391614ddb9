"""What the parts of a run are made of, read off a config."""

import logging
import math
from collections.abc import Callable, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.engine import HookBase

from ..data import RangeMapper, classification_mapper
from .hooks import EstimateSync, ResumedSchedule, UpdateRateSchedule
from .monitor import ChannelMonitor

__all__ = [
    "build_mapper",
    "estimate_hooks",
    "resumed_schedule",
    "schedule_by_epochs",
]


def estimate_hooks(
    update_rate: float | None = None,
    update_rate_schedule: str = "constant",
    sync_estimates: bool = True,
    monitor_period: int = 0,
    **others: object,
) -> list[HookBase]:
    """The hooks that look after running estimates, from ``MODEL.BCN``'s or ``train.bcn``'s keys.

    Without a rate, it is what the model's norms have (:func:`set_estimates`). Other keys are the
    model's.

    Raises:
        ValueError: for a rate, schedule or period that there is none of.
    """
    result: list[HookBase] = [UpdateRateSchedule(update_rate, update_rate_schedule)]
    if sync_estimates:
        result.append(EstimateSync())
    if monitor_period:
        result.append(ChannelMonitor(monitor_period))
    return result


_OPTIONS = (
    *("BASE_LR", "BIAS_LR_FACTOR", "MOMENTUM", "NESTEROV"),
    *("WEIGHT_DECAY", "WEIGHT_DECAY_NORM", "WEIGHT_DECAY_BIAS"),
)
_LENGTHS = (
    *("IMS_PER_BATCH", "LR_SCHEDULER_NAME", "STEPS", "GAMMA", "MAX_ITER"),
    *("WARMUP_FACTOR", "WARMUP_ITERS", "WARMUP_METHOD"),
)


def resumed_schedule(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> ResumedSchedule:
    """The hook that compares a config's schedule with the checkpoint's.

    Raises:
        ValueError: for an unknown ``SOLVER.ON_RESUME``.
    """

    def values(names):
        found = {f"SOLVER.{name}": cfg.SOLVER[name] for name in names}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}

    take = cfg.SOLVER.ON_RESUME
    return ResumedSchedule(optimizer, values(_OPTIONS), values(_LENGTHS), take=take)


def schedule_by_epochs(cfg: CfgNode) -> CfgNode:
    """The config with ``SOLVER.EPOCHS`` turned into iterations, for which the sets are loaded.

    ``SOLVER.MAX_ITER`` is the number of steps in which every picture that is trained on is seen
    ``EPOCHS`` times; ``STEPS``, ``TEST.EVAL_PERIOD`` and ``CHECKPOINT_PERIOD`` keep their shares
    of it, and the warm-up is no longer than a tenth.
    """
    if not cfg.SOLVER.EPOCHS:
        return cfg
    records = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
        if cfg.MODEL.KEYPOINT_ON
        else 0,
    )
    cfg = cfg.clone()
    cfg.defrost()
    solver = cfg.SOLVER
    iterations = max(1, round(solver.EPOCHS * len(records) / solver.IMS_PER_BATCH))
    share = iterations / solver.MAX_ITER
    solver.STEPS = tuple(round(step * share) for step in solver.STEPS)
    cfg.TEST.EVAL_PERIOD = math.ceil(cfg.TEST.EVAL_PERIOD * share)
    solver.CHECKPOINT_PERIOD = math.ceil(solver.CHECKPOINT_PERIOD * share)
    solver.WARMUP_ITERS = min(solver.WARMUP_ITERS, iterations // 10)
    solver.MAX_ITER, solver.EPOCHS = iterations, 0
    cfg.freeze()
    logging.getLogger(__name__).info(
        f"{len(records)} pictures, {solver.IMS_PER_BATCH} a step: {iterations} iterations, "
        f"learning rate lower at {solver.STEPS}"
    )
    return cfg


def build_mapper(cfg: CfgNode, names: Sequence[str], *, is_train: bool) -> Callable | None:
    """What turns a record of data sets into a model's input; None for Detectron2's own mapper.

    Others are for classification, and for pictures of more than 8 bits (``INPUT.PICTURE_RANGE``).
    """
    mapper = classification_mapper(cfg, names, is_train=is_train)
    if mapper is None and cfg.INPUT.PICTURE_RANGE:
        return RangeMapper(DatasetMapper(cfg, is_train), cfg.INPUT.PICTURE_RANGE)
    return mapper
