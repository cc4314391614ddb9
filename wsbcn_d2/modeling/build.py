"""From config keys to layer options."""

from collections.abc import Iterable

from detectron2.config import CfgNode
from torch import nn

from ..layers import convert_convs
from .parts import standardize_parts

__all__ = ["standardize", "standardize_by_config", "ws_options"]


def ws_options(cfg: CfgNode) -> dict:
    """``MODEL.WS`` as the options of :func:`standardize`.

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
    }


def standardize(
    module: nn.Module,
    *,
    ws_kind: str = "ws",
    ws_formula: str = "unbiased",
    ws_eps: float = 1e-5,
    parts: Iterable[str] = (),
) -> nn.Module:
    """Apply WS, WN or CWN to the normalized convolutions of a module.

    Args:
        module: converted in place by :func:`wsbcn_d2.layers.convert_convs`.
        ws_kind: one of ``wsbcn_d2.layers.WS_KINDS``.
        ws_formula, ws_eps: see :func:`wsbcn_d2.layers.standardize_weight`.
        parts: which, by :func:`standardize_parts`; empty for all of Detectron2's own.

    Returns:
        ``module``.
    """
    if parts:
        return standardize_parts(module, parts, kind=ws_kind, formula=ws_formula, eps=ws_eps)
    return convert_convs(module, kind=ws_kind, formula=ws_formula, eps=ws_eps)


def standardize_by_config(module: nn.Module, cfg: CfgNode) -> nn.Module:
    """:func:`standardize` with the options of a config."""
    return standardize(module, **ws_options(cfg))
