"""Training and evaluation of Python configs (LazyConfig), with what ``Trainer`` does for YAML."""

import builtins
import copy
import difflib
import logging
from argparse import Namespace
from collections.abc import Iterable

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import AMPTrainer, SimpleTrainer, create_ddp_model, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from fvcore.nn.precise_bn import get_bn_modules
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..checkpoint import LoadExpectation, WSBCNCheckpointer
from ..config import UsageError, one_line
from ..data import register_coco_sets
from ..data.checks import Wanted, check_sets
from ..modeling import set_estimates
from ..modeling.recomputation import recompute
from .accumulate import accumulate
from .checks import Keys, Setup, check_setup
from .hooks import ResumedSchedule
from .processes import set_up_process
from .trainer import estimate_hooks

__all__ = [
    "auto_scale",
    "check_lazy_config",
    "evaluate",
    "load_lazy_config",
    "train",
    "train_net",
]

_PARTS = ("dataloader", "lr_multiplier", "model", "optimizer", "train")


def load_lazy_config(config_file: str, overrides: Iterable[str] = ()) -> DictConfig:
    """Read a Python config, which is a program: run none that you would not run as one.

    The same holds for a YAML file that was saved of one, as it names what is to be called.

    Without a CUDA device, ``train.device`` becomes ``cpu``. The sets of ``dataloader.coco_sets``,
    which are those of ``DATASETS.COCO_SETS``, are registered.

    Args:
        config_file: path of the file.
        overrides: ``key=value`` pairs in Hydra's grammar; ``+key=value`` adds a key.

    Returns:
        DictConfig

    Raises:
        UsageError: for a missing file, one that cannot be read or lacks a part, or an override
            of a key that the config does not have.
    """
    if not config_file:
        raise UsageError("no config given: say --config-file FILE")
    if not PathManager.isfile(config_file):
        raise UsageError(f"config file {config_file!r} not found: check --config-file")
    stock_import = builtins.__import__
    try:
        cfg = LazyConfig.load(config_file)
    except Exception as error:  # a config is code: anything can happen in it
        raise UsageError(
            f"config file {config_file!r}: {type(error).__name__}: {one_line(error)}"
        ) from error
    finally:
        builtins.__import__ = stock_import  # v0.6 leaves its own in place after an error
    missing = [part for part in _PARTS if part not in cfg]
    if missing:
        raise UsageError(
            f"config file {config_file!r} defines no {', '.join(missing)}: see configs/lazy"
        )
    try:
        overrides = list(overrides)
        _check_keys(cfg, overrides)
        cfg = LazyConfig.apply_overrides(cfg, overrides)
    except UsageError:
        raise
    except Exception as error:  # Hydra's parser and OmegaConf have many kinds
        raise UsageError(f"command-line override: {one_line(error)}; say KEY=VALUE") from error
    if str(cfg.train.device).startswith("cuda") and not torch.cuda.is_available():
        cfg.train.device = "cpu"
    sets = OmegaConf.to_container(OmegaConf.create(cfg.dataloader.get("coco_sets", [])))
    register_coco_sets(sets)
    return cfg


def _check_keys(cfg: DictConfig, overrides: list[str]) -> None:
    """Refuse unknown keys, which OmegaConf would silently add."""
    absent = object()
    for text in overrides:
        key = text.partition("=")[0]
        if key.startswith("-"):
            raise UsageError(f"command-line override: {text!r}: options go before KEY=VALUE pairs")
        if key.startswith("+") or OmegaConf.select(cfg, key, default=absent) is not absent:
            continue
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(cfg, parent, default=None) if parent else cfg
        names = [str(n) for n in node] if isinstance(node, DictConfig) else []
        close = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"+{key}=... adds it"
        raise UsageError(f"command-line override: the config has no {key!r}: {hint}")


_KEYS = Keys(
    train="dataloader.train.dataset.names",
    test="dataloader.test.dataset.names",
    images="dataloader.train.total_batch_size",
    reference="train.reference_world_size",
    accumulate="train.accumulate",
    recompute="train.recompute",
    weights="train.init_checkpoint",
    freeze="freeze_at of model.backbone",
    estimates="train.bcn",
)


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
            _resumed_schedule(cfg, built)
        except ValueError as error:
            raise UsageError(one_line(error)) from error

    def expected(model):
        for name in ("pixel_mean", "pixel_std"):  # the model has no numbers on the meta device
            if name in cfg.model:
                setattr(model, name, torch.tensor(list(cfg.model[name])))
        return LoadExpectation.from_model(model)

    setup = Setup(
        _KEYS,
        train=_names(cfg, "train"),
        test=_names(cfg, "test"),
        images=cfg.dataloader.train.total_batch_size,
        reference=cfg.train.get("reference_world_size", 0),
        accumulate=cfg.train.get("accumulate", 1),
        recompute=cfg.train.get("recompute", []),
        weights=cfg.train.init_checkpoint,
        output_dir=cfg.train.output_dir,
        estimates=_estimates(cfg),
        model=lambda: _built(cfg, "model"),
        training=training,
        data=lambda train: check_sets(
            _names(cfg, "train") if train else (), _names(cfg, "test"), _wanted(cfg)
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


def _resumed_schedule(cfg: DictConfig, optimizer: torch.optim.Optimizer) -> ResumedSchedule:
    options = {k: v for k, v in _numbers(cfg, "optimizer").items() if ".params." not in k}
    lengths = {
        **_numbers(cfg, "lr_multiplier"),
        "train.max_iter": cfg.train.max_iter,
        _KEYS.images: cfg.dataloader.train.total_batch_size,
    }
    take, key = cfg.train.get("on_resume", "checkpoint"), "train.on_resume"
    return ResumedSchedule(optimizer, options, lengths, take=take, key=key)


def _numbers(cfg: DictConfig, key: str) -> dict[str, object]:
    """Numbers, words and lists of them in a part of a config, by key; ``KEY.lr`` first."""
    node = OmegaConf.select(cfg, key)
    if isinstance(node, DictConfig):
        names = sorted((k for k in node if k != "_target_"), key=lambda name: name != "lr")
        return {k: v for name in names for k, v in _numbers(cfg, f"{key}.{name}").items()}
    if isinstance(node, ListConfig):
        node = list(node)
    return {key: node} if isinstance(node, (bool, int, float, str, list)) else {}


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


def _estimates(cfg: DictConfig) -> dict:
    """``train.bcn`` as the arguments of :func:`estimate_hooks`."""
    bcn = cfg.train.get("bcn", {})
    names = {"update_rate": "rate", "update_rate_schedule": "schedule", "sync_estimates": "sync"}
    names["monitor_period"] = "monitor_period"
    return {ours: bcn[theirs] for theirs, ours in names.items() if theirs in bcn}


def _names(cfg: DictConfig, split: str) -> list[str]:
    names = OmegaConf.select(cfg, f"dataloader.{split}.dataset.names", default=[])
    return list(names) if isinstance(names, (list, tuple, ListConfig)) else [names]


def _built(cfg: DictConfig, part: str) -> object:
    try:
        return instantiate(cfg[part])
    except (
        *(KeyError, ValueError, AssertionError, AttributeError, TypeError),
        OmegaConfBaseException,
    ) as error:
        raise UsageError(f"{part} cannot be built: {one_line(error)}") from error


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
        _resumed_schedule(cfg, trainer.optimizer),
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
        *estimate_hooks(**_estimates(cfg)),
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
