"""The catalog, word by word: as the sources of the weights give it, and nothing derived."""

import pytest

from wsbcn_d2.checkpoint import CATALOG
from wsbcn_d2.checkpoint.catalog.entries import file_digest, url_digest
from wsbcn_d2.checkpoint.metadata import DETECTRON2_BGR, DETECTRON_BGR, IMAGENET_RGB

# The authors' imagenet.py divides by 255: mean .485 .456 .406, deviation .229 .224 .225, in RGB.
RGB = ("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
BGR = ("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0))
# Detectron's numbers, which differ from Detectron2's in the third digit.
OLD_BGR = ("BGR", (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0))

JHU = "cs.jhu.edu/~syqiao/"
MMLAB = "https://download.openmmlab.com/"
MIRROR = MMLAB + "pretrain/third_party/"
FACEBOOK = "https://dl.fbaipublicfiles.com/detectron/ImageNetPretrained/"


def both(path):
    return f"https://{JHU}{path}", f"http://{JHU}{path}"


BACKBONES = {
    "R-50-GN-WS": (
        (*both("WeightStandardization/R-50-GN-WS.pth.tar"), MIRROR + "resnet50_gn_ws-15beedd8.pth"),
        *("GN", "unbiased_std", RGB, "not stated", "top-1 error 23.72"),
    ),
    "R-101-GN-WS": (
        (
            *both("WeightStandardization/R-101-GN-WS.pth.tar"),
            MIRROR + "resnet101_gn_ws-3e3c308c.pth",
        ),
        *("GN", "unbiased_std", RGB, "not stated", "top-1 error 22.10"),
    ),
    "X-50-GN-WS": (
        (
            *both("WeightStandardization/X-50-GN-WS.pth.tar"),
            MIRROR + "resnext50_32x4d_gn_ws-0d87ac85.pth",
        ),
        *("GN", "unbiased_std", RGB, "not stated", "top-1 error 22.71"),
    ),
    "X-101-GN-WS": (
        (
            *both("WeightStandardization/X-101-GN-WS.pth.tar"),
            MIRROR + "resnext101_32x4d_gn_ws-34ac1a9e.pth",
        ),
        *("GN", "unbiased_std", RGB, "not stated", "top-1 error 21.80"),
    ),
    "R-50-BCN-WS": (
        both("BatchChannelNormalization/rn50_bcn_ws.pth"),
        *("BCN", "unbiased", RGB, "not stated", "not reported"),
    ),
    "R-101-BCN-WS": (
        both("BatchChannelNormalization/rn101_bcn_ws.pth"),
        *("BCN", "unbiased", RGB, "not stated", "not reported"),
    ),
    "X-50-BCN-WS": (
        both("BatchChannelNormalization/rx50_bcn_ws.pth"),
        *("BCN", "unbiased", RGB, "not stated", "not reported"),
    ),
    "R-50-GN": (
        (FACEBOOK + "47261647/R-50-GN.pkl", MIRROR + "resnet50_gn-9186a21c.pth"),
        *("GN", "none", BGR, "CC BY-SA 3.0", "top-1 error 24.0"),
    ),
    "R-101-GN": (
        (FACEBOOK + "47592356/R-101-GN.pkl", MIRROR + "resnet101_gn-cac0ab98.pth"),
        *("GN", "none", BGR, "CC BY-SA 3.0", "top-1 error 22.6"),
    ),
    "X-50-GN": (
        (MIRROR + "resnext50_32x4d_gn-c7e8b754.pth",),
        *("GN", "none", RGB, "not stated", "not reported"),
    ),
    "X-101-GN": (
        (MIRROR + "resnext101_32x4d_gn-ac3bb84e.pth",),
        *("GN", "none", RGB, "not stated", "not reported"),
    ),
}
# mmdetection's metafile.yml: name, date and digest, box and mask AP.
DETECTORS = {
    "faster_rcnn_r50_fpn_gn_ws-all_1x_coco": ("20200130-613d9fe2", "39.7"),
    "faster_rcnn_r101_fpn_gn_ws-all_1x_coco": ("20200205-a93b0d75", "41.7"),
    "faster_rcnn_x50_32x4d_fpn_gn_ws-all_1x_coco": ("20200203-839c5d9d", "40.7"),
    "faster_rcnn_x101_32x4d_fpn_gn_ws-all_1x_coco": ("20200212-27da1bc2", "42.1"),
    "mask_rcnn_r50_fpn_gn_ws-all_2x_coco": ("20200226-16acb762", "40.6/36.6"),
    "mask_rcnn_r101_fpn_gn_ws-all_2x_coco": ("20200212-ea357cd9", "42.0/37.7"),
    "mask_rcnn_x50_32x4d_fpn_gn_ws-all_2x_coco": ("20200216-649fdb6f", "41.1/37.0"),
    "mask_rcnn_x101_32x4d_fpn_gn_ws-all_2x_coco": ("20200319-33fb95b5", "42.1/37.9"),
    "mask_rcnn_r50_fpn_gn_ws-all_20_23_24e_coco": ("20200213-487d1283", "41.1/37.1"),
    "mask_rcnn_r101_fpn_gn_ws-all_20_23_24e_coco": ("20200213-57b5a50f", "43.1/38.6"),
    "mask_rcnn_x50_32x4d_fpn_gn_ws-all_20_23_24e_coco": ("20200226-969bcb2c", "42.1/38.0"),
    "mask_rcnn_x101_32x4d_fpn_gn_ws-all_20_23_24e_coco": ("20200316-e6cd35ef", "42.7/38.5"),
}


def pixels(entry):
    return entry.pixels.input_format, entry.pixels.pixel_mean, entry.pixels.pixel_std


def test_nothing_is_missing_and_nothing_else_is_there():
    names = [f"ImageNetPretrained/{name}" for name in BACKBONES]
    assert list(CATALOG) == names + [f"COCO/{name}" for name in DETECTORS]


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones(name):
    entry = CATALOG[f"ImageNetPretrained/{name}"]
    found = entry.urls, entry.norm, entry.formula, pixels(entry), entry.licence, entry.score
    assert found == BACKBONES[name]
    assert entry.name == f"ImageNetPretrained/{name}" and not entry.detector


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors(name):
    stamp, score = DETECTORS[name]
    entry = CATALOG[f"COCO/{name}"]
    path = f"/mmdetection/v2.0/gn%2Bws/{name}/{name}_{stamp}.pth"
    assert entry.urls == (
        f"https://download.openmmlab.com{path}",
        f"https://open-mmlab.s3.ap-northeast-2.amazonaws.com{path}",
    )
    assert (entry.norm, entry.formula, pixels(entry)) == ("GN", "unbiased_std", RGB)
    assert entry.score == f"COCO val2017 AP {score}" and entry.detector
    assert entry.licence.startswith("Apache-2.0")
    assert [url_digest(url) for url in entry.urls] == [stamp[-8:]] * 2


def test_the_three_families_of_pixels():
    for found, expected in ((IMAGENET_RGB, RGB), (DETECTRON2_BGR, BGR), (DETECTRON_BGR, OLD_BGR)):
        assert (found.input_format, found.pixel_mean, found.pixel_std) == expected


def test_where_a_name_says_its_digest():
    for name in ("a-0123abcd.pth", "a-0123abcd.pkl", "x/y-z_1-0123abcd.pth"):
        assert url_digest(f"https://somewhere/{name}") == file_digest(name) == "0123abcd"
    for name in (
        *("a-0123abcd.pth.tar", "a-0123abc.pth", "a-00123abcd.pth", "a-0123ABCD.pth"),
        *("a_0123abcd.pth", "0123abcd.pth", "a-0123abcd", "a-0123abcd.pth/b.pth"),
    ):
        assert url_digest(f"https://somewhere/{name}") is file_digest(name) is None
