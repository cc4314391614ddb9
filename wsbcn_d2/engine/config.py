"""Reading a YAML config, and the error that wrong input ends in."""

from collections.abc import Iterable

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from ..config import get_cfg

__all__ = ["UsageError", "load_config", "one_line"]


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
