"""The zoo: detectors x backbones x variants x images per GPU."""

import os
import re
from typing import NamedTuple

from .backbone import resnet_fpn
from .protocol import GPUS, coco, multi_step, sgd, train_options
from .rcnn import rcnn
from .retinanet import retinanet


class _Pixels(NamedTuple):
    input_format: str
    pixel_mean: list
    pixel_std: list


class _Variant(NamedTuple):
    """Norms (names or callables), WS, pixel statistics and weights; ``{}`` is the backbone."""

    norm: str
    neck_and_heads: str
    ws_formula: str | None
    pixels: _Pixels
    weights: str
    stride_in_1x1: bool = False
    freeze_at: int = 2


_RGB = _Pixels("RGB", [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
_BGR = _Pixels("BGR", [103.53, 116.28, 123.675], [1.0, 1.0, 1.0])
_OURS = "wsbcn://ImageNetPretrained/{}"
_MSRA = "detectron2://ImageNetPretrained/MSRA/{}.pkl"

_VARIANTS = {
    "gn": _Variant("GN", "GN", None, _BGR, "catalog://ImageNetPretrained/FAIR/{}-GN"),
    "gn_ws": _Variant("GN", "GN", "unbiased_std", _RGB, _OURS + "-GN-WS"),
    "bcn_ws": _Variant("BCN", "BCN", "unbiased", _RGB, _OURS + "-BCN-WS"),
    "bcn": _Variant("BCN", "BCN", None, _RGB, "weights/{}-BCN.pth"),
    "bn_ws": _Variant("BN", "BN", "unbiased", _RGB, "weights/{}-BN-WS.pth"),
    "syncbn": _Variant("SyncBN", "SyncBN", None, _BGR, _MSRA, stride_in_1x1=True),
    "frozenbn": _Variant("FrozenBN", "", None, _BGR, _MSRA, stride_in_1x1=True),
    "bcn_ws_scratch": _Variant("BCN", "BCN", "unbiased", _RGB, "", freeze_at=0),
}
_RESNEXT = dict(num_groups=32, width_per_group=4)
_BACKBONES = {
    "R-50": dict(depth=50),
    "R-101": dict(depth=101),
    "X-50": dict(depth=50, **_RESNEXT),
    "X-101": dict(depth=101, **_RESNEXT),
}
# Weights that are not where the variant's others are.
_EXCEPTIONS = {
    # The authors' ImageNet code, not Detectron's.
    ("gn", "X-50"): (_RGB, "wsbcn://ImageNetPretrained/X-50-GN"),
    ("gn", "X-101"): (_RGB, "wsbcn://ImageNetPretrained/X-101-GN"),
    # Nobody published these.
    ("bcn_ws", "X-101"): (_RGB, "weights/X-101-32x4d-BCN-WS.pth"),
}
# Iterations at 8 images per step: where the learning rate drops, and the end.
_SCHEDULES = {
    "1x": (120000, 160000, 180000),
    "2x": (300000, 340000, 360000),  # 20-23-24 epochs
    "3x": (420000, 500000, 540000),
}
_NAME = re.compile(
    r"(?P<detector>mask|faster|cascade_mask|retinanet)(_rcnn)?_(?P<backbone>[RX]_\d+)(_32x4d)?_FPN"
    r"_(?P<schedule>\dx)_(?P<variant>\w+)_(?P<images>[12])img(\.py)?"
)


def by_name(path):
    """The experiment that a name describes.

    Args:
        path: ends in a name of ``configs/COCO-Detection`` or ``configs/COCO-InstanceSegmentation``,
            such as ``mask_rcnn_R_50_FPN_2x_bcn_ws_1img``.

    Returns:
        tuple: as :func:`build`.

    Raises:
        ValueError: for a name that describes none.
    """
    name = os.path.basename(path)
    match = _NAME.fullmatch(name)
    try:
        return build(
            match["detector"],
            match["backbone"].replace("_", "-"),
            match["variant"],
            schedule=match["schedule"],
            images_per_gpu=int(match["images"]),
        )
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"no experiment {name!r}: DETECTOR_BACKBONE_FPN_SCHEDULE_VARIANT_IMAGESimg, as in "
            "mask_rcnn_R_50_FPN_2x_bcn_ws_1img, with a variant of " + ", ".join(_VARIANTS)
        ) from error


def build(detector, backbone, variant, *, schedule, images_per_gpu):
    """One experiment.

    Args:
        detector: "mask", "faster", "cascade_mask" or "retinanet".
        backbone: "R-50", "R-101", "X-50" or "X-101" (32x4d).
        variant: a key of ``_VARIANTS``.
        schedule: a key of ``_SCHEDULES``.
        images_per_gpu: 1 or 2.

    Returns:
        tuple: dataloader, lr_multiplier, model, optimizer, train.
    """
    v = _VARIANTS[variant]
    pixels, weights = _EXCEPTIONS.get((variant, backbone), (v.pixels, v.weights.format(backbone)))
    dense = detector == "retinanet"
    fpn = resnet_fpn(
        **_BACKBONES[backbone],
        norm=v.norm,
        fpn_norm=v.neck_and_heads,
        ws_formula=v.ws_formula,
        stride_in_1x1=v.stride_in_1x1,
        freeze_at=v.freeze_at,
        retinanet=dense,
    )
    options = dict(head_norm=v.neck_and_heads, ws_formula=v.ws_formula, **pixels._asdict())
    mask = detector in ("mask", "cascade_mask")
    if dense:
        model = retinanet(fpn, **options)
    else:
        model = rcnn(
            fpn,
            mask=mask,
            cascade=detector == "cascade_mask",
            # The release keeps 2000 per process and step, Detectron2 counts per image.
            proposals=2000 // images_per_gpu,
            **options,
        )
    batch = GPUS * images_per_gpu
    *steps, max_iter = [n * 8 // batch for n in _SCHEDULES[schedule]]
    return (
        coco(total_batch_size=batch, image_format=pixels.input_format, mask=mask),
        multi_step(steps, max_iter),
        model,
        sgd((0.01 if dense else 0.02) / 16 * batch),
        train_options(weights=weights, max_iter=max_iter, precise_bn=variant == "syncbn"),
    )
