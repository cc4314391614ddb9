"""Small models of every family that Detectron2 has, from stock builders, with BCN and WS by YAML.

Depth is that of the usual configs, so that convolutions are counted as there; widths are cut.
"""

import importlib
import sys
import types

import numpy as np
import torch
from conftest import TINY
from detectron2 import model_zoo
from detectron2.config import get_cfg as get_detectron2_cfg
from detectron2.config import instantiate
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks

from wsbcn_d2 import add_wsbcn_config
from wsbcn_d2.layers import BatchChannelNorm2d
from wsbcn_d2.modeling import standardize_parts

# Panoptic-DeepLab's package imports a reader of panoptic PNGs that no model needs.
panopticapi = types.ModuleType("panopticapi.utils")
panopticapi.rgb2id = None
sys.modules.setdefault("panopticapi", types.ModuleType("panopticapi"))
sys.modules.setdefault("panopticapi.utils", panopticapi)

NARROW = [
    *("MODEL.DEVICE", "cpu", "MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.WEIGHTS", ""),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "32", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "32", "MODEL.RESNETS.NORM", "BCN"),
    *("MODEL.WS.PARTS", "['*']"),
]
FPN = [
    *TINY,
    *NARROW,
    *("MODEL.FPN.NORM", "BCN", "MODEL.FPN.OUT_CHANNELS", "32"),
    *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", "1"),
    *("MODEL.ROI_BOX_HEAD.NORM", "BCN", "MODEL.ROI_MASK_HEAD.NORM", "BCN"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", "6", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3"),
    *("MODEL.SEM_SEG_HEAD.NORM", "BCN", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "32"),
]
DEEPLAB = [
    *NARROW,
    *("MODEL.META_ARCHITECTURE", "SemanticSegmentor"),
    *("MODEL.BACKBONE.NAME", "build_resnet_deeplab_backbone"),
    *("MODEL.RESNETS.STEM_TYPE", "deeplab", "MODEL.RESNETS.STRIDE_IN_1X1", "False"),
    *("MODEL.RESNETS.OUT_FEATURES", "['res2','res5']", "MODEL.RESNETS.RES5_DILATION", "2"),
    *("MODEL.SEM_SEG_HEAD.NORM", "BCN", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "32"),
    *("MODEL.SEM_SEG_HEAD.ASPP_CHANNELS", "32", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3"),
    *("MODEL.SEM_SEG_HEAD.LOSS_TYPE", "cross_entropy", "MODEL.BCN.NUM_GROUPS", "auto"),
]


def from_yaml(zoo, *options, project=None):
    """A family from the zoo's YAML (or from defaults), with a project's keys."""

    def make(norm="BCN", **_):
        cfg = get_detectron2_cfg()
        if project:
            name, add = project
            getattr(importlib.import_module(f"detectron2.projects.{name}"), add)(cfg)
        if zoo:
            cfg.merge_from_file(model_zoo.get_config_file(zoo))
        add_wsbcn_config(cfg)
        cfg.merge_from_list([norm if option == "BCN" else option for option in options])
        return build_model(cfg)

    return make


def from_python(zoo, change, parts=("*",)):
    """A family from the zoo's Python config; there, WS is a call."""

    def make(norm="BCN"):
        cfg = model_zoo.get_config(zoo)
        change(cfg.model, norm)
        return standardize_parts(instantiate(cfg.model), parts)

    return make


def _auto(norm):
    return norm if norm != "BCN" else lambda channels: BatchChannelNorm2d(channels, "auto")


def _regnet(model, norm):
    model.backbone.bottom_up.norm = _auto(norm)
    model.backbone.norm = _auto(norm)
    model.backbone.bottom_up.freeze_at = 0


def _fcos(model, norm):
    model.head.norm = norm
    model.backbone.bottom_up.stages.norm = model.backbone.bottom_up.stem.norm = norm
    model.backbone.norm = norm
    model.backbone.bottom_up.freeze_at = 0


FAMILIES = {
    "Mask R-CNN": from_yaml("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", *FPN),
    "Cascade R-CNN": from_yaml("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml", *FPN),
    "Keypoint R-CNN": from_yaml("COCO-Keypoints/Base-Keypoint-RCNN-FPN.yaml", *FPN),
    "Panoptic FPN": from_yaml("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml", *FPN),
    "Semantic FPN": from_yaml("Misc/semantic_R_50_FPN_1x.yaml", *FPN),
    "RetinaNet, stock head": from_yaml(
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        *FPN,
        *("MODEL.RETINANET.NORM", "BCN", "MODEL.RETINANET.NUM_CLASSES", "6"),
        *("MODEL.FPN.OUT_CHANNELS", "64"),  # more than one value a group on the last level
    ),
    "FCOS": from_python("COCO-Detection/fcos_R_50_FPN_1x.py", _fcos),
    "RegNetX": from_python(
        "COCO-InstanceSegmentation/mask_rcnn_regnetx_4gf_dds_fpn_1x.py", _regnet
    ),
    "RegNetY": from_python(
        "COCO-InstanceSegmentation/mask_rcnn_regnety_4gf_dds_fpn_1x.py", _regnet
    ),
    "DeepLab V3": from_yaml(
        None,
        *DEEPLAB,
        *("MODEL.SEM_SEG_HEAD.NAME", "DeepLabV3Head", "MODEL.SEM_SEG_HEAD.COMMON_STRIDE", "16"),
        *("MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res5']"),
        project=("deeplab", "add_deeplab_config"),
    ),
    "DeepLab V3+": from_yaml(
        None,
        *DEEPLAB,
        *("MODEL.SEM_SEG_HEAD.NAME", "DeepLabV3PlusHead"),
        *("MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res2','res5']"),
        *("MODEL.SEM_SEG_HEAD.PROJECT_FEATURES", "['res2']"),
        *("MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS", "[48]"),
        project=("deeplab", "add_deeplab_config"),
    ),
    "Panoptic-DeepLab": from_yaml(
        None,
        *DEEPLAB,
        *("MODEL.META_ARCHITECTURE", "PanopticDeepLab"),
        *("MODEL.SEM_SEG_HEAD.LOSS_TYPE", "hard_pixel_mining"),
        *("MODEL.SEM_SEG_HEAD.NAME", "PanopticDeepLabSemSegHead"),
        *("MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res2','res5']"),
        *("MODEL.SEM_SEG_HEAD.PROJECT_FEATURES", "['res2']"),
        *("MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS", "[48]"),
        *("MODEL.SEM_SEG_HEAD.HEAD_CHANNELS", "32", "MODEL.INS_EMBED_HEAD.HEAD_CHANNELS", "32"),
        *("MODEL.SEM_SEG_HEAD.USE_DEPTHWISE_SEPARABLE_CONV", "True"),
        *("MODEL.PANOPTIC_DEEPLAB.USE_DEPTHWISE_SEPARABLE_CONV", "True"),
        *("MODEL.INS_EMBED_HEAD.IN_FEATURES", "['res2','res5']"),
        *("MODEL.INS_EMBED_HEAD.PROJECT_FEATURES", "['res2']"),
        *("MODEL.INS_EMBED_HEAD.PROJECT_CHANNELS", "[48]"),
        *("MODEL.INS_EMBED_HEAD.CONVS_DIM", "32", "MODEL.INS_EMBED_HEAD.ASPP_CHANNELS", "32"),
        *("MODEL.INS_EMBED_HEAD.NORM", "BCN"),
        *("DATASETS.TRAIN", "('cityscapes_fine_panoptic_train',)"),
        project=("panoptic_deeplab", "add_panoptic_deeplab_config"),
    ),
    "PointRend": from_yaml(
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
        *FPN,
        *(
            "MODEL.ROI_HEADS.NAME",
            "StandardROIHeads",
            "MODEL.ROI_MASK_HEAD.NAME",
            "PointRendMaskHead",
        ),
        *("MODEL.ROI_MASK_HEAD.POOLER_TYPE", ""),
        *("MODEL.ROI_MASK_HEAD.FC_DIM", "32", "MODEL.ROI_MASK_HEAD.NUM_FC", "1"),
        *("MODEL.ROI_MASK_HEAD.OUTPUT_SIDE_RESOLUTION", "7"),
        *("MODEL.ROI_MASK_HEAD.IN_FEATURES", "['p2']", "MODEL.ROI_MASK_HEAD.POINT_HEAD_ON", "True"),
        *("MODEL.POINT_HEAD.NUM_CLASSES", "6", "MODEL.POINT_HEAD.FC_DIM", "32"),
        *("MODEL.POINT_HEAD.IN_FEATURES", "['p2']"),
        project=("point_rend", "add_pointrend_config"),
    ),
}


def a_batch(size=128, polygons=False):
    """One picture with two objects, and everything that any of the families is taught by."""
    corners = torch.tensor([[16.0, 16, 80, 72], [40, 48, 112, 120]])
    masks = torch.zeros(2, size, size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, corners.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    instances = Instances((size, size))
    instances.gt_boxes = Boxes(corners)
    instances.gt_classes = torch.tensor([0, 0])
    instances.gt_masks = BitMasks(masks)
    if polygons:
        outline = [
            [np.array([x0, y0, x1, y0, x1, y1, x0, y1])] for x0, y0, x1, y1 in corners.numpy()
        ]
        instances.gt_masks = PolygonMasks(outline)
    points = torch.full((2, 17, 3), 60.0)
    points[..., 2] = 2
    instances.gt_keypoints = Keypoints(points)
    weights = torch.ones(size, size)
    return [
        {
            "image": torch.randint(0, 256, (3, size, size)).to(torch.uint8),
            "height": size,
            "width": size,
            "instances": instances,
            "sem_seg": masks[0].long(),
            "sem_seg_weights": weights,
            "center": masks[0].float(),
            "center_weights": weights,
            "offset": torch.zeros(2, size, size),
            "offset_weights": weights,
        }
    ]
