"""The backbones with WS: which convolutions are standardized, and what they then compute."""

import copy

import pytest
import reference
import torch
from detectron2.config import get_cfg as get_detectron2_cfg
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import build_backbone, build_model
from torch import nn
from torch.testing import assert_close

from wsbcn_d2 import EstimatedBatchNorm2d, WSConv2d, get_cfg
from wsbcn_d2.modeling.stages import make_resnet_stages

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
SMALL_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


def resnet_convs(depth, stages=(2, 3, 4, 5)):
    names = ["stem.conv1"]
    blocks = {**BLOCKS, **SMALL_BLOCKS}[depth]
    for stage, count in zip((2, 3, 4, 5), blocks, strict=True):
        if stage not in stages:
            continue
        for block in range(count):
            convs = ["conv1", "conv2"] + (["conv3"] if depth in BLOCKS else [])
            # The basic block's first stage keeps its width: no projection there.
            if block == 0 and not (depth in SMALL_BLOCKS and stage == 2):
                convs.append("shortcut")
            names += [f"res{stage}.{block}.{conv}" for conv in convs]
    return names


def standardized(module):
    return {name for name, child in module.named_modules() if isinstance(child, WSConv2d)}


def plain(module):
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    return {
        name
        for name, child in module.named_modules()
        if isinstance(child, kinds) and not isinstance(child, WSConv2d)
    }


def on_meta(cfg):
    with torch.device("meta"):
        return build_model(cfg)


def resnet_cfg(name="build_ws_resnet_backbone", depth=18, norm="GN", **resnets):
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    first = 3 if "retinanet" in name else 2
    cfg.MODEL.FPN.IN_FEATURES = [f"res{i}" for i in range(first, 6)]
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.FPN.NORM = norm
    if depth in SMALL_BLOCKS:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    for key, value in resnets.items():
        cfg.MODEL.RESNETS[key] = value
    return cfg


# Which convolutions.


def test_the_69_convolutions_of_mask_rcnn_r50_fpn_and_the_plain_ones(r50_cfg):
    model = on_meta(r50_cfg())
    backbone = {f"backbone.bottom_up.{name}" for name in resnet_convs(50)}
    fpn = {f"backbone.fpn_{kind}{i}" for kind in ("lateral", "output") for i in (2, 3, 4, 5)}
    box = {f"roi_heads.box_head.conv{i}" for i in (1, 2, 3, 4)}
    mask = {f"roi_heads.mask_head.mask_fcn{i}" for i in (1, 2, 3, 4)}
    assert [len(part) for part in (backbone, fpn, box, mask)] == [53, 8, 4, 4]
    assert standardized(model) == backbone | fpn | box | mask
    assert plain(model) == {
        "proposal_generator.rpn_head.conv",
        "proposal_generator.rpn_head.objectness_logits",
        "proposal_generator.rpn_head.anchor_deltas",
        "roi_heads.box_head.fc1",
        "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred",
        "roi_heads.mask_head.deconv",
        "roi_heads.mask_head.predictor",
    }
    # Every one of them, and nothing else, carries a norm.
    assert all(child.norm is not None for child in model.modules() if type(child) is WSConv2d)


def test_without_norms_the_fpn_and_the_heads_stay_plain(r50_cfg):
    keys = ("MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM", "MODEL.ROI_MASK_HEAD.NORM")
    model = on_meta(r50_cfg(*(part for key in keys for part in (key, ""))))
    assert standardized(model) == {f"backbone.bottom_up.{name}" for name in resnet_convs(50)}


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_every_depth(depth):
    with torch.device("meta"):
        backbone = build_backbone(resnet_cfg(depth=depth, norm="BCN"))
    assert standardized(backbone) == set(resnet_convs(depth))
    assert plain(backbone) == set()


@pytest.mark.parametrize(
    "depth, wanted",
    [(depth, {}) for depth in (18, 34, 50, 101, 152)]
    + [(depth, {"num_groups": 32, "width_per_group": 4}) for depth in (50, 101)],
)
def test_stages_from_arguments_are_those_of_a_config(depth, wanted):
    cfg = resnet_cfg(depth=depth, norm="GN", **{k.upper(): v for k, v in wanted.items()})
    with torch.device("meta"):
        backbone = build_backbone(cfg)
        stages = make_resnet_stages(
            depth, norm="GN", stride_in_1x1=cfg.MODEL.RESNETS.STRIDE_IN_1X1, **wanted
        )
    for stage, expected in zip(stages, backbone.stages, strict=True):
        assert shapes(nn.Sequential(*stage)) == shapes(expected)
        assert [type(block) for block in stage] == [type(block) for block in expected]


def test_the_stride_of_stages_is_in_the_3x3_unless_asked_for():
    for options, first in (
        ({}, False),
        ({"stride_in_1x1": False}, False),
        ({"stride_in_1x1": True}, True),
    ):
        block = make_resnet_stages(50, norm="GN", **options)[1][0]
        strides = [getattr(block, name).stride for name in ("conv1", "conv2", "conv3", "shortcut")]
        assert strides == [(1 + first,) * 2, (2 - first,) * 2, (1, 1), (2, 2)]


def shapes(module):
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    return [(m.weight.shape, m.stride, m.groups, m.padding, m.dilation) for m in convs]


def test_stages_of_a_depth_that_there_is_not():
    with pytest.raises(ValueError, match="no ResNet of depth 20: use one of 18, 34, 50, 101, 152"):
        make_resnet_stages(20, norm="GN")


@pytest.mark.parametrize("depth", [50, 101])
def test_resnext(depth):
    cfg = resnet_cfg(depth=depth, norm="BCN", NUM_GROUPS=32, WIDTH_PER_GROUP=4)
    with torch.device("meta"):
        backbone = build_backbone(cfg)
    assert standardized(backbone) == set(resnet_convs(depth))
    assert backbone.res2[0].conv2.groups == 32


@pytest.mark.parametrize("dilation", [1, 2])
def test_c4_and_dc5(dilation):
    features = "res4" if dilation == 1 else "res5"
    cfg = resnet_cfg(depth=50, norm="BCN", OUT_FEATURES=[features], RES5_DILATION=dilation)
    with torch.device("meta"):
        backbone = build_backbone(cfg)
    stages = (2, 3, 4) if dilation == 1 else (2, 3, 4, 5)
    assert standardized(backbone) == set(resnet_convs(50, stages))
    if dilation == 2:
        assert backbone.res5[0].conv2.dilation == (2, 2)


def test_retinanets_extra_levels_stay_plain():
    with torch.device("meta"):
        backbone = build_backbone(resnet_cfg("build_ws_retinanet_resnet_fpn_backbone", 50))
    assert {name for name in standardized(backbone) if "bottom_up" not in name} == {
        f"fpn_{kind}{i}" for kind in ("lateral", "output") for i in (3, 4, 5)
    }
    assert plain(backbone) == {"top_block.p6", "top_block.p7"}


# What they compute.


@pytest.mark.parametrize(
    "name", ["resnet_backbone", "resnet_fpn_backbone", "retinanet_resnet_fpn_backbone"]
)
def test_the_function_is_the_stock_one_on_standardized_weights(name):
    shape = ShapeSpec(channels=3)
    cfg = resnet_cfg(f"build_ws_{name}")
    cfg.MODEL.WS.FORMULA, cfg.MODEL.WS.EPS = "unbiased_std", 1e-3
    ws = build_backbone(cfg, shape)
    cfg.MODEL.BACKBONE.NAME = f"build_{name}"
    stock = build_backbone(cfg, shape)
    state = ws.state_dict()
    assert list(state) == list(stock.state_dict())
    for conv in standardized(ws):
        state[conv + ".weight"] = standardize(state[conv + ".weight"], "unbiased_std", 1e-3)
    stock.load_state_dict(state)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert_close(ws(x), stock(x), atol=2e-4, rtol=1e-3)


def standardize(weight, formula, eps):
    return reference.standardize_weight(weight.double(), formula, eps).float()


def test_the_fpns_plain_lists_hold_the_standardized_convolutions():
    fpn = build_backbone(resnet_cfg("build_ws_resnet_fpn_backbone"))
    own = {fpn.fpn_lateral2, fpn.fpn_lateral3, fpn.fpn_lateral4, fpn.fpn_lateral5}
    assert set(fpn.lateral_convs) == own
    own = {fpn.fpn_output2, fpn.fpn_output3, fpn.fpn_output4, fpn.fpn_output5}
    assert set(fpn.output_convs) == own
    assert all(type(conv) is WSConv2d for conv in (*fpn.lateral_convs, *fpn.output_convs))
    # They are what runs: the output does not see the scale and mean of the raw weights.
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = fpn(x)
        for conv in (*fpn.lateral_convs, *fpn.output_convs):
            conv.weight.mul_(5.0).add_(0.1)
        assert_close(fpn(x), expected, atol=5e-3, rtol=5e-2)


def test_a_copy_is_a_model_of_its_own():
    fpn = build_backbone(resnet_cfg("build_ws_resnet_fpn_backbone"))
    other = copy.deepcopy(fpn)
    assert standardized(other) == standardized(fpn)
    assert all(a is not b for a, b in zip(other.lateral_convs, fpn.lateral_convs, strict=True))
    assert other.lateral_convs[0] in set(other.modules())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = fpn(x)
        assert_close(other(x), before)
        for parameter in other.parameters():
            parameter.normal_()
        assert_close(fpn(x), before)


def test_state_dict_round_trip(tiny_cfg):
    model = build_model(tiny_cfg())
    other = build_model(tiny_cfg())
    assert other.load_state_dict(model.state_dict()).missing_keys == []
    assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    stem = {k for k in model.state_dict() if k.startswith("backbone.bottom_up.stem.")}
    assert stem == {
        f"backbone.bottom_up.stem.conv1.{key}"
        for key in (
            "weight",
            "norm.weight",
            "norm.bias",
            "norm.bn.weight",
            "norm.bn.bias",
            "norm.bn.running_mean",
            "norm.bn.running_var",
            "norm.bn.num_batches_tracked",
        )
    }


def test_gn_weights_and_gn_ws_weights_have_the_same_keys():
    ws, stock = (
        build_backbone(resnet_cfg(f"build_{prefix}resnet_fpn_backbone")) for prefix in ("ws_", "")
    )
    assert list(ws.state_dict()) == list(stock.state_dict())


# Config keys.


def test_formula_eps_and_update_rate_reach_every_layer(tiny_cfg):
    options = ("MODEL.WS.FORMULA", "biased", "MODEL.WS.EPS", 0.03, "MODEL.BCN.UPDATE_RATE", 0.2)
    model = build_model(tiny_cfg(*options))
    convs = [m for m in model.modules() if isinstance(m, WSConv2d)]
    norms = [m for m in model.modules() if isinstance(m, EstimatedBatchNorm2d)]
    assert len(convs) == len(norms) == 21 + 8 + 1 + 1  # ResNet-18, FPN, box, mask
    assert {(conv.ws_formula, conv.ws_eps) for conv in convs} == {("biased", 0.03)}
    assert {norm.momentum for norm in norms} == {0.2}


def test_a_config_without_this_projects_keys():
    cfg = get_detectron2_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_ws_resnet_backbone"
    with torch.device("meta"), pytest.raises(KeyError, match="add_wsbcn_config"):
        build_backbone(cfg)


# Deformable stages.


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("name", ["resnet_backbone", "resnet_fpn_backbone"])
def test_a_deformable_stage_is_refused_and_nothing_is_half_converted(modulated, name):
    options = dict(DEFORM_ON_PER_STAGE=[False, False, False, True], DEFORM_MODULATED=modulated)
    cfg = resnet_cfg(f"build_ws_{name}", 50, **options)
    with torch.device("meta"):
        with pytest.raises(ValueError, match="deformable.*res5.*DEFORM_ON_PER_STAGE"):
            build_backbone(cfg)
        cfg.MODEL.BACKBONE.NAME = f"build_{name}"
        backbone = build_backbone(cfg)
        with pytest.raises(ValueError, match="deformable"):
            WSConv2d.convert(backbone)
    assert standardized(backbone) == set()
    assert type(backbone.bottom_up.stem.conv1 if "fpn" in name else backbone.stem.conv1) is Conv2d
