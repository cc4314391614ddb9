"""Training and evaluation of Python configs, with what ``Trainer`` does for YAML."""

import copy
import logging
from argparse import Namespace

import torch
from detectron2.config import instantiate
from detectron2.engine import AMPTrainer, SimpleTrainer, create_ddp_model, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules
from omegaconf import DictConfig

from ...checkpoint import WSBCNCheckpointer
from ...modeling import set_estimates
from ...modeling.recomputation import recompute
from ..accumulate import accumulate
from ..from_config import estimate_hooks
from ..processes import set_up_process
from .reading import load_lazy_config, resumed_schedule_of

__all__ = ["auto_scale", "evaluate", "train", "train_net"]


def auto_scale(cfg: DictConfig, world_size: int) -> DictConfig:
    """Keep images per process and epochs when the number of processes is not the config's.

    What ``DefaultTrainer.auto_scale_workers`` does to a YAML config: batch size and learning rate
    in proportion, lengths in inverse proportion. The warm-up is a share of the whole length, and
    so follows.

    Args:
        cfg: its ``train.reference_world_size`` is the number it is meant for; 0 leaves it alone.
        world_size: the number of processes there are.

    Returns:
        DictConfig: a new config, or ``cfg`` if there is nothing to do.
    """
    reference = cfg.train.get("reference_world_size", 0)
    if not reference or reference == world_size:
        return cfg
    cfg = copy.deepcopy(cfg)
    scale = world_size / reference
    loader = cfg.dataloader.train
    loader.total_batch_size = round(loader.total_batch_size * scale)
    cfg.optimizer.lr = cfg.optimizer.lr * scale
    schedule = cfg.lr_multiplier.scheduler
    schedule.milestones = [round(step / scale) for step in schedule.milestones]
    cfg.train.max_iter = round(cfg.train.max_iter / scale)
    cfg.train.eval_period = round(cfg.train.eval_period / scale)
    cfg.train.checkpointer.period = max(1, round(cfg.train.checkpointer.period / scale))
    cfg.train.reference_world_size = world_size
    logging.getLogger(__name__).info(
        f"Rescaled from {reference} to {world_size} processes: batch {loader.total_batch_size}, "
        f"learning rate {cfg.optimizer.lr:g}, {cfg.train.max_iter} iterations"
    )
    return cfg


def evaluate(cfg: DictConfig, model: torch.nn.Module) -> dict:
    """Run the config's evaluator on its test set.

    Args:
        cfg: the config.
        model: the detector.

    Returns:
        dict: results by task; empty on other processes than the first.
    """
    loader = instantiate(cfg.dataloader.test)
    results = inference_on_dataset(model, loader, instantiate(cfg.dataloader.evaluator)) or {}
    if results:
        print_csv_format(results)
    return results


def train(cfg: DictConfig, *, resume: bool = False) -> dict:
    """Train, with Detectron2's hooks and this project's, and evaluate.

    Args:
        cfg: as loaded; :func:`auto_scale` is applied here.
        resume: go on from the last checkpoint in ``train.output_dir``, if there is one.

    Returns:
        dict: the last evaluation's results; empty on other processes than the first.
    """
    cfg = auto_scale(copy.deepcopy(cfg), comm.get_world_size())  # a model is put into it below
    model = recompute(instantiate(cfg.model), cfg.train.get("recompute", []))
    model.to(cfg.train.device)
    bcn = cfg.train.get("bcn", {})
    set_estimates(model, bcn.get("update_rate"), bcn.get("first_batch_init", True))
    logging.getLogger(__name__).info(f"Model:\n{model}")
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = instantiate(cfg.dataloader.train)
    ddp = dict(cfg.train.ddp)
    if cfg.train.device == "cpu":
        ddp["device_ids"] = None  # Detectron2 passes a GPU's index
    model = create_ddp_model(model, **ddp)
    trainer = (AMPTrainer if cfg.train.amp.enabled else SimpleTrainer)(model, loader, optimizer)
    accumulate(trainer, cfg.train.get("accumulate", 1))
    checkpointer = WSBCNCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    trainer.register_hooks(_hooks(cfg, trainer, checkpointer))
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    trainer.train(start, cfg.train.max_iter)
    return getattr(trainer, "last_results", {})


def _hooks(cfg: DictConfig, trainer: SimpleTrainer, checkpointer: WSBCNCheckpointer) -> list:
    """In ``DefaultTrainer``'s order; estimates are synchronized before anything reads them."""

    def run_evaluation():
        trainer.last_results = evaluate(cfg, trainer.model)
        return trainer.last_results

    main = comm.is_main_process()
    precise = cfg.train.get("precise_bn", {})
    result = [
        resumed_schedule_of(cfg, trainer.optimizer),
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
        *estimate_hooks(**cfg.train.get("bcn", {})),
    ]
    if precise.get("enabled") and get_bn_modules(trainer.model):
        loader = instantiate(cfg.dataloader.train)  # one of its own, as in DefaultTrainer
        result.append(
            hooks.PreciseBN(cfg.train.eval_period, trainer.model, loader, precise.num_iter)
        )
    if main:
        result.append(hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer))
    result.append(hooks.EvalHook(cfg.train.eval_period, run_evaluation))
    if main:
        writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
        result.append(hooks.PeriodicWriter(writers, period=cfg.train.log_period))
    return result


def train_net(args: Namespace) -> dict:
    """One process of ``tools/lazyconfig_train_net.py``: train, or evaluate with ``--eval-only``.

    Args:
        args: of :func:`detectron2.engine.default_argument_parser`.

    Returns:
        dict: the (last) evaluation's results; empty on other processes than the first.
    """
    cfg = load_lazy_config(args.config_file, args.opts)
    set_up_process(cfg, args, cfg.train.output_dir, cfg.train.device)
    if not args.eval_only:
        return train(cfg, resume=args.resume)
    model = instantiate(cfg.model).to(cfg.train.device)
    WSBCNCheckpointer(model, cfg.train.output_dir).resume_or_load(
        cfg.train.init_checkpoint, resume=args.resume
    )
    return evaluate(cfg, model)
