"""Reading a config and refusing, before anything is written, what cannot work.

Every refusal is a :class:`UsageError` whose message is one line: the culprit and the mend.
"""

import difflib
import os
from collections.abc import Iterable
from urllib.parse import urlparse

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from torch import nn

from ..checkpoint import LoadExpectation, WSBCNCheckpointer
from ..config import get_cfg
from ..data import classification_mapper
from .hooks import UpdateRateSchedule
from .monitor import ChannelMonitor

__all__ = [
    "UsageError",
    "check_batch",
    "check_config",
    "check_datasets",
    "check_weights",
    "load_config",
    "one_line",
]

_NORM_KEYS = (
    "MODEL.RESNETS.NORM",
    "MODEL.FPN.NORM",
    "MODEL.ROI_BOX_HEAD.NORM",
    "MODEL.ROI_MASK_HEAD.NORM",
)


class UsageError(ValueError):
    """Wrong input by the user; the message is one line that names the culprit and the mend."""


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, or its type where it has none."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split()) or type(error).__name__


def load_config(config_file: str, opts: Iterable[str] = ()) -> CfgNode:
    """Read a YAML config over this project's defaults.

    Without a CUDA device, ``MODEL.DEVICE`` becomes ``cpu``.

    Args:
        config_file: path of the YAML file.
        opts: ``KEY VALUE KEY VALUE ...`` that override it.

    Returns:
        CfgNode: frozen.

    Raises:
        UsageError: for a missing file, broken YAML, an unknown key or a value of a wrong type.
    """
    if not config_file:
        raise UsageError("no config given: say --config-file FILE")
    if not PathManager.isfile(config_file):
        raise UsageError(f"config file {config_file!r} not found: check --config-file")
    cfg = get_cfg()
    try:
        cfg.merge_from_file(config_file)
    except (KeyError, ValueError, AssertionError, OSError, yaml.YAMLError) as error:
        raise UsageError(f"config file {config_file!r}: {one_line(error)}") from error
    try:
        cfg.merge_from_list(list(opts))
    except (KeyError, ValueError, AssertionError) as error:
        raise UsageError(
            f"command-line override: {one_line(error)}; overrides are KEY VALUE pairs of keys "
            "that the config has"
        ) from error
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    return cfg


def check_config(
    cfg: CfgNode, *, world_size: int = 1, eval_only: bool = False, resume: bool = False
) -> None:
    """Refuse a config that training or evaluation would stumble over.

    Checked are datasets, batch size, update rate, that the model can be built (names, norms,
    channels), which is tried on the meta device, and that the weights belong to it. Nothing is
    written.

    Args:
        cfg: the config.
        world_size: number of processes.
        eval_only: leave out what concerns training alone.
        resume: leave out the weights if ``OUTPUT_DIR`` has a checkpoint to resume from.

    Raises:
        UsageError, CheckpointError: for the first thing found.
    """
    if not eval_only:
        check_datasets(cfg.DATASETS.TRAIN, "DATASETS.TRAIN")
        check_batch(
            cfg.SOLVER.IMS_PER_BATCH,
            cfg.SOLVER.REFERENCE_WORLD_SIZE,
            world_size,
            keys=("SOLVER.IMS_PER_BATCH", "SOLVER.REFERENCE_WORLD_SIZE"),
        )
        _check_accumulation(cfg, world_size)
        try:
            classification_mapper(cfg, cfg.DATASETS.TRAIN, is_train=True)
        except ValueError as error:
            raise UsageError(one_line(error)) from error
    check_datasets(cfg.DATASETS.TEST, "DATASETS.TEST")
    weights = cfg.MODEL.WEIGHTS
    if resume and PathManager.exists(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")):
        weights = ""
    check_weights(weights, "MODEL.WEIGHTS")
    try:
        UpdateRateSchedule(cfg.MODEL.BCN.UPDATE_RATE, cfg.MODEL.BCN.UPDATE_RATE_SCHEDULE)
        if cfg.MODEL.BCN.MONITOR_PERIOD:
            ChannelMonitor(cfg.MODEL.BCN.MONITOR_PERIOD)
    except ValueError as error:
        raise UsageError(f"MODEL.BCN: {one_line(error)}") from error
    model = _model_on_meta(cfg)
    if weights and "://" not in weights:  # others are fetched, and checked then
        WSBCNCheckpointer(model, expected=LoadExpectation.from_cfg(cfg)).check(weights)


def _check_accumulation(cfg: CfgNode, world_size: int) -> None:
    # With a reference world size, the images per process stay the same.
    per_process = cfg.SOLVER.IMS_PER_BATCH // (cfg.SOLVER.REFERENCE_WORLD_SIZE or world_size)
    if not 1 <= cfg.SOLVER.ACCUMULATE <= per_process:
        raise UsageError(
            f"SOLVER.ACCUMULATE {cfg.SOLVER.ACCUMULATE} cannot split the {per_process} images of "
            f"a process's step: make it 1 to {per_process}, or SOLVER.IMS_PER_BATCH larger"
        )


def check_datasets(names: Iterable[str], key: str) -> None:
    """Refuse unknown dataset names and registered datasets whose files are absent.

    Args:
        names: dataset names.
        key: the config key they come from.

    Raises:
        UsageError: naming the dataset, where its files were looked for, and the mend.
    """
    for name in names:
        if name not in DatasetCatalog.list():
            close = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "register it first"
            raise UsageError(f"{key}: dataset {name!r} is not registered: {hint}")
        metadata = MetadataCatalog.get(name)
        if metadata.get("generator"):  # rendered on first use
            continue
        for field in ("json_file", "image_root"):
            path = metadata.get(field)
            if path and not PathManager.exists(path):
                how = metadata.get("how_to_get", "get the dataset")
                raise UsageError(
                    f"{key}: dataset {name!r} is absent: {os.path.abspath(path)} not found; {how} "
                    "and set DETECTRON2_DATASETS to the folder that holds it"
                )


def check_batch(images: int, reference: int, world_size: int, *, keys: tuple[str, str]) -> None:
    """Refuse a batch that does not split evenly over the processes.

    Args:
        images: per step, over all processes.
        reference: number of processes that ``images`` is meant for; 0 for any.
        world_size: number of processes there are.
        keys: the config keys of the first two.

    Raises:
        UsageError
    """
    if reference:
        if images % reference:
            raise UsageError(
                f"{keys[0]} {images} cannot be split over {keys[1]} {reference} processes: make "
                "it a multiple"
            )
        images = images // reference * world_size
    if images < 1 or images % world_size:
        raise UsageError(
            f"{keys[0]} {images} cannot be split over {world_size} processes: make it a positive "
            f"multiple of {world_size}"
        )


def check_weights(weights: str, key: str) -> None:
    """Refuse the path of a checkpoint that is absent; URLs are left to the loading.

    Args:
        weights: path, URL or "".
        key: the config key it comes from.

    Raises:
        UsageError
    """
    path = urlparse(weights)._replace(query="").geturl()
    if not path or "://" in path:  # nothing to load, or resolved and checked on loading
        return
    if not PathManager.isfile(path):
        raise UsageError(
            f"{key} {path!r} not found: give the path of a checkpoint, or '' to train from scratch"
        )


def _model_on_meta(cfg: CfgNode) -> nn.Module:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    try:
        with torch.device("meta"):
            return build_model(cfg)
    except (KeyError, ValueError, AssertionError, AttributeError) as error:
        norms = []
        for key in _NORM_KEYS:
            node = cfg
            for part in key.split("."):
                node = node[part]
            norms.append(f"{key}={node!r}")
        raise UsageError(
            f"the model cannot be built: {one_line(error)} (with {', '.join(norms)}, "
            f"MODEL.FPN.OUT_CHANNELS={cfg.MODEL.FPN.OUT_CHANNELS})"
        ) from error
