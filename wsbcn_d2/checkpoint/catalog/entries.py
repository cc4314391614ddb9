"""Names for published checkpoints: where they are, what they are, under what terms.

No file behind these URLs has been opened by this project's tests; sizes are not published. Where
a file's name ends in eight hexadecimal digits, they are the start of its SHA-256 and are checked.
"""

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote, urlparse

from ..metadata import DETECTRON2_BGR, IMAGENET_RGB, Pixels

PREFIX = "wsbcn://"
_JHU = "cs.jhu.edu/~syqiao"
_OPENMMLAB = "https://download.openmmlab.com"
_MIRROR = f"{_OPENMMLAB}/pretrain/third_party"
_DETECTRON = "https://dl.fbaipublicfiles.com/detectron/ImageNetPretrained"
_S3 = "https://open-mmlab.s3.ap-northeast-2.amazonaws.com"  # deprecated by its owners; last resort


@dataclass(frozen=True)
class Entry:
    """One published checkpoint.

    Attributes:
        name: without ``wsbcn://``.
        urls: tried are those first whose name has a digest, and ``http://`` last.
        norm, formula, pixels: conventions, told to the converter.
        licence: of the weights, "not stated" where no text says.
        score: what its publisher reports.
        detector: whether it is a whole detector (converted to full names).
    """

    name: str
    urls: tuple[str, ...]
    norm: str
    formula: str
    pixels: Pixels
    licence: str
    score: str
    detector: bool = False


def url_file_name(url: str) -> str:
    """The file name at the end of a URL, unquoted."""
    return unquote(urlparse(url).path).rsplit("/", 1)[-1]


def url_digest(url: str) -> str | None:
    """The start of the SHA-256 that a URL's file name carries, or None."""
    return file_digest(url_file_name(url))


def file_digest(path: str) -> str | None:
    """The start of the SHA-256 that a local file's name carries, or None."""
    match = re.search(r"-([0-9a-f]{8})\.(?:pth|pkl)$", os.path.basename(path))
    return match[1] if match else None


def _backbone(name, urls, formula, error="", pixels=IMAGENET_RGB, licence="not stated"):
    norm = "BCN" if "BCN" in name else "GN"
    score = f"top-1 error {error}" if error else "not reported"
    return Entry(f"ImageNetPretrained/{name}", urls, norm, formula, pixels, licence, score)


def _gn_ws(short, mirror, error):
    file = f"{_JHU}/WeightStandardization/{short}-GN-WS.pth.tar"
    urls = (f"https://{file}", f"http://{file}", f"{_MIRROR}/{mirror}.pth")
    return _backbone(f"{short}-GN-WS", urls, "unbiased_std", error)


def _bcn_ws(short, file):
    urls = tuple(f"{http}://{_JHU}/BatchChannelNormalization/{file}" for http in ("https", "http"))
    return _backbone(f"{short}-BCN-WS", urls, "unbiased")


def _detectron_gn(short, number, mirror, error):
    # The mirror has the same weights, renamed.
    urls = (f"{_DETECTRON}/{number}/{short}-GN.pkl", f"{_MIRROR}/{mirror}.pth")
    return _backbone(f"{short}-GN", urls, "none", error, DETECTRON2_BGR, "CC BY-SA 3.0")


def _jhu_gn(short, mirror):
    # The authors' baselines without WS; only this mirror is known. Input as their other files.
    return _backbone(f"{short}-GN", (f"{_MIRROR}/{mirror}.pth",), "none")


def _detector(name, stamp, score):
    path = f"mmdetection/v2.0/gn%2Bws/{name}/{name}_{stamp}.pth"
    return Entry(
        f"COCO/{name}",
        (f"{_OPENMMLAB}/{path}", f"{_S3}/{path}"),
        "GN",
        "unbiased_std",
        IMAGENET_RGB,
        "Apache-2.0 (mmdetection's; none given for the weights)",
        f"COCO val2017 AP {score}",
        detector=True,
    )


_DETECTORS = """
faster_rcnn_r50_fpn_gn_ws-all_1x_coco             20200130-613d9fe2 39.7
faster_rcnn_r101_fpn_gn_ws-all_1x_coco            20200205-a93b0d75 41.7
faster_rcnn_x50_32x4d_fpn_gn_ws-all_1x_coco       20200203-839c5d9d 40.7
faster_rcnn_x101_32x4d_fpn_gn_ws-all_1x_coco      20200212-27da1bc2 42.1
mask_rcnn_r50_fpn_gn_ws-all_2x_coco               20200226-16acb762 40.6/36.6
mask_rcnn_r101_fpn_gn_ws-all_2x_coco              20200212-ea357cd9 42.0/37.7
mask_rcnn_x50_32x4d_fpn_gn_ws-all_2x_coco         20200216-649fdb6f 41.1/37.0
mask_rcnn_x101_32x4d_fpn_gn_ws-all_2x_coco        20200319-33fb95b5 42.1/37.9
mask_rcnn_r50_fpn_gn_ws-all_20_23_24e_coco        20200213-487d1283 41.1/37.1
mask_rcnn_r101_fpn_gn_ws-all_20_23_24e_coco       20200213-57b5a50f 43.1/38.6
mask_rcnn_x50_32x4d_fpn_gn_ws-all_20_23_24e_coco  20200226-969bcb2c 42.1/38.0
mask_rcnn_x101_32x4d_fpn_gn_ws-all_20_23_24e_coco 20200316-e6cd35ef 42.7/38.5
"""

CATALOG: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        _gn_ws("R-50", "resnet50_gn_ws-15beedd8", "23.72"),
        _gn_ws("R-101", "resnet101_gn_ws-3e3c308c", "22.10"),
        _gn_ws("X-50", "resnext50_32x4d_gn_ws-0d87ac85", "22.71"),
        _gn_ws("X-101", "resnext101_32x4d_gn_ws-34ac1a9e", "21.80"),
        _bcn_ws("R-50", "rn50_bcn_ws.pth"),
        _bcn_ws("R-101", "rn101_bcn_ws.pth"),
        _bcn_ws("X-50", "rx50_bcn_ws.pth"),
        _detectron_gn("R-50", "47261647", "resnet50_gn-9186a21c", "24.0"),
        _detectron_gn("R-101", "47592356", "resnet101_gn-cac0ab98", "22.6"),
        _jhu_gn("X-50", "resnext50_32x4d_gn-c7e8b754"),
        _jhu_gn("X-101", "resnext101_32x4d_gn-ac3bb84e"),
        *(_detector(*line.split()) for line in _DETECTORS.strip().splitlines()),
    )
}
