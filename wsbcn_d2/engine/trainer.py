"""Detectron2's ``DefaultTrainer`` with this project's hooks and evaluators."""

import contextlib
import functools
import logging
import os
import weakref
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterable
from unittest import mock

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, defaults, hooks
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from torch import nn

from ..checkpoint import CheckpointError, LoadExpectation, WSBCNCheckpointer
from ..config import load_config
from ..data import classification_test_loader, register_coco_sets
from ..modeling.recomputation import recompute
from .accumulate import accumulate
from .evaluation import build_evaluator
from .from_config import (
    build_mapper,
    estimate_hooks,
    resumed_schedule,
    schedule_by_epochs,
)
from .processes import set_up_process

__all__ = ["Trainer", "train_net"]


def _ddp_for(device: str):
    """Context in which DefaultTrainer's DDP takes a CPU model: it passes a GPU index always."""
    if device != "cpu":
        return contextlib.nullcontext()
    create = functools.partial(defaults.create_ddp_model, device_ids=None)
    return mock.patch.object(defaults, "create_ddp_model", create)


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
            expected=LoadExpectation.from_model(
                getattr(self.model, "module", self.model), self.cfg
            ),
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

    Returns the (last) evaluation's results, on the first process.
    """
    cfg = load_config(args.config_file, args.opts)
    set_up_process(cfg, args, cfg.OUTPUT_DIR, cfg.MODEL.DEVICE)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        expected = LoadExpectation.from_model(model, cfg)
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
