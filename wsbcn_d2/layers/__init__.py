"""Layers and the names by which configs ask for them."""

from .batch_channel_norm import BatchChannelNorm2d, channel_norm
from .estimated_batch_norm import (
    DEFAULT_UPDATE_RATE,
    EstimatedBatchNorm2d,
    set_update_rate,
    skip_first_batch_init,
    update_estimates,
)
from .registry import NORM_REGISTRY, bcn_groups, rebind, register_norms, unregister_norms
from .reparametrized_conv import standardize_once
from .weight_normalization import WS_KINDS, CWNConv2d, WNConv2d, convert_convs, normalize_weight
from .weight_standardization import WS_FORMULAS, WSConv2d, standardize_weight

__all__ = [
    "DEFAULT_UPDATE_RATE",
    "NORM_REGISTRY",
    "WS_FORMULAS",
    "WS_KINDS",
    "BatchChannelNorm2d",
    "CWNConv2d",
    "EstimatedBatchNorm2d",
    "WNConv2d",
    "WSConv2d",
    "bcn_groups",
    "channel_norm",
    "convert_convs",
    "normalize_weight",
    "rebind",
    "register_norms",
    "set_update_rate",
    "skip_first_batch_init",
    "standardize_once",
    "standardize_weight",
    "unregister_norms",
    "update_estimates",
]
