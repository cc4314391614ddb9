"""Detectron2's box and mask heads with weight-standardized convolutions.

Convolutions with a norm are converted; fully connected layers, the mask head's deconvolution and
predictor, which have none, stay plain.
"""

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_BOX_HEAD_REGISTRY, ROI_HEADS_REGISTRY, ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    MaskRCNNConvUpsampleHead,
    Res5ROIHeads,
)

from .build import standardize, ws_options

__all__ = ["WSFastRCNNConvFCHead", "WSMaskRCNNConvUpsampleHead", "WSRes5ROIHeads"]


@ROI_BOX_HEAD_REGISTRY.register()
class WSFastRCNNConvFCHead(FastRCNNConvFCHead):
    """``FastRCNNConvFCHead`` with WS in its convolutions (4conv1fc: all four)."""

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        ws_kind: str = "ws",
        ws_formula: str = "unbiased",
        ws_eps: float = 1e-5,
        bcn_update_rate: float | None = None,
        **kwargs,
    ):
        """
        Args:
            input_shape: shape of the pooled feature.
            ws_kind, ws_formula, ws_eps: see :func:`wsbcn_d2.layers.convert_convs`.
            bcn_update_rate: rate of the norms' running estimates; None keeps the norm's own.
            **kwargs: those of :class:`FastRCNNConvFCHead` (``conv_dims``, ``conv_norm``, ...).
        """
        super().__init__(input_shape, **kwargs)
        standardize(
            self,
            ws_kind=ws_kind,
            ws_formula=ws_formula,
            ws_eps=ws_eps,
            bcn_update_rate=bcn_update_rate,
        )

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {**super().from_config(cfg, input_shape), **ws_options(cfg)}


@ROI_MASK_HEAD_REGISTRY.register()
class WSMaskRCNNConvUpsampleHead(MaskRCNNConvUpsampleHead):
    """``MaskRCNNConvUpsampleHead`` with WS in its ``mask_fcn`` convolutions."""

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        ws_kind: str = "ws",
        ws_formula: str = "unbiased",
        ws_eps: float = 1e-5,
        bcn_update_rate: float | None = None,
        **kwargs,
    ):
        """
        Args:
            input_shape: shape of the pooled feature.
            ws_kind, ws_formula, ws_eps: see :func:`wsbcn_d2.layers.convert_convs`.
            bcn_update_rate: rate of the norms' running estimates; None keeps the norm's own.
            **kwargs: those of :class:`MaskRCNNConvUpsampleHead`.
        """
        super().__init__(input_shape, **kwargs)
        standardize(
            self,
            ws_kind=ws_kind,
            ws_formula=ws_formula,
            ws_eps=ws_eps,
            bcn_update_rate=bcn_update_rate,
        )

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {**super().from_config(cfg, input_shape), **ws_options(cfg)}


@ROI_HEADS_REGISTRY.register()
class WSRes5ROIHeads(Res5ROIHeads):
    """``Res5ROIHeads`` (C4 models) with WS in its res5 stage."""

    @configurable
    def __init__(
        self,
        *,
        ws_kind: str = "ws",
        ws_formula: str = "unbiased",
        ws_eps: float = 1e-5,
        bcn_update_rate: float | None = None,
        **kwargs,
    ):
        """
        Args:
            ws_kind, ws_formula, ws_eps: see :func:`wsbcn_d2.layers.convert_convs`.
            bcn_update_rate: rate of the norms' running estimates; None keeps the norm's own.
            **kwargs: those of :class:`Res5ROIHeads`.
        """
        super().__init__(**kwargs)
        standardize(
            self.res5,
            ws_kind=ws_kind,
            ws_formula=ws_formula,
            ws_eps=ws_eps,
            bcn_update_rate=bcn_update_rate,
        )

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {**super().from_config(cfg, input_shape), **ws_options(cfg)}
