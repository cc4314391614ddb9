"""What is known of each format, line by line, and what a report says of it."""

import re

import pytest
import torch

from wsbcn_d2.checkpoint import CheckpointError, convert
from wsbcn_d2.checkpoint.formats.caffe2 import convert_caffe2
from wsbcn_d2.checkpoint.formats.detectron2_names import convert_detectron2
from wsbcn_d2.checkpoint.formats.imagenet import convert_imagenet
from wsbcn_d2.checkpoint.formats.mmdet import convert_mmdet
from wsbcn_d2.checkpoint.formats.recognise import (
    FORMATS,
    foreign_norm_kind,
    presume_formula,
    presume_pixels,
)
from wsbcn_d2.checkpoint.layout import (
    BackboneLayout,
    check_shapes,
    detector_shapes,
    infer_backbone,
    split_backbone,
)
from wsbcn_d2.checkpoint.metadata import DETECTRON2_BGR, DETECTRON_BGR, IMAGENET_RGB, Metadata
from wsbcn_d2.checkpoint.report import ConversionReport

from .. import source_models as src
from ..torchvision_names import basic_resnet

USUAL = "usual for {} files with {}; names alone cannot tell"


def meta_of(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "kind, norm, name, expected",
    [
        ("imagenet", "GN", "a.pth", ("unbiased_std", USUAL)),
        ("imagenet", "BCN", "a.pth", ("unbiased", USUAL)),
        ("imagenet", "BN", "a-gn.pth", ("none", USUAL)),
        ("imagenet", "GN", "R_GN.pth", ("none", "from the file's name, R_GN.pth: GN without WS")),
        ("imagenet", "GN", "ws.gn", ("unbiased_std", "from the file's name, ws.gn")),
        ("imagenet", "GN", "news-gnu", ("unbiased_std", USUAL)),
        ("mmdet", "GN", "x-gn.pth", ("unbiased_std", USUAL)),
        ("mmdet", "BN", "x.pth", ("none", USUAL)),
        ("mmdet", "BCN", "x.pth", (None, "such files do not say")),
        ("caffe2", "GN", "x.pkl", ("none", USUAL)),
        ("caffe2", "GN", "gn-ws.pkl", ("unbiased_std", "from the file's name, gn-ws.pkl")),
        ("caffe2", "BN", "ws-gn.pkl", ("none", USUAL)),
        ("detectron2", "GN", "gn-ws.pth", (None, "such files do not say")),
    ],
)  # fmt: skip
def test_the_formula_that_is_presumed(kind, norm, name, expected):
    expected = (expected[0], expected[1].format(kind, norm))
    for meta in (None, {}, {"config": 3}, "ConvWS"):
        assert presume_formula(FORMATS[kind], norm, name, meta) == (*expected, False)
    stored = presume_formula(FORMATS[kind], norm, name, {"config": "ConvWS"})
    told = ("unbiased_std", "from the config stored in the file", True)
    assert stored == (told if kind == "mmdet" else (*expected, False))


@pytest.mark.parametrize(
    "kind, norm, formula, backbone, detector",
    [
        *(("imagenet", norm, "none", IMAGENET_RGB, IMAGENET_RGB) for norm in ("GN", "BCN", "BN")),
        ("mmdet", "GN", "unbiased_std", IMAGENET_RGB, IMAGENET_RGB),
        ("mmdet", "GN", "none", DETECTRON2_BGR, DETECTRON2_BGR),
        ("mmdet", "BN", "none", IMAGENET_RGB, IMAGENET_RGB),
        ("caffe2", "GN", "none", DETECTRON2_BGR, DETECTRON_BGR),
        ("caffe2", "GN", "unbiased_std", DETECTRON_BGR, DETECTRON_BGR),
        ("caffe2", "BN", "none", DETECTRON2_BGR, DETECTRON_BGR),
        ("detectron2", "GN", None, None, None),
    ],
)
def test_the_pixels_that_are_presumed(kind, norm, formula, backbone, detector):
    assert presume_pixels(FORMATS[kind], norm, formula, False) is backbone
    assert presume_pixels(FORMATS[kind], norm, formula, True) is detector


@pytest.mark.parametrize(
    "names, kind",
    [
        (["res_conv1_bn_s", "res2_0_branch2a_bn_b"], "BN"),
        (["conv1_gn_s", "fpn_inner_gn_s"], "GN"),
        (["conv1_gn_s", "res2_0_branch2a_bn_s"], "BN"),
        (["conv1_w", "pred_b"], None),
        (["backbone.bottom_up.stem.conv1.norm.weight"], "GN"),
        (["res2.0.conv1.norm.running_mean"], "BN"),
        (["backbone.res5.0.conv1.norm.bn.running_mean"], "BCN"),
        # The backbone's counts, not the heads'.
        (["roi_heads.box_head.conv1.norm.weight", "backbone.fpn_lateral2.norm.bias"], None),
        (["stem.conv1.norm.running_mean", "backbone.fpn_lateral2.norm.weight"], "BN"),
    ],
)
def test_the_kind_of_norm_by_names(names, kind):
    assert foreign_norm_kind(dict.fromkeys(names)) == kind


LAYOUTS = {
    "R-18": BackboneLayout(18, 1, 64, "GN"),
    "R-34": BackboneLayout(34, 1, 64, "BN"),
    "R-50": BackboneLayout(50, 1, 64, "BCN", 16),
    "R-101 (DeepLab)": BackboneLayout(101, 1, 64, "BN", deeplab=True),
    "R-152": BackboneLayout(152, 1, 64, "GN"),
    "X-152-32x8d": BackboneLayout(152, 32, 8, "BN"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_backbone_is_known_by_its_names(name):
    expected = LAYOUTS[name]
    shapes = expected.shapes()
    found = infer_backbone(meta_of(shapes))
    assert found == expected and found.name == name
    stem = shapes["stem.conv1.weight"]
    assert stem == ((64, 3, 3, 3) if expected.deeplab else (64, 3, 7, 7))
    assert shapes["res2.0.conv1.weight"][1] == (128 if expected.deeplab else 64)
    assert shapes["res5.0.conv1.weight"][0] == 512 * expected.groups * expected.width_per_group // (
        64 if expected.depth >= 50 else expected.groups * expected.width_per_group
    )


def test_a_norm_without_counters_is_whole_and_other_names_are_not():
    """Detectron2's frozen norms keep no counters, and older PyTorch's batch norms had none."""
    shapes = BackboneLayout(18, 1, 64, "BN").shapes()
    counters = [name for name in shapes if name.endswith("num_batches_tracked")]
    assert len(counters) == 20
    without = meta_of({n: s for n, s in shapes.items() if n not in counters})
    check_shapes(without, shapes)
    del without["stem.conv1.norm.running_var"], without["res2.0.conv1.weight"]
    without["extra"], without["res2.0.conv2.weight"] = torch.ones(1), torch.ones(2)
    with pytest.raises(CheckpointError) as error:
        check_shapes(without, shapes)
    assert str(error.value) == (
        "2 parameters are missing: stem.conv1.norm.running_var, res2.0.conv1.weight; "
        "1 are not part of this architecture: extra; 1 have the wrong shape: "
        "res2.0.conv2.weight is (2,) instead of (64, 64, 3, 3)"
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("res2.0.conv2.weight"), r"conv2.weight has shape \(\), which no known"),
        (lambda s: s.update({"res2.3.conv1.weight": 0}), r"has \(4, 4, 6, 3\) bottleneck blocks"),
        (
            lambda s: s.update({"stem.conv1.norm.weight": torch.ones(24)}),
            "BCN with 24 groups, which do not divide 64 channels",
        ),
        (lambda s: s.update({"stem.conv1.norm.weight": torch.ones(0)}), "BCN with 0 groups"),
        (
            lambda s: [s.pop(name) for name in list(s) if ".norm." in name],
            "no norm parameters: not a GN, BN or BCN ResNet",
        ),
    ],
)
def test_backbones_that_there_are_none_of(change, message):
    state = meta_of(BackboneLayout(50, 1, 64, "BCN").shapes())
    change(state)
    with pytest.raises(CheckpointError, match=message):
        infer_backbone(state)


@pytest.mark.parametrize(
    "names, kind, found",
    [
        (
            ["backbone.bottom_up.stem.a", "backbone.bottom_up.res5.b", "backbone.fpn_lateral2.w"],
            "fpn",
            ["stem.a", "res5.b"],
        ),
        (
            ["backbone.stem.a", "roi_heads.res5.b", "roi_heads.box_head.c", "backbone.res4.d"],
            "c4",
            ["stem.a", "res5.b", "res4.d"],
        ),
        (["stem.a", "res2.b", "res6.c", "linear.weight"], "bare", ["stem.a", "res2.b"]),
        (["xbackbone.stem.a", "fc.weight", "roi_heads.stem.a"], "", []),
    ],
)
def test_the_resnet_among_names(names, kind, found):
    told, mapping = split_backbone(iter(names))
    assert (told, list(mapping)) == (kind, found)
    assert all(given in names and given.endswith(bare) for bare, given in mapping.items())


def test_counters_of_estimates_that_were_never_set_stay_zero():
    """Of a model that was saved before its first batch; the reference's own never counts."""
    net = src.Net(norm="BCN", ws="var")
    state = {name: torch.zeros(shape) for name, shape in src.resnet_entries(net)}
    mapped = convert_imagenet(state)
    counters = [v for n, v in mapped.state.items() if n.endswith("num_batches_tracked")]
    assert len(counters) == 53 and not any(map(int, counters)) and mapped.notes == []


def test_why_keys_are_dropped():
    one = torch.ones(1)
    state = {name: one for name, _ in src.resnet_entries(src.Net())}
    mapped = convert_imagenet(state | {"bn1.estbn_moving_speed": one})
    assert mapped.dropped == {
        **dict.fromkeys(("fc.weight", "fc.bias"), "classifier; a detector has none"),
        "bn1.estbn_moving_speed": "update rate of the reference's EstBN; here it comes from "
        "MODEL.BCN.UPDATE_RATE",
    }
    dropped = {
        **dict.fromkeys(
            ("stem.fc.weight", "fc1000.bias", "linear.weight", "backbone.linear.bias"),
            "classifier; a detector has none",
        ),
        "proposal_generator.anchor_generator.cell_anchors.0": "anchors are computed, not stored",
        **dict.fromkeys(("pixel_mean", "model.pixel_std"), "pixel statistics come from the config"),
    }
    kept = {"stem.conv1.weight": one, "res2.0.fc.weight": one, "pixel_means": one}
    mapped = convert_detectron2({**kept, **dict.fromkeys(dropped, one)})
    assert mapped.dropped == dropped and mapped.state == kept
    dropped = {
        **dict.fromkeys(
            ("lr", "weight_order", "model_iter"), "bookkeeping of the training program"
        ),
        "res2_0_branch2a_w_momentum": "optimizer state",
        **dict.fromkeys(
            ("pred_w", "pred_b", "fc1000_w", "fc1000_b"), "classifier; a detector has none"
        ),
    }
    blobs = {"conv1_w": one, "conv1_gn_s": one, "conv1_gn_b": one, **dict.fromkeys(dropped, one)}
    assert convert_caffe2(blobs).dropped == dropped
    with pytest.raises(CheckpointError, match="^Caffe2 blobs of no known meaning: surprise_w$"):
        convert_caffe2({"conv1_w": one, "surprise_w": one, "fc6_w": one})


def small_mmdet(norm, width=32):
    """A detector of mmdetection 2 with a ResNet-18, two classes, and norms of a name."""
    state = {
        f"backbone.{name.replace('bn', norm) if 'downsample' not in name else name}": shape
        for name, shape in basic_resnet().items()
    }
    for level in range(4):
        for part, inputs, kernel in (("lateral", 64 * 2**level, 1), ("fpn", width, 3)):
            name = f"neck.{part}_convs.{level}."
            state[f"{name}conv.weight"] = (width, inputs, kernel, kernel)
            state[f"{name}{norm}.weight"] = state[f"{name}{norm}.bias"] = (width,)
    for name, shape in {
        "rpn_head.rpn_conv": (width, width, 3, 3),
        "rpn_head.rpn_cls": (3, width, 1, 1),
        "rpn_head.rpn_reg": (12, width, 1, 1),
        "roi_head.bbox_head.shared_fcs.0": (8, width * 49),
        "roi_head.bbox_head.shared_fcs.1": (8, 8),
        "roi_head.bbox_head.fc_cls": (3, 8),
        "roi_head.bbox_head.fc_reg": (8, 8),
    }.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = shape, shape[:1]
    return {name: torch.ones(shape) for name, shape in state.items()}


def test_the_config_and_the_report_of_a_detector():
    state = small_mmdet("gn") | {"data_preprocessor.mean": torch.ones(3)}
    state["rpn_head.rpn_cls.bias"][1] = torch.nan
    _, report = convert({"state_dict": state, "meta": {"config": "ConvWS"}})
    config = [
        'MODEL.BACKBONE.NAME: "build_ws_resnet_fpn_backbone"',
        *("MODEL.RESNETS.DEPTH: 18", 'MODEL.RESNETS.NORM: "GN"'),
        *("MODEL.RESNETS.STRIDE_IN_1X1: False", 'MODEL.WS.FORMULA: "unbiased_std"'),
        *("MODEL.MASK_ON: False", 'MODEL.FPN.NORM: "GN"'),
        *('MODEL.ROI_BOX_HEAD.NAME: "WSFastRCNNConvFCHead"', 'MODEL.ROI_BOX_HEAD.NORM: "GN"'),
        "(the rest: configs/published/Base-mmdet-GN-WS.yaml)",
        'INPUT.FORMAT: "RGB"',
        "MODEL.PIXEL_MEAN: [123.675, 116.28, 103.53]",
        "MODEL.PIXEL_STD: [58.395, 57.12, 57.375]",
    ]
    assert report.config_lines() == config
    lines = report.lines()
    assert lines[0].startswith("format        mmdet, ")
    assert lines[1:9] == [
        "model         R-18, faster_rcnn",
        f"keys          {len(state)} in, {len(state) - 1} mapped, 1 dropped, 0 added",
        "  dropped     1 (data_preprocessor.mean): pixel statistics come from the config",
        "norm          GN",
        "WS formula    unbiased_std, eps 1e-05",
        "channel order RGB (presumed)",
        "pixel mean    (123.675, 116.28, 103.53) (presumed)",
        "pixel std     (58.395, 57.12, 57.375) (presumed)",
    ]
    warning = "NaN or Inf in 1 tensors: proposal_generator.rpn_head.objectness_logits.bias"
    assert lines[-len(config) - 2] == f"WARNING       {warning}"
    assert lines[-len(config) - 1 :] == ["config", *(f"  {line}" for line in config)]


def test_widths_that_no_group_norm_has_are_one_line():
    with pytest.raises(CheckpointError, match=r"^no detector has such widths: .*\(16\).*\(32\)$"):
        convert(small_mmdet("gn", 16))


@pytest.mark.parametrize("norm", ["bn", "norm"])
def test_mmcvs_norms_have_one_of_three_names(norm):
    state = small_mmdet("gn")
    renamed = {
        (name.replace(".gn.", f".{norm}.") if name.startswith("neck.") else name): value
        for name, value in state.items()
    }
    assert list(convert_mmdet(renamed).state) == list(convert_mmdet(state).state)
    found = convert_mmdet(renamed).sources
    assert found["backbone.fpn_lateral2.norm.weight"] == f"neck.lateral_convs.0.{norm}.weight"
    assert found["backbone.fpn_output5.weight"] == "neck.fpn_convs.3.conv.weight"
    assert found["roi_heads.box_head.fc2.bias"] == "roi_head.bbox_head.shared_fcs.1.bias"


def test_a_report_of_what_is_not_known():
    report = ConversionReport(
        *("detectron2", "a state dict", 9),
        mapped={"a": "b"},
        dropped={"x": "why", "z": "other", "y": "why", "w": "why"},
        metadata=Metadata(norm="BN"),
        added=["c", "d"],
        nonfinite=[f"n{i}" for i in range(6)],
        notes=["odd", "odder"],
    )
    assert report.lines() == [
        "format        detectron2, a state dict",
        "model         not a ResNet of this project",
        "keys          9 in, 1 mapped, 4 dropped, 2 added",
        "  dropped     3 (x ... w): why",
        "  dropped     1 (z): other",
        "norm          BN",
        "WS formula    not known, eps not known",
        "channel order not known",
        "pixel mean    not known",
        "pixel std     not known",
        *("note          odd", "note          odder"),
        "WARNING       NaN or Inf in 6 tensors: n0, n1, n2, n3",
        "config",
    ]
    report.layout, report.detector = BackboneLayout(50, 1, 64, "BN", deeplab=True), "mask_rcnn"
    assert report.config_lines()[:5] == [
        'MODEL.BACKBONE.NAME: "build_resnet_deeplab_backbone"',
        *("MODEL.RESNETS.DEPTH: 50", 'MODEL.RESNETS.NORM: "BN"'),
        *("MODEL.RESNETS.STRIDE_IN_1X1: False", "MODEL.MASK_ON: True"),
    ]
    assert report.config_lines()[5:] == [
        *('MODEL.FPN.NORM: ""', 'MODEL.ROI_BOX_HEAD.NAME: "FastRCNNConvFCHead"'),
        *('MODEL.ROI_BOX_HEAD.NORM: ""', 'MODEL.ROI_MASK_HEAD.NAME: "MaskRCNNConvUpsampleHead"'),
        'MODEL.ROI_MASK_HEAD.NORM: ""',
    ]


HEADS = {  # of a Faster R-CNN of two classes and five anchors, with a mask head
    "backbone.fpn_lateral2.weight": (64, 64, 1, 1),
    "proposal_generator.rpn_head.objectness_logits.weight": (5, 64, 1, 1),
    "roi_heads.box_head.conv1.weight": (32, 64, 3, 3),
    "roi_heads.box_head.conv1.norm.weight": (32,),
    "roi_heads.box_head.fc1.weight": (24, 32 * 49),
    "roi_heads.box_head.fc2.weight": (24, 24),
    "roi_heads.box_predictor.cls_score.weight": (3, 24),
    "roi_heads.box_predictor.bbox_pred.weight": (8, 24),
    "roi_heads.mask_head.mask_fcn1.weight": (32, 64, 3, 3),
    "roi_heads.mask_head.deconv.weight": (32, 96, 2, 2),
    "roi_heads.mask_head.predictor.weight": (2, 96, 1, 1),
}


def test_a_detector_is_known_by_a_few_tensors():
    """Widths and counts are its own, whatever else is Detectron2's."""
    shapes = detector_shapes(meta_of(HEADS), LAYOUTS["R-18"])
    found = {name: shapes[name] for name in HEADS if name in shapes}
    assert found == {
        **{name: shape for name, shape in HEADS.items() if "mask_head" not in name},
        "roi_heads.mask_head.mask_fcn1.weight": (96, 64, 3, 3),
        "roi_heads.mask_head.deconv.weight": (96, 96, 2, 2),
        "roi_heads.mask_head.predictor.weight": (2, 96, 1, 1),
    }
    assert shapes["proposal_generator.rpn_head.anchor_deltas.weight"] == (20, 64, 1, 1)
    assert shapes["backbone.fpn_output5.weight"] == (64, 64, 3, 3)
    assert "roi_heads.box_head.conv2.weight" not in shapes
    assert "roi_heads.box_head.fc3.weight" not in shapes
    assert not any(name.startswith("backbone.bottom_up.") for name in shapes)
    assert not any("fpn_" in name and ".norm." in name for name in shapes)
    agnostic = {**HEADS, "roi_heads.box_predictor.bbox_pred.weight": (4, 24)}
    agnostic["roi_heads.mask_head.predictor.weight"] = (1, 96, 1, 1)
    shapes = detector_shapes(meta_of(agnostic), LAYOUTS["R-18"])
    assert shapes["roi_heads.box_predictor.bbox_pred.weight"] == (4, 24)
    assert shapes["roi_heads.mask_head.predictor.weight"] == (1, 96, 1, 1)
    boxes = {name: shape for name, shape in HEADS.items() if "mask" not in name}
    shapes = detector_shapes(meta_of(boxes), LAYOUTS["R-18"])
    assert not any("mask" in name for name in shapes)


@pytest.mark.parametrize(
    "name",
    [
        "backbone.fpn_lateral2.weight",
        "proposal_generator.rpn_head.objectness_logits.weight",
        "roi_heads.box_head.conv1.weight",
        "roi_heads.box_predictor.cls_score.weight",
        "roi_heads.box_predictor.bbox_pred.weight",
        "roi_heads.mask_head.deconv.weight",
        "roi_heads.mask_head.predictor.weight",
    ],
)
def test_a_detector_lacks_what_tells_its_widths(name):
    state = meta_of(HEADS)
    state[name] = torch.empty(() if "mask" in name else (0, 4), device="meta")
    shape = str(tuple(state[name].shape))
    message = f"^{re.escape(name)} has shape {re.escape(shape)}: not a detector's$"
    with pytest.raises(CheckpointError, match=message):
        detector_shapes(state, LAYOUTS["R-18"])
    if "conv1" not in name:
        del state[name]
        with pytest.raises(CheckpointError, match=f"^the detector has no {re.escape(name)}$"):
            detector_shapes(state, LAYOUTS["R-18"])


@pytest.mark.parametrize("lacks", ["head", "classes"])
def test_a_detector_of_nothing(lacks):
    state = meta_of(HEADS)
    if lacks == "head":
        state = {name: value for name, value in state.items() if "box_head" not in name}
    else:
        state["roi_heads.box_predictor.cls_score.weight"] = torch.empty(1, 24, device="meta")
    with pytest.raises(CheckpointError, match="^the detector has no box head or no classes$"):
        detector_shapes(state, LAYOUTS["R-18"])
