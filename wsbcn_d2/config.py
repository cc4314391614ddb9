"""Config keys of this project, all in nodes of its own."""

from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg

from .layers import DEFAULT_UPDATE_RATE

__all__ = ["add_wsbcn_config", "get_cfg"]


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

    cfg.MODEL.BCN = CfgNode()
    # How far the running estimates of "BCN" and "EstBN" move towards each batch, in [0, 1]; without
    # WS activations move faster, and 0.1 is better.
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


def get_cfg() -> CfgNode:
    """Detectron2's default config with this project's keys added.

    Returns:
        CfgNode: a new, unfrozen config.
    """
    cfg = get_detectron2_cfg()
    add_wsbcn_config(cfg)
    return cfg
