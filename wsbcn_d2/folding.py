"""Folding for deployment: the same outputs without WS and without the batch half of BCN.

A convolution followed by constant statistics is a convolution: y = a (w * x + b) + s per channel.
So weights are standardized once, and every batch norm that follows a convolution in evaluation
(the batch half of a BCN included) goes into its weight and bias. BCN leaves ``nn.GroupNorm``
with its affine per group spread over the channels; a batch norm alone leaves nothing.
"""

import collections
import copy
import itertools

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torch.nn.utils import parametrize

from .layers import BatchChannelNorm2d
from .layers.reparametrized_conv import ReparametrizedConv2d

__all__ = ["fold", "lazy_state_dict", "stock_state_dict"]


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """A copy of ``model`` for inference, of Detectron2's and PyTorch's own layers.

    Outputs equal those of ``model.eval()`` up to rounding. Convolutions are found as
    :class:`detectron2.layers.Conv2d` with a norm, and as a convolution directly before a norm in
    an ``nn.Sequential`` (RetinaNet's towers). A norm that follows no convolution, or one that is
    shared in a way that leaves no single place to fold into, stays as it is.

    The copy is for inference: it holds no running estimates to train on.

    Args:
        model: any module; left as it is.

    Returns:
        The folded copy, in evaluation mode.

    Raises:
        ValueError: if a batch norm to be folded keeps no running statistics, or a hook makes the
            weight of a convolution.
    """
    _refuse_hooked(model)
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name)
    pairs = _pairs(model)
    for module in list(model.modules()):
        if isinstance(module, ReparametrizedConv2d):
            _make_plain(module)
    group_norms: dict[nn.Module, nn.Module] = {}  # of shared norms too
    for conv, parent, name in pairs:
        norm = parent._modules[name]
        if isinstance(norm, BatchChannelNorm2d):
            _fold_into(conv, norm.bn)
            if norm not in group_norms:
                group_norms[norm] = _group_norm(norm)
            rest = group_norms[norm]
        else:
            _fold_into(conv, norm)
            rest = nn.Identity() if isinstance(parent, nn.Sequential) else None
        setattr(parent, name, rest)
    return model


def stock_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The folded state dict of a model, for stock configs without this plugin.

    A model of GN and WS loads, exactly, wherever its config names the stock builders: folding
    changes no key. Detectron2 builds a convolution that has a norm without a bias, though, and
    the batch half of a BCN shifts every channel by itself, which a group norm with no bias
    before it cannot express. So batch norms do not fit; see :func:`lazy_state_dict`.

    Args:
        model: the model to fold; left as it is.

    Returns:
        The state dict, detached.

    Raises:
        ValueError: if folding changes the keys.
    """
    state = fold(model).state_dict()
    added = sorted(set(state) - set(model.state_dict()))
    if added:
        raise ValueError(
            f"folding its batch norms gives this model {len(added)} biases ({added[0]}, ...) "
            "that no stock config builds; only models of GN and WS fit stock YAML configs"
        )
    return {name: value.detach() for name, value in state.items()}


def lazy_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The folded state dict of a BCN model, for a stock LazyConfig without this plugin.

    A LazyConfig may give a callable as norm. With ::

        norm=lambda channels: nn.Sequential(FrozenBatchNorm2d(channels), nn.GroupNorm(32, channels))

    in place of ``"BCN"`` plain Detectron2 has a place for the shifts: the frozen batch norm. It
    costs an elementwise pass per layer, which the model that :func:`fold` returns does not.

    Args:
        model: the model to fold; left as it is.

    Returns:
        The state dict, detached.
    """
    model = fold(model)
    state = {name: value.detach() for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, Conv2d) and type(module.norm) is nn.GroupNorm:
            bias = state.pop(f"{name}.bias", None)
            bias = torch.zeros_like(state[f"{name}.norm.bias"]) if bias is None else bias
            for key in ("weight", "bias"):
                state[f"{name}.norm.1.{key}"] = state.pop(f"{name}.norm.{key}")
            frozen = FrozenBatchNorm2d(len(bias))  # mean 0, variance 1 - eps: the identity
            frozen.bias = bias
            for key, value in frozen.to(bias).state_dict().items():
                state[f"{name}.norm.0.{key}"] = value
    return state


def _refuse_hooked(model: nn.Module) -> None:
    for name, module in model.named_modules():
        made = isinstance(module, nn.Conv2d) and "weight" not in module._parameters
        if made and not parametrize.is_parametrized(module, "weight"):
            raise ValueError(
                f"the weight of {name!r} is made by a hook, before each forward: make it a "
                "parameter first (torch.nn.utils.remove_weight_norm, remove_spectral_norm)"
            )


def _pairs(model):
    """(convolution, parent of the norm after it, the norm's name) for everything foldable."""
    pairs = []
    for module in model.modules():
        if isinstance(module, Conv2d) and _foldable(module.norm):
            pairs.append((module, module, "norm"))
        if isinstance(module, nn.Sequential):
            for (_, conv), (name, norm) in itertools.pairwise(module._modules.items()):
                own = getattr(conv, "norm", None), getattr(conv, "activation", None)
                if isinstance(conv, nn.Conv2d) and own == (None, None) and _foldable(norm):
                    pairs.append((conv, module, name))
    # A convolution with several norms (one tower, a norm per level) has no single affine map.
    norms = collections.Counter(id(conv) for conv, _, _ in pairs)
    return [pair for pair in pairs if norms[id(pair[0])] == 1]


def _foldable(norm) -> bool:
    return isinstance(norm, (BatchChannelNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm)) or (
        type(norm) is FrozenBatchNorm2d
    )


def _make_plain(conv: ReparametrizedConv2d) -> None:
    weight_of, parameters = conv.recipe()
    _set_weight(conv, weight_of(*parameters))
    for name in ("ws_formula", "ws_eps"):
        vars(conv).pop(name, None)
    conv._parameters.pop("weight_g", None)
    conv.__class__ = Conv2d


def _set_weight(conv: nn.Conv2d, weight: torch.Tensor) -> None:
    # A new parameter: the old one may be another convolution's too.
    conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)


def _fold_into(conv: nn.Conv2d, bn: nn.Module) -> None:
    if bn.running_mean is None:
        raise ValueError(
            "a batch norm without running statistics normalizes by each batch: nothing to fold"
        )
    # In float64, so that folding rounds once.
    scale = (bn.running_var.double() + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight
    bias = -bn.running_mean * scale
    if bn.bias is not None:
        bias = bias + bn.bias
    if conv.bias is not None:
        bias = bias + conv.bias * scale
    dtype = conv.weight.dtype
    _set_weight(conv, (conv.weight * scale.view(-1, 1, 1, 1)).to(dtype))
    conv.bias = nn.Parameter(bias.to(dtype), requires_grad=conv.weight.requires_grad)


def _group_norm(norm: BatchChannelNorm2d) -> nn.GroupNorm:
    per_group = norm.num_channels // norm.num_groups
    out = nn.GroupNorm(norm.num_groups, norm.num_channels, eps=norm.eps).to(norm.weight)
    out.weight.copy_(norm.weight.repeat_interleave(per_group))
    out.bias.copy_(norm.bias.repeat_interleave(per_group))
    return out.requires_grad_(norm.weight.requires_grad).eval()
