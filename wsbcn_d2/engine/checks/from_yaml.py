"""A YAML config's run, as it is checked; and which of its keys an error of the model comes from."""

import re

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from torch import nn

from ...config import UsageError, one_line
from ...data import classification_mapper
from ...data.checks import Wanted, check_sets
from ..from_config import expectation, resumed_schedule
from .setup import Keys, Setup, check_setup

__all__ = ["check_config"]

_WRONG_MODEL = (KeyError, ValueError, AssertionError, AttributeError, TypeError, IndexError)


def check_config(
    cfg: CfgNode, *, world_size: int = 1, eval_only: bool = False, resume: bool = False
) -> None:
    """:func:`check_setup` of a YAML config.

    Args:
        cfg: the config.
        world_size, eval_only, resume: see :func:`check_setup`.

    Raises:
        UsageError, CheckpointError, DataError: for the first thing found.
    """
    bcn = cfg.MODEL.BCN

    def training(model):
        try:
            optimizer = build_optimizer(cfg, model)
            build_lr_scheduler(cfg, optimizer)
            resumed_schedule(cfg, optimizer)
        except (KeyError, ValueError, AssertionError) as error:
            raise UsageError(f"SOLVER: {one_line(error)}") from error

    def data(train):
        for names, is_train in ((cfg.DATASETS.TRAIN, True), (cfg.DATASETS.TEST, False)):
            if train or not is_train:
                try:
                    classification_mapper(cfg, names, is_train=is_train)
                except ValueError as error:
                    raise UsageError(one_line(error)) from error
        check_sets(cfg.DATASETS.TRAIN if train else (), cfg.DATASETS.TEST, _wanted(cfg))

    setup = Setup(
        Keys(),
        train=cfg.DATASETS.TRAIN,
        test=cfg.DATASETS.TEST,
        images=cfg.SOLVER.IMS_PER_BATCH,
        reference=cfg.SOLVER.REFERENCE_WORLD_SIZE,
        accumulate=cfg.SOLVER.ACCUMULATE,
        recompute=cfg.MODEL.RECOMPUTE,
        weights=cfg.MODEL.WEIGHTS,
        output_dir=cfg.OUTPUT_DIR,
        estimates={
            "rate": bcn.UPDATE_RATE,
            "schedule": bcn.UPDATE_RATE_SCHEDULE,
            "monitor_period": bcn.MONITOR_PERIOD,
        },
        model=lambda: _model(cfg),
        training=training,
        data=data,
        expected=lambda model: expectation(cfg, model),
    )
    check_setup(setup, world_size=world_size, eval_only=eval_only, resume=resume)


_CHANNELS = {"L": 1, "RGB": 3, "BGR": 3, "YUV-BT.601": 3}
_CLASSES_OF = {  # META_ARCHITECTURE -> where the number of its classes stands
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "PanopticFPN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
    "WSRetinaNet": "MODEL.RETINANET.NUM_CLASSES",
}


def _wanted(cfg: CfgNode) -> Wanted:
    """What a YAML config says of its data."""
    if cfg.INPUT.MASK_FORMAT not in ("polygon", "bitmask"):
        raise UsageError(f"INPUT.MASK_FORMAT {cfg.INPUT.MASK_FORMAT!r}: say polygon or bitmask")
    if cfg.SOLVER.EPOCHS < 0:
        raise UsageError(f"SOLVER.EPOCHS {cfg.SOLVER.EPOCHS} must not be negative")
    channels, means = _CHANNELS.get(cfg.INPUT.FORMAT), len(cfg.MODEL.PIXEL_MEAN)
    if means != len(cfg.MODEL.PIXEL_STD) or (channels and channels != means):
        raise UsageError(
            f"INPUT.FORMAT {cfg.INPUT.FORMAT} needs {channels or means} numbers each in "
            f"MODEL.PIXEL_MEAN and MODEL.PIXEL_STD, not {means} and {len(cfg.MODEL.PIXEL_STD)}"
        )
    key = _CLASSES_OF.get(cfg.MODEL.META_ARCHITECTURE)
    return Wanted(
        classes=dict(_leaves(cfg.MODEL, "MODEL"))[key] if key else None,
        masks=cfg.MODEL.MASK_ON,
        mask_format=cfg.INPUT.MASK_FORMAT,
        keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else 0,
        sigmas=len(cfg.TEST.KEYPOINT_OKS_SIGMAS),
        flip=cfg.INPUT.RANDOM_FLIP != "none",
        picture_range=cfg.INPUT.PICTURE_RANGE,
        classes_key=key or "",
    )


def _model(cfg: CfgNode) -> nn.Module:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = str(torch.empty(0).device)
    try:
        return build_model(cfg)
    except _WRONG_MODEL as error:
        message = one_line(error)
        hints = ", ".join(f"{key}={value!r}" for key, value in _culprits(cfg, message))
        raise UsageError(
            f"the model cannot be built: {message}" + (f" (with {hints})" if hints else "")
        ) from error


def _culprits(cfg: CfgNode, message: str) -> list[tuple[str, object]]:
    """The keys that an error of the model comes from: norms whose change changes it, widths."""
    keys = list(_leaves(cfg.MODEL, "MODEL"))
    norms = [(k, v) for k, v in keys if k.endswith("NORM") and v and isinstance(v, str)]
    found = [(key, value) for key, value in norms if _message_with(cfg, key, "BN") != message]
    if not found:  # two that say the same
        found = [(key, value) for key, value in norms if repr(value) in message]
    width = re.search(r"(\d+) channels", message)
    if width:
        found += [(k, v) for k, v in keys if v == int(width[1]) and not isinstance(v, bool)]
    return found


def _leaves(node: CfgNode, prefix: str):
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from _leaves(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", value


def _message_with(cfg: CfgNode, key: str, value) -> str:
    cfg = cfg.clone()
    cfg.merge_from_list([key, value])
    try:
        build_model(cfg)
    except _WRONG_MODEL as error:
        return one_line(error)
    return ""
