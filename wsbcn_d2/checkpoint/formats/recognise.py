"""The table of source formats: how each is told apart and what is known about its weights."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..errors import CheckpointError, shortened
from ..layout import norm_kind
from ..metadata import DETECTRON2_BGR, DETECTRON_BGR, IMAGENET_RGB, Pixels
from .caffe2 import convert_caffe2
from .detectron2_names import convert_detectron2
from .imagenet import convert_imagenet
from .mmdet import convert_mmdet
from .rules import Mapped


@dataclass(frozen=True)
class Format:
    """One source format.

    Attributes:
        name: as given to ``--format`` and recorded.
        description: one line.
        signs: regular expressions; a state dict has the format if each fits the whole of some key.
        convert: state dict -> Mapped.
        formulas: norm kind -> WS formula that such files are trained with.
        pixels: what they were fed with; None where files differ.
    """

    name: str
    description: str
    signs: tuple[str, ...]
    convert: Callable[[Mapping[str, torch.Tensor]], Mapped]
    formulas: Mapping[str, str]
    pixels: Pixels | None


_LAYER = r"layer1\.0\.conv1\.weight"
FORMATS = {
    fmt.name: fmt
    for fmt in (
        Format(
            "imagenet",
            "torchvision-style ResNet (authors' GN+WS and BCN+WS, openmmlab mirror, torchvision)",
            (r"conv1\.weight", _LAYER),
            convert_imagenet,
            {"GN": "unbiased_std", "BCN": "unbiased", "BN": "none"},
            IMAGENET_RGB,
        ),
        Format(
            "mmdet",
            "mmdetection two-stage detector, version 1 or later",
            (r"backbone\.conv1\.weight", rf"backbone\.{_LAYER}", r"(roi_head\.)?bbox_head\..+"),
            convert_mmdet,
            {"GN": "unbiased_std", "BN": "none"},
            IMAGENET_RGB,
        ),
        Format(
            "caffe2",
            "Caffe2 blobs (Detectron, Detectron2's GN backbones, authors' .pkl)",
            (r"conv1_w", r"res2_0_branch2a_w"),
            convert_caffe2,
            {"GN": "none", "BN": "none"},
            DETECTRON2_BGR,
        ),
        Format(
            "detectron2",
            "Detectron2's own names",
            (r"(.+\.)?stem\.conv1\.weight", r"(.+\.)?res2\.0\.conv1\.weight"),
            convert_detectron2,
            {},
            None,
        ),
    )
}
_UNSUPPORTED = {  # a key's pattern -> why such files cannot be used
    r"(patch_embed\.backbone\.)?stages\.\d+\.blocks\.\d+\.conv1\.weight": (
        "timm's ResNetV2 (BiT, hybrid ViT) is pre-activation or SAME-padded: no parameter map onto "
        "Detectron2's ResNet exists"
    ),
    r"stages\.\d+\.\d+\.conv1\.gain": "NFNets have scaled convolutions and no norm",
    r"aspp\..+|.*\.aspp\..+": "a segmentation network with ASPP: only its backbone exists here",
    r".*\.weight_(gamma|beta)": "ConvAWS (DetectoRS) has weights that no WS formula here has",
    r"bbox_head\.retina_cls\.weight": "mmdetection's one-stage detectors are not supported",
    r"backbone\.body\.stem\.conv1\.weight": (
        "a detector of maskrcnn-benchmark, of which none with WS was ever published"
    ),
}


def detect_format(state: Mapping[str, torch.Tensor]) -> Format:
    """Tells the format by the names.

    Raises:
        CheckpointError: none or several fit, or a format that is known not to be convertible.
    """
    for pattern, reason in _UNSUPPORTED.items():
        if found := next((key for key in state if re.fullmatch(pattern, key)), None):
            raise CheckpointError(f"not convertible ({found}): {reason}")
    fits = [
        fmt
        for fmt in FORMATS.values()
        if all(any(re.fullmatch(sign, key) for key in state) for sign in fmt.signs)
    ]
    if len(fits) != 1:
        what = f"several formats fit ({', '.join(f.name for f in fits)})" if fits else "no format"
        raise CheckpointError(
            f"{what if fits else 'the names fit no known format'}; known: {', '.join(FORMATS)}; "
            f"the file has {len(state)} keys: {shortened(state)}"
        )
    return fits[0]


def foreign_norm_kind(state: Mapping[str, torch.Tensor]) -> str | None:
    """Norm kind ("GN", "BCN", "BN") of a backbone in Detectron2 or Caffe2 names, None if none."""
    if any("." not in key and re.search(r"_[bg]n_[sb]$", key) for key in state):
        return "BN" if any(key.endswith("_bn_s") for key in state) else "GN"
    return norm_kind(key for key in state if re.search(r"(?:^|\.)(?:stem|res[2-5])\.", key))


def presume_formula(
    fmt: Format, norm: str, file_name: str, meta: object
) -> tuple[str | None, str, bool]:
    """The WS formula that a file's weights were trained with, as far as it can be told.

    Names and shapes do not tell weights with and without WS apart; a file's name may, and the
    config that mmdetection stores in its files does.

    Returns:
        (formula, or None if nothing is known; why; whether the file says so itself).
    """
    meta = meta if isinstance(meta, dict) else {}
    config = meta.get("config") or meta.get("cfg")  # mmdetection 1 and 2; 3
    if isinstance(config, str) and fmt.name == "mmdet":
        if "ConvAWS" in config:
            raise CheckpointError("trained with ConvAWS, which has parameters of its own")
        found = "unbiased_std" if "ConvWS" in config else "none"
        return found, "from the config stored in the file", True
    words = set(re.split(r"[^a-z0-9]+", file_name.lower()))
    if norm == "GN" and fmt.name in ("imagenet", "caffe2") and "gn" in words:
        if "ws" in words:
            return "unbiased_std", f"from the file's name, {file_name}", False
        return "none", f"from the file's name, {file_name}: GN without WS", False
    if norm not in fmt.formulas:
        return None, "such files do not say", False
    why = f"usual for {fmt.name} files with {norm}; names alone cannot tell"
    return fmt.formulas[norm], why, False


def presume_pixels(fmt: Format, norm: str, formula: str | None, detector: bool) -> Pixels | None:
    """How images were presumably fed to a file's network (channel order, mean, std)."""
    if fmt.name == "caffe2" and (detector or formula == "unbiased_std"):
        return DETECTRON_BGR
    if fmt.name == "mmdet" and norm == "GN" and formula == "none":
        return DETECTRON2_BGR
    return fmt.pixels
