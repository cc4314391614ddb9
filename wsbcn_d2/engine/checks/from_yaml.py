"""A YAML config's run, as it is checked; and which of its keys an error of the model comes from."""

import functools
import operator
import re

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer

from ...checkpoint import LoadExpectation
from ...config import WRONG_MODEL, UsageError, one_line, refusing
from ...data import classification_mapper
from ...data.checks import Wanted
from ..from_config import resumed_schedule
from .setup import Setup, check_setup

__all__ = ["check_config"]

_CHANNELS = {"L": 1, "RGB": 3, "BGR": 3, "YUV-BT.601": 3}
_CLASSES_OF = {  # META_ARCHITECTURE -> where the number of its classes stands
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "PanopticFPN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
    "WSRetinaNet": "MODEL.RETINANET.NUM_CLASSES",
}


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
    check_setup(_YamlSetup(cfg), world_size=world_size, eval_only=eval_only, resume=resume)


class _YamlSetup(Setup):
    def value(self, key, default=None):
        return functools.reduce(operator.getitem, key.split("."), self.cfg)

    def estimates(self):
        bcn = self.cfg.MODEL.BCN
        return {
            "update_rate": bcn.UPDATE_RATE,
            "update_rate_schedule": bcn.UPDATE_RATE_SCHEDULE,
            "monitor_period": bcn.MONITOR_PERIOD,
        }

    def model(self):
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.MODEL.DEVICE = str(torch.empty(0).device)
        try:
            return build_model(cfg)
        except WRONG_MODEL as error:
            message = one_line(error)
            hints = ", ".join(f"{key}={value!r}" for key, value in _culprits(cfg, message))
            raise UsageError(
                f"the model cannot be built: {message}" + (f" (with {hints})" if hints else "")
            ) from error

    def training(self, model):
        with refusing("SOLVER: ", KeyError, ValueError, AssertionError):
            optimizer = build_optimizer(self.cfg, model)
            build_lr_scheduler(self.cfg, optimizer)
            resumed_schedule(self.cfg, optimizer)

    def expected(self, model):
        return LoadExpectation.from_model(model, self.cfg)

    def wanted(self, training):
        cfg = self.cfg
        with refusing("", ValueError):
            if training:
                classification_mapper(cfg, cfg.DATASETS.TRAIN, is_train=True)
            classification_mapper(cfg, cfg.DATASETS.TEST, is_train=False)
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
            classes=self.value(key) if key else None,
            masks=cfg.MODEL.MASK_ON,
            mask_format=cfg.INPUT.MASK_FORMAT,
            keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else 0,
            sigmas=len(cfg.TEST.KEYPOINT_OKS_SIGMAS),
            flip=cfg.INPUT.RANDOM_FLIP != "none",
            picture_range=cfg.INPUT.PICTURE_RANGE,
            classes_key=key or "",
        )


def _culprits(cfg: CfgNode, message: str) -> list[tuple[str, object]]:
    """The keys that an error of the model comes from: norms whose change changes it, widths."""
    keys = list(_leaves(cfg.MODEL, "MODEL"))
    norms = [(k, v) for k, v in keys if k.endswith("NORM") and v and isinstance(v, str)]
    found = [(key, value) for key, value in norms if _message_with(cfg, key) != message]
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


def _message_with(cfg: CfgNode, key: str) -> str:
    """The error of the model with BN as one of its norms."""
    cfg = cfg.clone()
    cfg.merge_from_list([key, "BN"])
    try:
        build_model(cfg)
    except WRONG_MODEL as error:
        return one_line(error)
    return ""
