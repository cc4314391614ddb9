"""The shipped configs and their models by name, with the interface of ``detectron2.model_zoo``."""

import difflib
from pathlib import Path

import torch
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.modeling import build_model
from omegaconf import DictConfig
from torch import nn

from .checkpoint import LoadExpectation, WSBCNCheckpointer
from .config import get_cfg

__all__ = ["get", "get_checkpoint_url", "get_config", "get_config_file"]

_PUBLISHED = "published"  # the folder of configs whose weights are those of the whole detector


def _folder() -> Path:
    """``configs`` of an installed package, or of the checkout that the package lies in."""
    installed = Path(__file__).with_name("configs")
    return installed if installed.is_dir() else installed.parents[1] / "configs"


def get_config_file(config_path: str) -> str:
    """Path of a shipped config.

    Args:
        config_path: its name below ``configs/``, such as
            ``COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_2x_gn_ws_1img.yaml``, or
            ``lazy/COCO-Detection/retinanet_R_50_FPN_1x_gn_ws_1img.py``.

    Raises:
        RuntimeError: there is none of that name; one line with similar names.
    """
    folder = _folder()
    path = folder / config_path
    if path.suffix in (".yaml", ".py") and path.is_file() and folder in path.resolve().parents:
        return str(path)
    shipped = [p for p in folder.rglob("*") if p.suffix in (".yaml", ".py") and p.is_file()]
    names = [p.relative_to(folder).as_posix() for p in shipped]
    close = difflib.get_close_matches(config_path, names, n=3)
    raise RuntimeError(
        f"{config_path} not available in Model Zoo! "
        + (f"Did you mean {' or '.join(close)}?" if close else f"They are below {folder}")
    )


def get_checkpoint_url(config_path: str) -> str:
    """Where the model lies that was trained with a config, for ``MODEL.WEIGHTS``.

    Args:
        config_path: see :func:`get_config_file`. Models exist for the configs in ``published/``.

    Returns:
        str: a ``wsbcn://`` name, which Detectron2's file handling resolves.

    Raises:
        RuntimeError: nobody published such a model, or there is no such config.
    """
    get_config_file(config_path)
    if Path(config_path).parts[0] != _PUBLISHED:
        raise RuntimeError(
            f"Pretrained model for {config_path} is not available! There are those of {_PUBLISHED}/"
        )
    return get_config(config_path).MODEL.WEIGHTS


def get_config(config_path: str, trained: bool = False) -> CfgNode | DictConfig:
    """A shipped config over this project's defaults.

    Args:
        config_path: see :func:`get_config_file`.
        trained: whether the weights are those of the trained model, not those to train from.

    Raises:
        RuntimeError: see :func:`get_checkpoint_url`.
    """
    path = get_config_file(config_path)
    if path.endswith(".py"):
        lazy = LazyConfig.load(path)
        if trained:
            lazy.train.init_checkpoint = get_checkpoint_url(config_path)
        return lazy
    cfg = get_cfg()
    cfg.merge_from_file(path)
    if trained:
        cfg.MODEL.WEIGHTS = get_checkpoint_url(config_path)
    return cfg


def get(config_path: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """The model of a shipped config, with the config's weights.

    Args:
        config_path: see :func:`get_config_file`.
        trained: see :func:`get_config`.
        device: where to put it; by default the config's, or the CPU where there is no GPU.

    Returns:
        nn.Module: in training mode.

    Raises:
        RuntimeError: see :func:`get_checkpoint_url`.
        CheckpointError: the weights cannot be fetched, or do not fit.
    """
    cfg = get_config(config_path, trained)
    if device is None and not torch.cuda.is_available():
        device = "cpu"
    if isinstance(cfg, CfgNode):
        cfg.MODEL.DEVICE = device or cfg.MODEL.DEVICE
        model = build_model(cfg)
        expected = LoadExpectation.from_model(model, cfg)
        weights = cfg.MODEL.WEIGHTS
    else:
        model, expected = instantiate(cfg.model).to(device or cfg.train.device), None
        weights = cfg.train.init_checkpoint
    WSBCNCheckpointer(model, expected=expected).load(weights)
    return model
