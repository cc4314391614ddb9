"""The heads with WS: by config, by explicit arguments, on no boxes at all."""

import functools

import pytest
import reference
import torch
from detectron2.config import LazyCall, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, MaskRCNNConvUpsampleHead
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from torch.testing import assert_close

from wsbcn_d2 import (
    BatchChannelNorm2d,
    EstimatedBatchNorm2d,
    WSConv2d,
    WSFastRCNNConvFCHead,
    WSMaskRCNNConvUpsampleHead,
    WSRes5ROIHeads,
    get_cfg,
)

SHAPE = ShapeSpec(channels=8, height=5, width=5)
BOX = dict(conv_dims=[32, 32], fc_dims=[16])
MASK = dict(num_classes=3, conv_dims=[32, 32, 32])


def standardized(module):
    return {name for name, child in module.named_modules() if isinstance(child, WSConv2d)}


@pytest.mark.parametrize("formula", ["unbiased", "biased"])
@pytest.mark.parametrize(
    ("ws_kind", "stock_kind", "arguments", "converted"),
    [
        (
            WSFastRCNNConvFCHead,
            FastRCNNConvFCHead,
            dict(BOX, conv_norm="GN"),
            {"conv1", "conv2"},
        ),
        (
            WSMaskRCNNConvUpsampleHead,
            MaskRCNNConvUpsampleHead,
            dict(MASK, conv_norm="GN"),
            {"mask_fcn1", "mask_fcn2"},
        ),
    ],
)
def test_the_function_is_the_stock_one_on_standardized_weights(
    formula, ws_kind, stock_kind, arguments, converted
):
    head = ws_kind(SHAPE, **arguments, ws_formula=formula, ws_eps=1e-2)
    stock = stock_kind(SHAPE, **arguments)
    assert standardized(head) == converted
    # The norm takes the scale out again, and with it most of what an epsilon does.
    options = {(conv.ws_formula, conv.ws_eps) for conv in map(head.get_submodule, converted)}
    assert options == {(formula, 1e-2)}
    state = head.state_dict()
    assert list(state) == list(stock.state_dict())
    for name in converted:
        weight = state[name + ".weight"].double()
        state[name + ".weight"] = reference.standardize_weight(weight, formula, 1e-2).float()
    stock.load_state_dict(state)
    x = torch.randn(3, 8, 5, 5)
    if ws_kind is WSFastRCNNConvFCHead:
        assert_close(head(x), stock(x), atol=1e-4, rtol=1e-3)
    else:
        assert_close(head.layers(x), stock.layers(x), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("kind", "arguments"), [(WSFastRCNNConvFCHead, BOX), (WSMaskRCNNConvUpsampleHead, MASK)]
)
def test_from_a_lazy_config(kind, arguments):
    norm = functools.partial(BatchChannelNorm2d, update_rate=0.5)
    lazy = LazyCall(kind)(input_shape=SHAPE, **arguments, conv_norm=norm)
    head = instantiate(lazy)
    assert len(standardized(head)) == 2
    rates = [m.momentum for m in head.modules() if isinstance(m, EstimatedBatchNorm2d)]
    assert rates == [0.5, 0.5]


def test_the_norms_own_rate_is_kept_unless_one_is_given():
    head = WSFastRCNNConvFCHead(
        SHAPE, **BOX, conv_norm=lambda c: EstimatedBatchNorm2d(c, 1e-5, 0.3)
    )
    assert [m.momentum for m in head.modules() if isinstance(m, EstimatedBatchNorm2d)] == [0.3] * 2


def test_two_fc_layers_without_norm_have_nothing_to_standardize():
    head = WSFastRCNNConvFCHead(SHAPE, conv_dims=[], fc_dims=[16, 16])
    assert standardized(head) == set()
    assert head(torch.randn(2, 8, 5, 5)).shape == (2, 16)
    head = WSFastRCNNConvFCHead(SHAPE, **BOX)  # convolutions, but without a norm
    assert standardized(head) == set()


@pytest.mark.parametrize("norm", ["GN", "BCN", "EstBN"])
def test_no_boxes(norm):
    for head in (
        WSFastRCNNConvFCHead(SHAPE, **BOX, conv_norm=norm),
        WSMaskRCNNConvUpsampleHead(SHAPE, **MASK, conv_norm=norm),
    ):
        before = {k: v.clone() for k, v in head.state_dict().items()}
        run = head if isinstance(head, WSFastRCNNConvFCHead) else head.layers
        run(torch.zeros(0, 8, 5, 5, requires_grad=True)).sum().backward()
        for name, parameter in head.named_parameters():
            assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name
        assert_close(head.state_dict(), before, rtol=0, atol=0)


def test_an_image_without_objects_trains(tiny_cfg, make_batch):
    """No foreground box reaches the mask head; every parameter still gets a gradient."""
    model = build_model(tiny_cfg())
    batch = make_batch()
    empty = Instances((96, 96))
    empty.gt_boxes = batch[0]["instances"].gt_boxes[:0]
    empty.gt_classes = torch.zeros(0, dtype=torch.long)
    empty.gt_masks = batch[0]["instances"].gt_masks[torch.zeros(2, dtype=torch.bool)]
    batch[0]["instances"] = empty
    with EventStorage(0):
        sum(model(batch).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    norm = model.roi_heads.mask_head.mask_fcn1.norm.bn
    assert norm.num_batches_tracked == 0 and (norm.running_var == 1).all()


@pytest.mark.parametrize("kind", ["ws", "wn", "cwn"])
def test_options_of_a_config_reach_every_part(kind, tiny_cfg):
    cfg = tiny_cfg("MODEL.WS.KIND", kind, "MODEL.WS.FORMULA", "biased", "MODEL.WS.EPS", 0.125)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
        cfg.MODEL.META_ARCHITECTURE = "WSRetinaNet"
        cfg.MODEL.BACKBONE.NAME = "build_ws_retinanet_resnet_fpn_backbone"
        cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
        cfg.MODEL.RETINANET.NORM = "GN"
        retinanet = build_model(cfg)
    for part in (
        *(model.backbone.bottom_up, model.backbone.fpn_lateral2, model.roi_heads.box_head),
        *(model.roi_heads.mask_head, retinanet.backbone, retinanet.head),
    ):
        convs = [m for m in part.modules() if hasattr(m, "ws_eps")]
        found = {(conv.ws_formula, conv.ws_eps) for conv in convs}
        assert found == {("biased" if kind == "ws" else kind, 0.125)}


def test_c4_heads():
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "meta"
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.BACKBONE.NAME = "build_ws_resnet_backbone"
    cfg.MODEL.RESNETS.NORM = "BCN"
    cfg.MODEL.ROI_HEADS.NAME = "WSRes5ROIHeads"
    cfg.MODEL.ROI_MASK_HEAD.NAME = "WSMaskRCNNConvUpsampleHead"
    cfg.MODEL.WS.FORMULA, cfg.MODEL.BCN.UPDATE_RATE = "unbiased_std", 0.05
    with torch.device("meta"):
        heads = build_model(cfg).roi_heads
    assert isinstance(heads, WSRes5ROIHeads)
    convs = [f"{i}.conv{j}" for i in range(3) for j in (1, 2, 3)]
    assert standardized(heads) == {f"res5.{name}" for name in ("0.shortcut", *convs)}
    assert {c.ws_formula for c in heads.modules() if type(c) is WSConv2d} == {"unbiased_std"}
    rates = {m.momentum for m in heads.modules() if isinstance(m, EstimatedBatchNorm2d)}
    assert rates == {0.05}
