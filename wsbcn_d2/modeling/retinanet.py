"""RetinaNet whose head convolutions are weight-standardized.

Detectron2's head keeps its norms beside plain ``nn.Conv2d``, where ``WSConv2d.convert`` cannot see
that a convolution is normalized, and its v0.6 first tries the norm on one channel, which a group
norm refuses. Parameters and state-dict keys are those of the stock head.
"""

import logging

import torch
from detectron2.config import configurable
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import nn

from ..layers import EstimatedBatchNorm2d, convert_convs, set_update_rate, standardize_once
from .build import ws_options

__all__ = ["WSRetinaNet", "WSRetinaNetHead"]


def _norm_factory(norm):
    if not norm or norm in ("BN", "SyncBN"):  # the stock head makes one per level of these
        return norm
    return lambda channels: nn.Identity() if channels == 1 else get_norm(norm, channels)


class WSRetinaNetHead(RetinaNetHead):
    """``RetinaNetHead`` with WS in every convolution that a norm follows.

    The head runs on all FPN levels. GN has no statistics that they would share; the running
    estimates of BCN and EstBN are those of a mixture of levels.
    """

    @configurable
    def __init__(
        self,
        *,
        norm="",
        ws_kind: str = "ws",
        ws_formula: str = "unbiased",
        ws_eps: float = 1e-5,
        bcn_update_rate: float | None = None,
        **kwargs,
    ):
        """
        Args:
            norm (str or callable): of the subnets' convolutions; without one, none is standardized.
            ws_kind, ws_formula, ws_eps: see :func:`wsbcn_d2.layers.convert_convs`.
            bcn_update_rate: rate of the norms' running estimates; None keeps the norm's own.
            **kwargs: those of :class:`RetinaNetHead`.
        """
        super().__init__(norm=_norm_factory(norm), **kwargs)
        for subnet in (self.cls_subnet, self.bbox_subnet):
            for i, conv in enumerate(subnet):
                if norm and isinstance(conv, nn.Conv2d):
                    subnet[i] = _reparametrized(conv, kind=ws_kind, formula=ws_formula, eps=ws_eps)
        if bcn_update_rate is not None:
            set_update_rate(self, bcn_update_rate)
        if any(isinstance(module, EstimatedBatchNorm2d) for module in self.modules()):
            logging.getLogger(__name__).warning(
                f"The running estimates of {norm!r} in the RetinaNet head mix all FPN levels: "
                "MODEL.RETINANET.NORM 'GN' has none"
            )

    # Not forward, which then could not be scripted: TorchScript knows no super().
    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        with standardize_once(self):  # not once for each level
            return super().__call__(*args, **kwargs)

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {**super().from_config(cfg, input_shape), **ws_options(cfg)}


def _reparametrized(conv: nn.Conv2d, **options) -> Conv2d:
    """Detectron2's convolution on the same parameters, reparametrized as if it carried the norm."""
    result = Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        norm=nn.Identity(),
    )
    result.weight, result.bias = conv.weight, conv.bias  # initialized as the stock head does
    convert_convs(result, **options)
    result.norm = None  # the one that follows it in the subnet
    return result


@META_ARCH_REGISTRY.register()
class WSRetinaNet(RetinaNet):
    """``RetinaNet`` with :class:`WSRetinaNetHead`; WS in the backbone is the backbone's own."""

    @classmethod
    def from_config(cls, cfg):
        # The stock method builds the stock head, which must not see the norm (module docstring).
        stock = cfg.clone()
        stock.defrost()
        stock.MODEL.RETINANET.NORM = ""
        arguments = super().from_config(stock)
        shapes = arguments["backbone"].output_shape()
        shapes = [shapes[name] for name in cfg.MODEL.RETINANET.IN_FEATURES]
        arguments["head"] = WSRetinaNetHead(cfg, shapes)
        return arguments
