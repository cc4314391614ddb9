"""Faster, Mask and Cascade Mask R-CNN as the authors' release sets them up."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    StandardROIHeads,
)

from wsbcn_d2.modeling import WSFastRCNNConvFCHead, WSMaskRCNNConvUpsampleHead


def _pooler(size):
    return L(ROIPooler)(
        output_size=size,
        scales=(1 / 4, 1 / 8, 1 / 16, 1 / 32),
        sampling_ratio=2,
        pooler_type="ROIAlign",
    )


def _box_head(norm, ws):
    return L(WSFastRCNNConvFCHead if ws else FastRCNNConvFCHead)(
        input_shape=L(ShapeSpec)(channels=256, height=7, width=7),
        conv_dims=[256, 256, 256, 256],
        fc_dims=[1024],
        conv_norm=norm,
        **ws,
    )


def _box_predictor(num_classes, weights=(10, 10, 5, 5), **options):
    return L(FastRCNNOutputLayers)(
        input_shape=L(ShapeSpec)(channels=1024),
        box2box_transform=L(Box2BoxTransform)(weights=weights),
        num_classes=num_classes,
        test_score_thresh=0.05,
        smooth_l1_beta=1.0,
        **options,
    )


def _matcher(iou):
    return L(Matcher)(thresholds=[iou], labels=[0, 1], allow_low_quality_matches=False)


def rcnn(
    backbone,
    *,
    head_norm,
    ws_formula=None,
    mask=False,
    cascade=False,
    proposals=1000,
    pixel_mean,
    pixel_std,
    input_format,
):
    """A lazy ``GeneralizedRCNN``.

    Args:
        backbone: as of ``resnet_fpn``.
        head_norm: of box and mask head, a name or a callable; "" for none.
        ws_formula: None for heads with plain convolutions.
        mask, cascade: with a mask head; with three box heads.
        proposals: per image, kept in training.
        pixel_mean, pixel_std, input_format: those of the backbone's weights.
    """
    ws = {"ws_formula": ws_formula} if ws_formula else {}
    roi_heads = L(StandardROIHeads)(
        num_classes=80,
        batch_size_per_image=512,
        positive_fraction=0.25,
        proposal_matcher=_matcher(0.5),
        box_in_features=["p2", "p3", "p4", "p5"],
        box_pooler=_pooler(7),
        box_head=_box_head(head_norm, ws),
        box_predictor=_box_predictor("${..num_classes}"),
    )
    if cascade:
        for name in ("box_head", "box_predictor", "proposal_matcher"):
            roi_heads.pop(name)
        roi_heads.update(
            _target_=CascadeROIHeads,
            box_heads=[_box_head(head_norm, ws) for _ in range(3)],
            box_predictors=[
                _box_predictor(
                    "${...num_classes}", weights=(xy, xy, wh, wh), cls_agnostic_bbox_reg=True
                )
                for xy, wh in ((10, 5), (20, 10), (30, 15))
            ],
            proposal_matchers=[_matcher(iou) for iou in (0.5, 0.6, 0.7)],
        )
    if mask:
        roi_heads.update(
            mask_in_features=["p2", "p3", "p4", "p5"],
            mask_pooler=_pooler(14),
            mask_head=L(WSMaskRCNNConvUpsampleHead if ws else MaskRCNNConvUpsampleHead)(
                input_shape=L(ShapeSpec)(channels=256, height=14, width=14),
                num_classes="${..num_classes}",
                conv_dims=[256, 256, 256, 256, 256],  # the last is the deconvolution's
                conv_norm=head_norm,
                **ws,
            ),
        )
    return L(GeneralizedRCNN)(
        backbone=backbone,
        proposal_generator=L(RPN)(
            in_features=["p2", "p3", "p4", "p5", "p6"],
            head=L(StandardRPNHead)(in_channels=256, num_anchors=3),
            anchor_generator=L(DefaultAnchorGenerator)(
                sizes=[[32], [64], [128], [256], [512]],
                aspect_ratios=[0.5, 1.0, 2.0],
                strides=[4, 8, 16, 32, 64],
                offset=0.5,
            ),
            anchor_matcher=L(Matcher)(
                thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True
            ),
            box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_topk=(2000, 1000),
            post_nms_topk=(proposals, 1000),
            nms_thresh=0.7,
            anchor_boundary_thresh=0,
            smooth_l1_beta=1 / 9,
        ),
        roi_heads=roi_heads,
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
        input_format=input_format,
    )
