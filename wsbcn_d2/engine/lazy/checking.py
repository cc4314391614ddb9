"""A Python config's run, as it is checked."""

import copy

import torch
from detectron2.config import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ...checkpoint import LoadExpectation
from ...config import UsageError, one_line
from ...data.checks import Wanted, check_sets
from ..checks import Setup, check_setup
from .reading import KEYS, estimates_of, names_of, resumed_schedule_of

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

    def training(model):
        _check_milestones(cfg)
        _built(cfg, "lr_multiplier")
        optimizer = copy.deepcopy(cfg.optimizer)
        optimizer.params.model = model
        built = _built({"optimizer": optimizer}, "optimizer")
        try:
            resumed_schedule_of(cfg, built)
        except ValueError as error:
            raise UsageError(one_line(error)) from error

    def expected(model):
        for name in ("pixel_mean", "pixel_std"):  # the model has no numbers on the meta device
            if name in cfg.model:
                setattr(model, name, torch.tensor(list(cfg.model[name])))
        return LoadExpectation.from_model(model)

    setup = Setup(
        KEYS,
        train=names_of(cfg, "train"),
        test=names_of(cfg, "test"),
        images=cfg.dataloader.train.total_batch_size,
        reference=cfg.train.get("reference_world_size", 0),
        accumulate=cfg.train.get("accumulate", 1),
        recompute=cfg.train.get("recompute", []),
        weights=cfg.train.init_checkpoint,
        output_dir=cfg.train.output_dir,
        estimates=estimates_of(cfg),
        model=lambda: _built(cfg, "model"),
        training=training,
        data=lambda train: check_sets(
            names_of(cfg, "train") if train else (), names_of(cfg, "test"), _wanted(cfg)
        ),
        expected=expected,
    )
    check_setup(setup, world_size=world_size, eval_only=eval_only, resume=resume)


def _wanted(cfg: DictConfig) -> Wanted:
    """What a Python config says of its data."""
    heads = cfg.model.get("roi_heads", {})
    inside = "num_classes" in heads
    mapper = cfg.dataloader.train.mapper
    limits = list(mapper.get("limits", []))
    mapper = mapper.get("mapper", mapper)  # of a RangeMapper
    keypoints = heads.get("keypoint_head", {}).get("num_keypoints", 0)
    return Wanted(
        classes=heads.num_classes if inside else cfg.model.get("num_classes"),
        masks="mask_head" in heads,
        mask_format=mapper.get("instance_mask_format", "bitmask"),
        keypoints=keypoints,
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
    try:
        return instantiate(cfg[part])
    except (
        *(KeyError, ValueError, AssertionError, AttributeError, TypeError),
        OmegaConfBaseException,
    ) as error:
        raise UsageError(f"{part} cannot be built: {one_line(error)}") from error
