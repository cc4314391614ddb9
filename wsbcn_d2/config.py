"""Config keys of this project, all in nodes of its own."""

from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg

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
    # Which standardization: "unbiased" (authors' BCN+WS weights), "unbiased_std" (authors' GN+WS
    # weights, their detectors, mmdetection) or "biased" (the paper's equation, timm). It must be
    # the one that MODEL.WEIGHTS was trained with.
    cfg.MODEL.WS.FORMULA = "unbiased"
    # Stabilizer of the standardization.
    cfg.MODEL.WS.EPS = 1e-5

    cfg.MODEL.BCN = CfgNode()
    # How far the running estimates of "BCN" and "EstBN" move towards each batch, in [0, 1].
    cfg.MODEL.BCN.UPDATE_RATE = 0.01
    # "constant", or "lr": the rate follows the learning rate's factor (lr / base lr).
    cfg.MODEL.BCN.UPDATE_RATE_SCHEDULE = "constant"
    # Average the running estimates over all processes after every step.
    cfg.MODEL.BCN.SYNC_ESTIMATES = True


def get_cfg() -> CfgNode:
    """Detectron2's default config with this project's keys added.

    Returns:
        CfgNode: a new, unfrozen config.
    """
    cfg = get_detectron2_cfg()
    add_wsbcn_config(cfg)
    return cfg
