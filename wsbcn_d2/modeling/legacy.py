"""The box conventions of the authors' COCO detectors (maskrcnn-benchmark), for evaluating them.

There, boxes are inclusive pixel ranges: a width is x2 - x1 + 1. With x2 and y2 one larger, boxes
are Detectron2's, box coding and overlaps are the same, and three things remain to be matched:

  * anchors are made from a stride x stride window whose sides are *rounded* before they are scaled
    (`RoundedAnchorGenerator`; with ``MODEL.ANCHOR_GENERATOR.OFFSET: 0.5``),
  * ROIAlign takes the inclusive corner, without the one (`LegacyROIHeads`), and
  * it is the old one: ``POOLER_TYPE: "ROIAlign"``, ``POOLER_SAMPLING_RATIO: 2``.

Not matched: pasting masks into the image (legacy paste and Detectron2's agree to a mean IoU of .955
on smooth ellipses), the resized image's size (truncated there, rounded here: up to 3 pixels), the
clipping of boxes to W - 1, and up to one resized pixel in x2 and y2 when boxes are scaled back.
"""

import torch
from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.modeling.anchor_generator import (
    ANCHOR_GENERATOR_REGISTRY,
    BufferList,
    DefaultAnchorGenerator,
)
from detectron2.modeling.poolers import ROIPooler
from torch import nn

__all__ = ["LegacyROIHeads", "RoundedAnchorGenerator"]


@ANCHOR_GENERATOR_REGISTRY.register()
class RoundedAnchorGenerator(DefaultAnchorGenerator):
    """Cell anchors of maskrcnn-benchmark's ``generate_anchors``, in Detectron2's box convention.

    Configured by the same keys as ``DefaultAnchorGenerator``. A size that is no multiple of its
    level's stride is scaled just the same.
    """

    def _calculate_anchors(self, sizes, aspect_ratios):
        cells = [
            self._rounded(stride, of_level, ratios)
            for stride, of_level, ratios in zip(self.strides, sizes, aspect_ratios, strict=True)
        ]
        return BufferList(cells)

    @staticmethod
    def _rounded(stride, sizes, aspect_ratios):
        """(len(aspect_ratios) * len(sizes), 4) boxes around (0, 0), ratio by ratio."""
        cells = []
        for ratio in aspect_ratios:
            # Python rounds half to even, as numpy does there.
            width = round((stride * stride / ratio) ** 0.5)
            height = round(width * ratio)
            for size in sizes:
                w, h = width * size / stride, height * size / stride
                cells.append([-w / 2, -h / 2, w / 2, h / 2])
        return torch.tensor(cells)


class _InclusiveCorner(nn.Module):
    """Pools boxes whose x2 and y2 have been made one larger than ``pool`` knows them."""

    def __init__(self, pool):
        super().__init__()
        self.pool = pool

    def forward(self, features, rois):
        """
        Args:
            features: (N, C, H, W). rois: (M, 5), index and box in image coordinates.

        Returns:
            Tensor of shape (M, C, height, width).
        """
        return self.pool(features, rois - rois.new_tensor([0, 0, 0, 1, 1]))


def _inclusive(pooler: ROIPooler) -> ROIPooler:
    # The assignment to levels, before this, uses x2 - x1 + 1: Detectron2's widths are right for it.
    pooler.level_poolers = nn.ModuleList(_InclusiveCorner(p) for p in pooler.level_poolers)
    return pooler


@ROI_HEADS_REGISTRY.register()
class LegacyROIHeads(StandardROIHeads):
    """``StandardROIHeads`` that pools from the inclusive corner; parameters are the same."""

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        parts = super()._init_box_head(cfg, input_shape)
        return {**parts, "box_pooler": _inclusive(parts["box_pooler"])}

    @classmethod
    def _init_mask_head(cls, cfg, input_shape):
        parts = super()._init_mask_head(cfg, input_shape)
        if parts.get("mask_pooler") is not None:
            parts["mask_pooler"] = _inclusive(parts["mask_pooler"])
        return parts
