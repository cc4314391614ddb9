"""Detectron2's box and mask heads with weight-standardized convolutions.

Convolutions with a norm are converted; fully connected layers, the mask head's deconvolution and
predictor, which have none, stay plain.
"""

from detectron2.config import configurable
from detectron2.modeling import ROI_BOX_HEAD_REGISTRY, ROI_HEADS_REGISTRY, ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    MaskRCNNConvUpsampleHead,
    Res5ROIHeads,
)

from .build import standardize, ws_options

__all__ = ["WSFastRCNNConvFCHead", "WSMaskRCNNConvUpsampleHead", "WSRes5ROIHeads"]


class _Standardized:
    """Before a Detectron2 head among the bases: converts what that has built."""

    _part = ""  # of the head: the name of a submodule, or all

    @configurable
    def __init__(
        self,
        *args,
        ws_kind: str = "ws",
        ws_formula: str = "unbiased",
        ws_eps: float = 1e-5,
        **kwargs,
    ):
        """
        Args:
            ws_kind, ws_formula, ws_eps: see :func:`wsbcn_d2.layers.convert_convs`.
            *args, **kwargs: those of the stock head.
        """
        super().__init__(*args, **kwargs)
        standardize(
            self.get_submodule(self._part),
            ws_kind=ws_kind,
            ws_formula=ws_formula,
            ws_eps=ws_eps,
        )

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {**super().from_config(cfg, input_shape), **ws_options(cfg)}


@ROI_BOX_HEAD_REGISTRY.register()
class WSFastRCNNConvFCHead(_Standardized, FastRCNNConvFCHead):
    """``FastRCNNConvFCHead`` with WS in its convolutions (4conv1fc: all four)."""


@ROI_MASK_HEAD_REGISTRY.register()
class WSMaskRCNNConvUpsampleHead(_Standardized, MaskRCNNConvUpsampleHead):
    """``MaskRCNNConvUpsampleHead`` with WS in its ``mask_fcn`` convolutions."""


@ROI_HEADS_REGISTRY.register()
class WSRes5ROIHeads(_Standardized, Res5ROIHeads):
    """``Res5ROIHeads`` (C4 models) with WS in its res5 stage."""

    _part = "res5"
