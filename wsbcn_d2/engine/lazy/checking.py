"""A Python config's run, as it is checked."""

import copy

import torch
from detectron2.config import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ...checkpoint import LoadExpectation
from ...config import WRONG_MODEL, UsageError, refusing
from ...data.checks import Wanted
from ..checks import Setup, check_setup
from .reading import KEYS, resumed_schedule_of

__all__ = ["check_lazy_config"]


def check_lazy_config(
    cfg: DictConfig, *, world_size: int = 1, eval_only: bool = False, resume: bool = False
) -> None:
    """:func:`wsbcn_d2.engine.checks.check_setup` of a Python config; writes nothing.

    Args:
        cfg: the config.
        world_size, eval_only, resume: see there.

    Raises:
        UsageError, CheckpointError, DataError: for the first thing found.
    """
    check_setup(_LazySetup(cfg), world_size=world_size, eval_only=eval_only, resume=resume)


class _LazySetup(Setup):
    keys = KEYS

    def value(self, key, default=None):
        return OmegaConf.select(self.cfg, key, default=default)

    def estimates(self):
        return self.cfg.train.get("bcn", {})

    def model(self):
        return _built(self.cfg, "model")

    def training(self, model):
        cfg = self.cfg
        _check_milestones(cfg)
        _built(cfg, "lr_multiplier")
        optimizer = copy.deepcopy(cfg.optimizer)
        optimizer.params.model = model
        built = _built({"optimizer": optimizer}, "optimizer")
        with refusing("", ValueError):
            resumed_schedule_of(cfg, built)

    def expected(self, model):
        for name in ("pixel_mean", "pixel_std"):  # the model has no numbers on the meta device
            if name in self.cfg.model:
                setattr(model, name, torch.tensor(list(self.cfg.model[name])))
        return LoadExpectation.from_model(model)

    def wanted(self, training):
        cfg = self.cfg
        heads = cfg.model.get("roi_heads", {})
        inside = "num_classes" in heads
        mapper = cfg.dataloader.train.mapper
        limits = list(mapper.get("limits", []))
        mapper = mapper.get("mapper", mapper)  # of a RangeMapper
        return Wanted(
            classes=heads.num_classes if inside else cfg.model.get("num_classes"),
            masks="mask_head" in heads,
            mask_format=mapper.get("instance_mask_format", "bitmask"),
            keypoints=heads.get("keypoint_head", {}).get("num_keypoints", 0),
            sigmas=len(cfg.dataloader.evaluator.get("kpt_oks_sigmas", ())),
            picture_range=limits,
            classes_key="model.roi_heads.num_classes" if inside else "model.num_classes",
            masks_key="model.roi_heads.mask_head",
            format_key="dataloader.train.mapper.instance_mask_format",
        )


def _check_milestones(cfg: DictConfig) -> None:
    """Refuse steps of the learning rate after the end: a shortened length leaves them behind."""
    steps = OmegaConf.select(cfg, "lr_multiplier.scheduler.milestones", default=None) or []
    end = cfg.train.max_iter
    late = [step for step in steps if step >= end]
    if late:
        raise UsageError(
            f"train.max_iter {end} ends before lr_multiplier.scheduler.milestones {list(steps)}: "
            "change both, for example lr_multiplier.scheduler.milestones="
            f"[{','.join(str(step * end // (steps[-1] * 10 // 9)) for step in steps)}]"
        )


def _built(cfg: DictConfig, part: str) -> object:
    with refusing(f"{part} cannot be built: ", *WRONG_MODEL, OmegaConfBaseException):
        return instantiate(cfg[part])
