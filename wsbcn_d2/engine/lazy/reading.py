"""Reading a Python config (LazyConfig), and what of it training and its checks both ask for."""

import builtins
import difflib
from collections.abc import Iterable

import torch
from detectron2.config import LazyConfig
from omegaconf import DictConfig, ListConfig, OmegaConf

from ...config import UsageError, check_file, one_line, refusing
from ...data import register_coco_sets
from ...safe_yaml import read_yaml
from ..checks import Keys
from ..hooks import ResumedSchedule

__all__ = ["KEYS", "load_lazy_config", "resumed_schedule_of"]


_PARTS = ("dataloader", "lr_multiplier", "model", "optimizer", "train")

KEYS = Keys(
    train="dataloader.train.dataset.names",
    test="dataloader.test.dataset.names",
    images="dataloader.train.total_batch_size",
    reference="train.reference_world_size",
    accumulate="train.accumulate",
    recompute="train.recompute",
    weights="train.init_checkpoint",
    freeze="freeze_at of model.backbone",
    estimates="train.bcn",
    output_dir="train.output_dir",
)
"""What a Python config calls the things that are checked."""


def load_lazy_config(config_file: str, overrides: Iterable[str] = ()) -> DictConfig:
    """Read a Python config, which is a program: run none that you would not run as one.

    A YAML file that was saved of one names what is to be called; its tags run nothing.

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
    check_file(config_file)
    stock_import = builtins.__import__
    try:
        if config_file.endswith((".yaml", ".yml")):
            read_yaml(config_file)  # raises for tags that run code, which the next line would obey
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
    # Hydra's parser and OmegaConf have many kinds.
    with refusing("command-line override: ", Exception, mend="; say KEY=VALUE"):
        overrides = list(overrides)
        _check_keys(cfg, overrides)
        cfg = LazyConfig.apply_overrides(cfg, overrides)
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


def resumed_schedule_of(cfg: DictConfig, optimizer: torch.optim.Optimizer) -> ResumedSchedule:
    options = {k: v for k, v in _numbers(cfg, "optimizer").items() if ".params." not in k}
    lengths = {
        **_numbers(cfg, "lr_multiplier"),
        "train.max_iter": cfg.train.max_iter,
        KEYS.images: cfg.dataloader.train.total_batch_size,
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
