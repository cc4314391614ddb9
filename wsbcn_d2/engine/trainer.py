"""Detectron2's ``DefaultTrainer`` with this project's hooks and evaluators."""

import contextlib
import dataclasses
import functools
import logging
import math
import os
import weakref
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from unittest import mock

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, defaults, hooks
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from torch import nn

from ..checkpoint import CheckpointError, LoadExpectation, WSBCNCheckpointer
from ..config import load_config
from ..data import (
    RangeMapper,
    classification_mapper,
    classification_test_loader,
    register_coco_sets,
)
from ..modeling.recomputation import recompute
from .accumulate import accumulate
from .evaluation import build_evaluator
from .hooks import EstimateSync, ResumedSchedule, UpdateRateSchedule
from .monitor import ChannelMonitor
from .processes import set_up_process

__all__ = ["Trainer", "estimate_hooks", "resumed_schedule", "train_net"]


def estimate_hooks(
    rate: float | None = None,
    schedule: str = "constant",
    sync: bool = True,
    monitor_period: int = 0,
) -> list[HookBase]:
    """The hooks that look after running estimates, from a YAML or a Python config's options.

    Args:
        rate: base rate; None for what the model's norms have (:func:`set_estimates`).
        schedule: ``MODEL.BCN.UPDATE_RATE_SCHEDULE``.
        sync: ``MODEL.BCN.SYNC_ESTIMATES``.
        monitor_period: ``MODEL.BCN.MONITOR_PERIOD``.

    Raises:
        ValueError: for a rate, schedule or period that there is none of.
    """
    result: list[HookBase] = [UpdateRateSchedule(rate, schedule)]
    if sync:
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


def _ddp_for(device: str):
    """Context in which DefaultTrainer's DDP takes a CPU model: it passes a GPU index always."""
    if device != "cpu":
        return contextlib.nullcontext()
    create = functools.partial(defaults.create_ddp_model, device_ids=None)
    return mock.patch.object(defaults, "create_ddp_model", create)


def expectation(cfg: CfgNode, model: nn.Module) -> LoadExpectation:
    """What the weights of a YAML config's model have to be, and what its checkpoints record.

    Args:
        cfg: the config.
        model: built from it; asked where ``MODEL.WS.PARTS`` and not the backbone's name decides.
    """
    expected = LoadExpectation.from_cfg(cfg)
    if not cfg.MODEL.WS.PARTS:
        return expected
    own = {
        (module.ws_formula, module.ws_eps)
        for module in getattr(model, "backbone", model).modules()
        if hasattr(module, "ws_formula")
    }
    formula, eps = own.pop() if len(own) == 1 else (None if own else "none", None)
    return dataclasses.replace(expected, ws_formula=formula, ws_eps=eps)


def schedule_by_epochs(cfg: CfgNode) -> CfgNode:
    """The config with ``SOLVER.EPOCHS`` turned into iterations.

    Args:
        cfg: its training sets are loaded if it counts in epochs.

    Returns:
        CfgNode: a new config, or ``cfg`` if there is nothing to do. ``SOLVER.MAX_ITER`` is the
        number of steps in which every picture that is trained on is seen ``EPOCHS`` times;
        ``STEPS``, ``TEST.EVAL_PERIOD`` and ``CHECKPOINT_PERIOD`` keep their shares of it, and the
        warm-up is no longer than a tenth.
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
    """What turns a record of data sets into a model's input, where that is not Detectron2's own.

    Returns:
        The mapper of classification data sets, or one that reads pictures of more than 8 bits with
        ``INPUT.PICTURE_RANGE``; None for Detectron2's ``DatasetMapper``.
    """
    mapper = classification_mapper(cfg, names, is_train=is_train)
    if mapper is None and cfg.INPUT.PICTURE_RANGE:
        return RangeMapper(DatasetMapper(cfg, is_train), cfg.INPUT.PICTURE_RANGE)
    return mapper


class Trainer(DefaultTrainer):
    """``DefaultTrainer`` plus update-rate schedule, estimate sync, dataset evaluators and a
    checkpointer that refuses weights which do not fit."""

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: a config with the keys of :func:`wsbcn_d2.add_wsbcn_config`.
        """
        register_coco_sets(cfg.DATASETS.COCO_SETS)  # where the config was not read by load_config
        cfg = schedule_by_epochs(cfg)
        with _ddp_for(cfg.MODEL.DEVICE):
            super().__init__(cfg)
        accumulate(self._trainer, cfg.SOLVER.ACCUMULATE)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Detectron2's model, its running estimates and recomputation as the config says."""
        return recompute(super().build_model(cfg), cfg.MODEL.RECOMPUTE)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[list[dict]]:
        """Detectron2's loader, on :func:`build_mapper`."""
        mapper = build_mapper(cfg, cfg.DATASETS.TRAIN, is_train=True)
        return build_detection_train_loader(cfg, mapper=mapper)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[list[dict]]:
        """Detectron2's loader, or :func:`wsbcn_d2.data.classification_test_loader`."""
        loader = classification_test_loader(cfg, dataset_name)
        if loader is None:
            mapper = build_mapper(cfg, [dataset_name], is_train=False)
            loader = build_detection_test_loader(cfg, dataset_name, mapper=mapper)
        return loader

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks, and this project's right after the learning-rate scheduler.

        There the synchronized estimates come before PreciseBN, checkpoints and evaluation.
        """
        # The hooks hold on to the checkpointer, and the parent's constructor makes both.
        self.checkpointer = WSBCNCheckpointer(
            self.model,
            self.cfg.OUTPUT_DIR,
            expected=expectation(self.cfg, getattr(self.model, "module", self.model)),
            trainer=weakref.proxy(self),
        )
        bcn = self.cfg.MODEL.BCN
        ours = estimate_hooks(
            None, bcn.UPDATE_RATE_SCHEDULE, bcn.SYNC_ESTIMATES, bcn.MONITOR_PERIOD
        )
        result = super().build_hooks()
        after = next(i for i, hook in enumerate(result) if isinstance(hook, hooks.LRScheduler))
        result[after + 1 : after + 1] = ours
        return [resumed_schedule(self.cfg, self._trainer.optimizer), *result]

    def train(self) -> OrderedDict | None:
        """See :meth:`DefaultTrainer.train`; what stops training is what is raised.

        On a full disk Detectron2's writers fail in turn while they are closed, and their error
        would hide that of the checkpoint, which says what to do.
        """
        try:
            return super().train()
        except OSError as error:
            first = error.__context__
            if isinstance(first, CheckpointError):
                raise first from first.__cause__
            raise

    def state_dict(self) -> dict:
        """Iteration, hooks and ``_trainer``: optimizer and gradient scaler.

        Detectron2 v0.6 leaves the last out: momentum would be lost by a resume, and the first
        step after it would have the learning rate of iteration 0.
        """
        return {"_trainer": self._trainer.state_dict(), **super().state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore :meth:`state_dict`, or with a warning one without ``_trainer``."""
        inner = state_dict.get("_trainer")
        if inner is None:
            logging.getLogger(__name__).warning(
                "The checkpoint has no optimizer state (a stock Detectron2 v0.6 trainer's has "
                "none): momentum starts at zero"
            )
        else:
            self._trainer.load_state_dict(inner)
        # Not DefaultTrainer's, which on Detectron2's main branch insists on the optimizer.
        TrainerBase.load_state_dict(self, state_dict)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """See :func:`wsbcn_d2.engine.build_evaluator`."""
        return build_evaluator(cfg, dataset_name, output_folder)

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> OrderedDict:
        """Evaluate with test-time augmentation (``TEST.AUG``); R-CNN models only.

        Returns:
            OrderedDict: results by task, each name with the suffix ``_TTA``.
        """
        logging.getLogger(__name__).info("Running inference with test-time augmentation")
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return OrderedDict((task + "_TTA", value) for task, value in results.items())


def train_net(args: Namespace) -> OrderedDict | None:
    """One process of ``tools/train_net.py``: train, or evaluate with ``--eval-only``.

    Args:
        args: of :func:`detectron2.engine.default_argument_parser`.

    Returns:
        OrderedDict: the (last) evaluation's results, on the first process.
    """
    cfg = load_config(args.config_file, args.opts)
    set_up_process(cfg, args, cfg.OUTPUT_DIR, cfg.MODEL.DEVICE)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        expected = expectation(cfg, model)
        WSBCNCheckpointer(model, cfg.OUTPUT_DIR, expected=expected).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        results = Trainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(Trainer.test_with_TTA(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    if cfg.TEST.AUG.ENABLED:
        trainer.register_hooks(
            [hooks.EvalHook(0, lambda: trainer.test_with_TTA(cfg, trainer.model))]
        )
    return trainer.train()
