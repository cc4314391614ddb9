"""Norms by name: ``NORM: "BCN"`` in any Detectron2 config.

Detectron2's ``get_norm`` keeps its names in a local dictionary, so the function itself is wrapped.
Modules import it by name; the wrapper therefore replaces the function, found by identity, in every
loaded module, and modules imported later receive the wrapper. Stock names keep their meaning.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from detectron2.layers import batch_norm
from fvcore.common.registry import Registry
from torch import nn

from .batch_channel_norm import DEFAULT_GROUPS, BatchChannelNorm2d
from .estimated_batch_norm import DEFAULT_UPDATE_RATE, EstimatedBatchNorm2d

__all__ = ["NORM_REGISTRY", "bcn_groups", "rebind", "register_norms", "unregister_norms"]

NORM_REGISTRY = Registry("NORM")
NORM_REGISTRY.__doc__ = """
Norms that a config names by a string, each a callable ``channels -> nn.Module``.
"""

# The names of Detectron2 (v0.6 and main) itself; only for the text of an error.
_STOCK_NAMES = (
    "BN",
    "SyncBN",
    "FrozenBN",
    "GN",
    "LN",
    "nnSyncBN",
    "naiveSyncBN",
    "naiveSyncBN_N",
)


_groups: ContextVar[int | str] = ContextVar("bcn_groups", default=DEFAULT_GROUPS)


@contextlib.contextmanager
def bcn_groups(num_groups: int | str | None) -> Iterator[None]:
    """Within, norms made by the names ``BCN``, ``BatchBCN`` and ``SyncBCN`` have so many groups.

    Args:
        num_groups: see :class:`BatchChannelNorm2d`; None for its default.
    """
    token = _groups.set(DEFAULT_GROUPS if num_groups is None else num_groups)
    try:
        yield
    finally:
        _groups.reset(token)


@NORM_REGISTRY.register()
def BCN(channels: int) -> nn.Module:
    """Batch-channel norm on estimates: for 1-2 images per step."""
    return BatchChannelNorm2d(channels, _groups.get(), update_rate=DEFAULT_UPDATE_RATE)


@NORM_REGISTRY.register()
def BatchBCN(channels: int) -> nn.Module:
    """Batch-channel norm on the batch's own statistics: for large batches."""
    return BatchChannelNorm2d(channels, _groups.get(), statistics="batch")


@NORM_REGISTRY.register()
def SyncBCN(channels: int) -> nn.Module:
    """Batch-channel norm on the statistics of all processes' batches."""
    return BatchChannelNorm2d(channels, _groups.get(), statistics="sync")


@NORM_REGISTRY.register()
def EstBN(channels: int) -> nn.Module:
    """Batch norm on running estimates, without the channel norm: for ablations."""
    return EstimatedBatchNorm2d(channels)


def _wrap(stock: Callable) -> Callable:
    @functools.wraps(stock)
    def get_norm(norm, out_channels):
        if not isinstance(norm, str):
            return stock(norm, out_channels)
        if out_channels == 1 and norm in ("GN", "BCN", "BatchBCN", "SyncBCN"):
            # Detectron2 v0.6 makes a norm of one channel to look at its type (RetinaNetHead, and so
            # FCOS), which groups would refuse.
            return nn.GroupNorm(1, 1)
        if norm in NORM_REGISTRY:
            return NORM_REGISTRY.get(norm)(out_channels)
        if norm and not _knows(stock, norm):
            names = [n for n in _STOCK_NAMES if _knows(stock, n)]
            names += [name for name, _ in NORM_REGISTRY]
            raise ValueError(
                f"unknown norm {norm!r}: use one of {', '.join(names)}, or '' for none"
            )
        return stock(norm, out_channels)

    get_norm.wraps_norm_registry = True
    return get_norm


def _knows(stock: Callable, name: str) -> bool:
    try:
        stock(name, 32)
    except KeyError:
        return False
    return True


def rebind(old: Callable, new: Callable) -> None:
    """Replace one function by another, by identity, in every loaded module."""
    for module in list(sys.modules.values()):
        # vars() rather than getattr(): some modules compute attributes, or import on access.
        namespace = getattr(module, "__dict__", {})
        for name in [name for name, value in list(namespace.items()) if value is old]:
            namespace[name] = new


def register_norms() -> None:
    """Make ``detectron2.layers.get_norm`` know the names of :data:`NORM_REGISTRY`.

    Runs on ``import wsbcn_d2``; idempotent; undone by :func:`unregister_norms`.
    """
    current = batch_norm.get_norm
    if not hasattr(current, "wraps_norm_registry"):
        rebind(current, _wrap(current))


def unregister_norms() -> None:
    """Give every loaded module Detectron2's own ``get_norm`` back."""
    current = batch_norm.get_norm
    if hasattr(current, "wraps_norm_registry"):
        rebind(current, current.__wrapped__)
