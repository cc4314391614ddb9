"""From config keys to layer options."""

from detectron2.config import CfgNode
from torch import nn

from ..layers import convert_convs, set_update_rate

__all__ = ["standardize", "standardize_by_config", "ws_options"]


def ws_options(cfg: CfgNode) -> dict:
    """Read the ``MODEL.WS`` and ``MODEL.BCN`` options of a part of the model.

    Args:
        cfg: a config with the keys of :func:`wsbcn_d2.add_wsbcn_config`.

    Returns:
        dict: ``ws_kind`` (str), ``ws_formula`` (str), ``ws_eps`` (float) and ``bcn_update_rate``
        (float).

    Raises:
        KeyError: if the config lacks this project's keys.
    """
    if "WS" not in cfg.MODEL or "BCN" not in cfg.MODEL:
        raise KeyError(
            "the config has no MODEL.WS and MODEL.BCN: call wsbcn_d2.add_wsbcn_config(cfg) "
            "right after get_cfg()"
        )
    return {
        "ws_kind": cfg.MODEL.WS.KIND,
        "ws_formula": cfg.MODEL.WS.FORMULA,
        "ws_eps": cfg.MODEL.WS.EPS,
        "bcn_update_rate": cfg.MODEL.BCN.UPDATE_RATE,
    }


def standardize(
    module: nn.Module,
    *,
    ws_kind: str = "ws",
    ws_formula: str = "unbiased",
    ws_eps: float = 1e-5,
    bcn_update_rate: float | None = None,
) -> nn.Module:
    """Apply WS, WN or CWN to the normalized convolutions of a module; set its BCN update rate.

    Args:
        module: converted in place by :func:`wsbcn_d2.layers.convert_convs`.
        ws_kind: one of ``wsbcn_d2.layers.WS_KINDS``.
        ws_formula, ws_eps: see :func:`wsbcn_d2.layers.standardize_weight`.
        bcn_update_rate: rate of the running estimates; None leaves it alone.

    Returns:
        ``module``.
    """
    if bcn_update_rate is not None:
        set_update_rate(module, bcn_update_rate)
    return convert_convs(module, kind=ws_kind, formula=ws_formula, eps=ws_eps)


def standardize_by_config(module: nn.Module, cfg: CfgNode) -> nn.Module:
    """:func:`standardize` with the options of a config."""
    return standardize(module, **ws_options(cfg))
