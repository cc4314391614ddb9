"""WS in any part of any model, chosen by module names, once the model is built: ``MODEL.WS.PARTS``.

Detectron2's ``build_model`` is replaced, by identity, in every loaded module, as ``get_norm`` is:
whatever script, trainer or predictor builds a model from a config, it is prepared here.
"""

import functools
import itertools
import logging
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

import detectron2.modeling.meta_arch.build as meta_arch
import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, DeformConv, ModulatedDeformConv
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..layers import (
    BatchChannelNorm2d,
    EstimatedBatchNorm2d,
    bcn_groups,
    rebind,
    set_update_rate,
    skip_first_batch_init,
)
from ..layers.reparametrized_conv import ReparametrizedConv2d
from ..layers.weight_normalization import conv_class
from .recomputation import modules_named

__all__ = ["prepare", "register_preparation", "set_estimates", "standardize_parts"]

_WILD = set("*?[")


def standardize_parts(
    model: nn.Module,
    patterns: Iterable[str],
    *,
    kind: str = "ws",
    formula: str = "unbiased",
    eps: float = 1e-5,
) -> nn.Module:
    """Standardize, in place, the convolutions of some parts of a model that a norm follows.

    Those are Detectron2's ``Conv2d`` with a norm, and convolutions (``nn.Conv2d`` too) whose
    parent's next child is a norm of their width: a ``Sequential``, RegNet's ``conv`` and ``bn``.
    Objects, parameters and names stay. How many were found, and what stays plain, is logged.

    Args:
        model: any.
        patterns: names of modules, see :func:`modules_named`; ``"*"`` is the whole model. What fits
            one that begins with ``!`` is left out. A convolution that is named in full is taken
            whether a norm can be seen to follow it or not.
        kind, formula, eps: see :func:`wsbcn_d2.layers.convert_convs`.

    Returns:
        ``model``.

    Raises:
        ValueError: a pattern that fits nothing, parts without a convolution to standardize, a
            deformable one with a norm; then nothing has been converted.
    """
    patterns = list(patterns)
    if not patterns:
        return model
    wanted = conv_class(kind)
    chosen = [pattern for pattern in patterns if not pattern.startswith("!")]
    inside = _below(model, chosen)
    inside -= _below(model, [pattern[1:] for pattern in patterns if pattern.startswith("!")])
    named = {pattern for pattern in chosen if not _WILD & set(pattern)}
    before_norms = set(_before_norms(model))
    take, plain, done = [], [], 0
    for name, module in model.named_modules():
        if name not in inside or not _convolves(module):
            continue
        normalized = getattr(module, "norm", None) is not None or module in before_norms
        if isinstance(module, ReparametrizedConv2d):
            done += 1
        elif not normalized and name not in named:
            plain.append(f"{name} (no norm)")
        elif isinstance(module, (DeformConv, ModulatedDeformConv)):
            raise ValueError(
                f"cannot standardize the deformable convolution {name!r}: leave its part out, "
                f"with {'!' + name.rpartition('.')[0]!r} or a pattern that does not fit it"
            )
        elif type(module) not in (Conv2d, nn.Conv2d):
            plain.append(f"{name} ({type(module).__name__})")
        elif module.padding_mode != "zeros":
            plain.append(f"{name} (padding {module.padding_mode})")
        elif module.weight[0].numel() < 2:
            plain.append(f"{name} (one element per filter)")
        else:
            take.append(module)
    if not take and not done and wanted is not None:
        what = f"; there are {', '.join(plain[:5])}" if plain else " and no convolution"
        raise ValueError(
            f"nothing to standardize in {', '.join(patterns)}: no convolution with a norm{what}"
        )
    for conv in take:
        if type(conv) is nn.Conv2d:
            conv.__class__ = Conv2d
            conv.norm = conv.activation = None
    if wanted is not None:
        wanted.adopt(take, formula, eps)
    stay = f"; plain stay {len(plain)}: {', '.join(plain)}" if plain else ""
    logging.getLogger(__name__).info(
        f"{kind.upper()} in {len(take) + done} of {len(take) + done + len(plain)} convolutions of "
        f"{', '.join(patterns)}{stay}"
    )
    return model


def _convolves(module: nn.Module) -> bool:
    """Whether a module is a convolution, also one of a class of its own (TridentNet's)."""
    if isinstance(module, (_ConvNd, DeformConv, ModulatedDeformConv)):
        return True
    weight = getattr(module, "weight", None)
    own = isinstance(weight, torch.Tensor) and weight.dim() == 4
    return own and getattr(module, "norm", None) is not None


def _below(model: nn.Module, patterns: Iterable[str]) -> set[str]:
    """Names of the modules that patterns fit, and of all within them."""
    names = modules_named(model, patterns)
    inside = tuple(f"{name}." for name in names)
    return {*names, *(name for name, _ in model.named_modules() if name.startswith(inside))}


def _before_norms(model: nn.Module) -> Iterator[nn.Module]:
    """Convolutions whose parent's next child is a norm of their width."""
    for parent in model.modules():
        for conv, norm in itertools.pairwise(parent.children()):
            if isinstance(conv, _ConvNd) and _width(norm) == conv.out_channels:
                yield conv


def _width(module: nn.Module) -> int | None:
    """Channels of a norm, which is known by its type's name; None for what is none."""
    if not fnmatchcase(type(module).__name__, "*[Nn]orm*"):
        return None
    if getattr(module, "normalized_shape", None):
        return module.normalized_shape[-1]
    for name in ("num_features", "num_channels"):
        if hasattr(module, name):
            return getattr(module, name)
    weight = getattr(module, "weight", None)  # Detectron2's CycleBatchNormList
    return None if weight is None else weight.numel()


def set_estimates(
    model: nn.Module, rate: float | None = None, first_batch_init: bool = True
) -> nn.Module:
    """Set the update rate of a model's running estimates, and how they start: the one place.

    A rate of 0 is warned of where no channel norm follows the held estimates.

    Args:
        model: changed in place.
        rate: ``MODEL.BCN.UPDATE_RATE``; None for what each norm has.
        first_batch_init: ``MODEL.BCN.FIRST_BATCH_INIT``.

    Returns:
        ``model``.

    Raises:
        ValueError: for a rate out of range.
    """
    if rate is not None:
        set_update_rate(model, rate)
    if rate == 0 and (alone := _without_channel_norm(model)):
        logging.getLogger(__name__).warning(
            f"{len(alone)} norms ({alone[0]}, ...) are EstBN at an update rate of 0: with their "
            "estimates held nothing normalizes; MODEL.BCN.UPDATE_RATE 0.01 lets them move"
        )
    return model if first_batch_init else skip_first_batch_init(model)


def _without_channel_norm(model: nn.Module) -> list[str]:
    """Names of norms on running estimates that are no part of a BCN."""
    inner = {id(m.bn) for m in model.modules() if isinstance(m, BatchChannelNorm2d)}
    norms = {n: m for n, m in model.named_modules() if isinstance(m, EstimatedBatchNorm2d)}
    return [name for name, norm in norms.items() if id(norm) not in inner]


def prepare(model: nn.Module, cfg: CfgNode) -> nn.Module:
    """Do to a built model what a config says of it as a whole, in place: parts and estimates.

    Raises:
        ValueError: see :func:`standardize_parts`.
    """
    ws, bcn = cfg.MODEL.WS, cfg.MODEL.BCN
    try:
        standardize_parts(model, ws.PARTS, kind=ws.KIND, formula=ws.FORMULA, eps=ws.EPS)
    except ValueError as error:
        raise ValueError(f"MODEL.WS.PARTS: {error}") from error
    return set_estimates(model, bcn.UPDATE_RATE, bcn.FIRST_BATCH_INIT)


def register_preparation() -> None:
    """Make Detectron2's ``build_model`` prepare what it builds; idempotent."""
    stock = meta_arch.build_model
    if hasattr(stock, "prepares"):
        return

    @functools.wraps(stock)
    def build_model(cfg):
        if "BCN" not in cfg.MODEL or "WS" not in cfg.MODEL:  # a stock config
            return stock(cfg)
        with bcn_groups(cfg.MODEL.BCN.NUM_GROUPS):
            model = stock(cfg)
        return prepare(model, cfg)

    build_model.prepares = True
    rebind(stock, build_model)
