"""RetinaNet whose head convolutions are weight-standardized.

Detectron2's head keeps its norms beside plain ``nn.Conv2d``, where ``WSConv2d.convert`` cannot see
that a convolution is normalized; :func:`standardize_parts` does. Parameters and state-dict keys are
those of the stock head.
"""

import logging
from collections.abc import Callable

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import nn

from ..layers import EstimatedBatchNorm2d, standardize_once
from .build import ws_options
from .parts import standardize_parts

__all__ = ["WSRetinaNet", "WSRetinaNetHead"]


class WSRetinaNetHead(RetinaNetHead):
    """``RetinaNetHead`` with WS in every convolution that a norm follows.

    The head runs on all FPN levels. GN has no statistics that they would share; the running
    estimates of BCN and EstBN are those of a mixture of levels.
    """

    @configurable
    def __init__(
        self,
        *,
        norm: str | Callable[[int], nn.Module] = "",
        ws_kind: str = "ws",
        ws_formula: str = "unbiased",
        ws_eps: float = 1e-5,
        **kwargs,
    ):
        """
        Args:
            norm (str or callable): of the subnets' convolutions; without one, none is standardized.
            ws_kind, ws_formula, ws_eps: see :func:`wsbcn_d2.layers.convert_convs`.
            **kwargs: those of :class:`RetinaNetHead`.
        """
        super().__init__(norm=norm, **kwargs)
        if norm:
            towers = ("cls_subnet", "bbox_subnet")
            standardize_parts(self, towers, kind=ws_kind, formula=ws_formula, eps=ws_eps)
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
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict:
        return {**super().from_config(cfg, input_shape), **ws_options(cfg)}


@META_ARCH_REGISTRY.register()
class WSRetinaNet(RetinaNet):
    """``RetinaNet`` with :class:`WSRetinaNetHead`; WS in the backbone is the backbone's own."""

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        arguments = super().from_config(cfg)
        shapes = arguments["backbone"].output_shape()
        shapes = [shapes[name] for name in cfg.MODEL.RETINANET.IN_FEATURES]
        arguments["head"] = WSRetinaNetHead(cfg, shapes)
        return arguments
