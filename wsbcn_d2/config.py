"""Config keys of this project, all in nodes of its own, and the reading of YAML configs."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg
from detectron2.utils.file_io import PathManager

from .data import register_coco_sets
from .layers import DEFAULT_UPDATE_RATE
from .safe_yaml import SafeCfgNode

__all__ = [
    "WRONG_MODEL",
    "UsageError",
    "add_wsbcn_config",
    "check_file",
    "get_cfg",
    "load_config",
    "one_line",
    "refusing",
]


def add_wsbcn_config(cfg: CfgNode) -> None:
    """Add the keys of this project to a Detectron2 config, in place.

    Which parts of a model use WS and BCN is said by Detectron2's own keys: the ``build_ws_*``
    backbones and ``WS*Head`` heads (names) and ``NORM`` (BCN, BatchBCN, SyncBCN, EstBN). The keys
    added here are the options of those parts.

    Args:
        cfg: as made by :func:`detectron2.config.get_cfg`.
    """
    cfg.MODEL.WS = CfgNode()
    # What the WS backbones and heads do to convolutions that a norm follows: "ws", standardize;
    # "wn", weight normalization; "cwn", centred weight normalization; "none", nothing.
    cfg.MODEL.WS.KIND = "ws"
    # Which standardization: "unbiased" (authors' BCN+WS weights), "unbiased_std" (authors' GN+WS
    # weights, their detectors, mmdetection) or "biased" (the paper's equation, timm). It must be
    # the one that MODEL.WEIGHTS was trained with.
    cfg.MODEL.WS.FORMULA = "unbiased"
    # Stabilizer of the standardization.
    cfg.MODEL.WS.EPS = 1e-5

    # Modules whose convolutions are standardized once the model is built, whoever builds it, beside
    # those of the WS backbones and heads: names or patterns ["backbone", "sem_seg_head.p*"], "*"
    # for the whole model; what fits one that begins with "!" is left out (modeling.parts).
    cfg.MODEL.WS.PARTS = []

    cfg.MODEL.BCN = CfgNode()
    # Groups of the channel norm in "BCN", "BatchBCN" and "SyncBCN": a number, or "auto" for the
    # largest divisor of the channels up to 32, which every number has; None: 32.
    cfg.MODEL.BCN.NUM_GROUPS = None
    # How far the running estimates of "BCN" and "EstBN" move towards each batch, in [0, 1]. At 0
    # they are held: as MODEL.WEIGHTS has them, else as the first batch set them or, with
    # FIRST_BATCH_INIT False, at mean 0 and variance 1. That was measured to be better than moving
    # ones (configs/nuclei/results). "EstBN", which no channel norm follows, needs them to move.
    cfg.MODEL.BCN.UPDATE_RATE = DEFAULT_UPDATE_RATE
    # "constant", or "lr": the rate follows the learning rate's factor (lr / base lr).
    cfg.MODEL.BCN.UPDATE_RATE_SCHEDULE = "constant"
    # Whether the first batch sets the estimates that nothing was loaded for; else they start from
    # mean 0 and variance 1.
    cfg.MODEL.BCN.FIRST_BATCH_INIT = True
    # Average the running estimates over all processes after every step.
    cfg.MODEL.BCN.SYNC_ESTIMATES = True
    # Every how many iterations to log how close the channels of all norms, whatever their kind,
    # are to elimination singularities (wsbcn_d2.engine.ChannelMonitor); 0: never.
    cfg.MODEL.BCN.MONITOR_PERIOD = 0

    # Names of modules, or patterns of them, whose activations are computed again in backward
    # instead of kept: ["backbone.bottom_up.res*", "roi_heads.*_head"] (modeling.recomputation).
    cfg.MODEL.RECOMPUTE = []

    # Of META_ARCHITECTURE "ImageClassifier".
    cfg.MODEL.CLASSIFIER = CfgNode()
    # Outputs of the linear layer.
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = 1000
    # Start every residual block as the identity: weight of its last norm zero (BCN: per group).
    cfg.MODEL.CLASSIFIER.ZERO_INIT_LAST_NORM = False

    # Sets in COCO format to register: {NAME: ..., JSON: annotation file, IMAGES: picture folder}
    # each; paths start from the current folder, or from $DETECTRON2_DATASETS.
    cfg.DATASETS.COCO_SETS = []

    # The values of pictures of more than 8 bits that become black and white, such as [0, 4095];
    # []: such pictures are refused. Pictures of 8 bits are taken as they are.
    cfg.INPUT.PICTURE_RANGE = []

    # How images of classification data sets are cut to one size.
    cfg.INPUT.CLASSIFICATION = CfgNode()
    # Side of the square image that the model is given.
    cfg.INPUT.CLASSIFICATION.SIZE = 224
    # "random_resized": a part of CROP_SCALE of the area, resized; "pad": pad by PADDING, then crop.
    cfg.INPUT.CLASSIFICATION.TRAIN_CROP = "random_resized"
    # Smallest and largest share of the area for "random_resized".
    cfg.INPUT.CLASSIFICATION.CROP_SCALE = (0.08, 1.0)
    # Zeros on each side for "pad".
    cfg.INPUT.CLASSIFICATION.PADDING = 4
    # For testing, the shorter side becomes this, then the middle SIZE x SIZE is taken.
    cfg.INPUT.CLASSIFICATION.RESIZE_TEST = 256

    # Backward passes per step: SOLVER.IMS_PER_BATCH is split into so many micro-batches, whose
    # gradients add up, so schedule and learning rate stay those of IMS_PER_BATCH.
    cfg.SOLVER.ACCUMULATE = 1
    # Passes over the training sets; MAX_ITER becomes as many iterations, and STEPS, EVAL_PERIOD and
    # CHECKPOINT_PERIOD keep their shares of it. 0: MAX_ITER as it stands.
    cfg.SOLVER.EPOCHS = 0
    # Whose learning rate, momentum and weight decay hold after --resume with others in the config:
    # "checkpoint", or "config". Lengths and steps are always the config's.
    cfg.SOLVER.ON_RESUME = "checkpoint"


def get_cfg() -> CfgNode:
    """Detectron2's default config with this project's keys added.

    Returns:
        SafeCfgNode: a new, unfrozen config; the files that are merged into it run no code.
    """
    cfg = SafeCfgNode(get_detectron2_cfg())
    add_wsbcn_config(cfg)
    return cfg


class UsageError(ValueError):
    """Wrong input by the user; the message is one line that names the culprit and the mend."""


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, or its type where it has none."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split()) or type(error).__name__


#: What building a model from a config raises where the config is at fault.
WRONG_MODEL = (KeyError, ValueError, AssertionError, AttributeError, TypeError, IndexError)


@contextlib.contextmanager
def refusing(what: str, *kinds: type[Exception], mend: str = "") -> Iterator[None]:
    """Turn errors of some kinds into a :class:`UsageError` of one line: what, why, the mend."""
    try:
        yield
    except UsageError:
        raise
    except kinds as error:
        raise UsageError(f"{what}{one_line(error)}{mend}") from error


def check_file(config_file: str) -> None:
    """Refuse the name of a config file that is empty or of none."""
    if not config_file:
        raise UsageError("no config given: say --config-file FILE")
    if not PathManager.isfile(config_file):
        raise UsageError(f"config file {config_file!r} not found: check --config-file")


def load_config(config_file: str, opts: Iterable[str] = ()) -> CfgNode:
    """Read a YAML config over this project's defaults.

    Without a CUDA device, ``MODEL.DEVICE`` becomes ``cpu``. The sets of ``DATASETS.COCO_SETS`` are
    registered.

    Args:
        config_file: path of the YAML file.
        opts: ``KEY VALUE KEY VALUE ...`` that override it.

    Returns:
        CfgNode: frozen.

    Raises:
        UsageError: for a missing file, broken YAML, an unknown key or a value of a wrong type.
        DataError: for an entry of ``DATASETS.COCO_SETS`` that is no data set.
    """
    check_file(config_file)
    cfg = get_cfg()
    wrong = (KeyError, ValueError, AssertionError)
    with refusing(f"config file {config_file!r}: ", *wrong, TypeError, OSError):
        cfg.merge_from_file(config_file)
    mend = "; overrides are KEY VALUE pairs of keys that the config has"
    with refusing("command-line override: ", *wrong, mend=mend):
        cfg.merge_from_list(list(opts))
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    register_coco_sets(cfg.DATASETS.COCO_SETS)
    cfg.freeze()
    return cfg
