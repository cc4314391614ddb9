"""RetinaNet as in Detectron2, with norm and WS in the head's convolutions."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch import RetinaNet

from wsbcn_d2.modeling import WSRetinaNetHead


def retinanet(backbone, *, head_norm, ws_formula, pixel_mean, pixel_std, input_format):
    """A lazy ``RetinaNet``.

    Args:
        backbone: as of ``resnet_fpn(..., retinanet=True)``.
        head_norm: of the head's subnets; one that has no running estimates.
        ws_formula: of the head's convolutions.
        pixel_mean, pixel_std, input_format: those of the backbone's weights.
    """
    return L(RetinaNet)(
        backbone=backbone,
        head=L(WSRetinaNetHead)(
            input_shape=[L(ShapeSpec)(channels=256) for _ in range(5)],
            num_classes="${..num_classes}",
            num_anchors=9,
            conv_dims=[256, 256, 256, 256],
            norm=head_norm,
            ws_formula=ws_formula,
        ),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[
                [x, round(x * 2 ** (1 / 3), 4), round(x * 2 ** (2 / 3), 4)]
                for x in (32, 64, 128, 256, 512)
            ],
            aspect_ratios=[0.5, 1.0, 2.0],
            strides=[8, 16, 32, 64, 128],
            offset=0.0,
        ),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        anchor_matcher=L(Matcher)(
            thresholds=[0.4, 0.5], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        num_classes=80,
        head_in_features=["p3", "p4", "p5", "p6", "p7"],
        smooth_l1_beta=0.0,
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
        input_format=input_format,
    )
