"""Each detector format with each kind of predictor, in float64: class k stays class k.

The source's outputs are computed here from the source's own tensors and conventions (which row is
the background, what an agnostic predictor has); the converted ones by Detectron2's layers.
"""

import itertools

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from torch.nn import functional as F

from wsbcn_d2.checkpoint import CheckpointError, Options, convert

from .. import ours
from .. import source_models as src

WIDTH, FC = 32, 8
BACKBONES = {"GN": src.Net(norm_name="gn"), "BN": src.Net(norm="BN", ws="")}


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


def mmdet(version, classes, agnostic, mask, bias):
    """A small detector in mmdetection's names; ``bias``: plain convolutions in place of norms."""
    roi, first = ("roi_head." if version > 1 else ""), int(version == 1)
    state = {}

    def conv(name, out, inputs, kernel, norm=not bias):
        state[f"{name}.weight"] = random(out, inputs, kernel, kernel)
        if norm:
            name = name.removesuffix(".conv") + ".gn"
            state[f"{name}.weight"] = random(out)
        state[f"{name}.bias"] = random(out)

    for name, shape in resnet18("bn" if bias else "gn", bias):
        state[f"backbone.{name}"] = torch.ones(shape, dtype=torch.float64)
    for level in range(4):
        conv(f"neck.lateral_convs.{level}.conv", WIDTH, 64 * 2**level, 1)
        conv(f"neck.fpn_convs.{level}.conv", WIDTH, WIDTH, 3)
    conv("rpn_head.rpn_conv", WIDTH, WIDTH, 3, False)
    conv("rpn_head.rpn_cls", 3, WIDTH, 1, False)
    conv("rpn_head.rpn_reg", 12, WIDTH, 1, False)
    conv(f"{roi}bbox_head.shared_convs.0.conv", WIDTH, WIDTH, 3)

    def linear(name, out, inputs):
        state[f"{roi}bbox_head.{name}.weight"] = random(out, inputs)
        state[f"{roi}bbox_head.{name}.bias"] = random(out)

    linear("shared_fcs.0", FC, WIDTH * 49)
    linear("fc_cls", classes + 1, FC)
    linear("fc_reg", 4 if agnostic else 4 * (classes + first), FC)
    if mask:
        conv(f"{roi}mask_head.convs.0.conv", WIDTH, WIDTH, 3)
        state[f"{roi}mask_head.upsample.weight"] = random(WIDTH, WIDTH, 2, 2)
        state[f"{roi}mask_head.upsample.bias"] = random(WIDTH)
        rows = 1 if mask == "agnostic" else classes + first
        conv(f"{roi}mask_head.conv_logits", rows, WIDTH, 1, False)
    names = [f"{roi}bbox_head.fc_cls", f"{roi}bbox_head.fc_reg", f"{roi}mask_head.conv_logits"]
    return state, names, first


def resnet18(norm, batch):
    """(name, shape) of a basic-block ResNet."""

    def with_norm(name, out):
        yield from ((f"{name}.{part}", (out,)) for part in ("weight", "bias"))
        if batch:
            yield from ((f"{name}.{part}", (out,)) for part in ("running_mean", "running_var"))

    yield "conv1.weight", (64, 3, 7, 7)
    yield from with_norm(f"{norm}1", 64)
    channels = 64
    for stage in range(4):
        out = 64 * 2**stage
        for block in range(2):
            name = f"layer{stage + 1}.{block}."
            for number, inputs in ((1, channels), (2, out)):
                yield f"{name}conv{number}.weight", (out, inputs, 3, 3)
                yield from with_norm(f"{name}{norm}{number}", out)
            if channels != out:
                yield f"{name}downsample.0.weight", (out, channels, 1, 1)
                yield from with_norm(f"{name}downsample.1", out)
            channels = out


def caffe2(classes, agnostic, mask, bias):
    """The same in Detectron's blobs, background first; its agnostic boxes have 2 x 4 rows."""
    state = {}

    def put(name, *shape, gn=False):
        state[f"{name}_w"] = random(*shape)
        if gn:
            state[f"{name}_gn_s"] = random(shape[0])
        state[f"{name}_gn_b" if gn else f"{name}_b"] = random(shape[0])

    torch_style = {n: torch.ones(s, dtype=torch.float64) for n, s in resnet18("bn", False)}
    state |= src.caffe2_names(torch_style)
    if bias:  # batch norms of which only scale and bias are left, as MSRA's
        state = {n.replace("_gn_", "_bn_"): v for n, v in state.items()}
        state = {n.replace("conv1_bn", "res_conv1_bn"): v for n, v in state.items()}
    for stage, last in zip((2, 3, 4, 5), (1, 1, 1, 1), strict=True):
        top = f"fpn_inner_res{stage}_{last}_sum" + ("" if stage == 5 else "_lateral")
        put(top, WIDTH, 64 * 2 ** (stage - 2), 1, 1, gn=not bias)
        put(f"fpn_res{stage}_{last}_sum", WIDTH, WIDTH, 3, 3, gn=not bias)
    put("conv_rpn_fpn2", WIDTH, WIDTH, 3, 3)
    put("rpn_cls_logits_fpn2", 3, WIDTH, 1, 1)
    put("rpn_bbox_pred_fpn2", 12, WIDTH, 1, 1)
    put("head_conv1", WIDTH, WIDTH, 3, 3, gn=not bias)
    put("fc6", FC, WIDTH * 49)
    put("cls_score", classes + 1, FC)
    put("bbox_pred", 8 if agnostic else 4 * (classes + 1), FC)
    if mask:
        put("_[mask]_fcn1", WIDTH, WIDTH, 3, 3, gn=not bias)
        put("conv5_mask", WIDTH, WIDTH, 2, 2)
        put("mask_fcn_logits", 1 if mask == "agnostic" else classes + 1, WIDTH, 1, 1)
    return state, ["cls_score", "bbox_pred", "mask_fcn_logits"], 1


MAKERS = {
    "mmdet1": lambda *a: mmdet(1, *a),
    "mmdet2": lambda *a: mmdet(2, *a),
    "caffe2": caffe2,
}
CASES = list(
    itertools.product(
        MAKERS, (1, 3, 80), (False, True), ("", "agnostic", "specific"), (False, True)
    )
)


def part(state, name, kind):
    return state[
        name + ({"weight": "_w", "bias": "_b"}[kind] if name + "_w" in state else f".{kind}")
    ]


@pytest.mark.parametrize("kind, classes, agnostic, mask, bias", CASES)
def test_class_k_stays_class_k(kind, classes, agnostic, mask, bias):
    state, names, first = MAKERS[kind](classes, agnostic, mask, bias)
    converted, report = convert({"state_dict": state})
    assert report.detector == ("mask_rcnn" if mask else "faster_rcnn")
    assert report.metadata.norm == ("BN" if bias else "GN")
    heads = "" if bias else "GN"
    lines = report.config_lines()
    assert f'MODEL.FPN.NORM: "{heads}"' in lines
    # As MSRA's networks of old; Detectron's own GN ones have it in the 3x3.
    assert f"MODEL.RESNETS.STRIDE_IN_1X1: {kind == 'caffe2' and bias}" in lines

    predictor = FastRCNNOutputLayers(
        ShapeSpec(channels=FC),
        box2box_transform=Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
        num_classes=classes,
        cls_agnostic_bbox_reg=agnostic,
    ).double()
    prefix = "roi_heads.box_predictor."
    predictor.load_state_dict(
        {n.removeprefix(prefix): v for n, v in converted.items() if n.startswith(prefix)}
    )
    x = random(5, FC)
    scores, boxes = predictor(x)
    got = [scores, boxes, None]
    want = [F.linear(x, part(state, n, "weight"), part(state, n, "bias")) for n in names[:2]]
    for k in range(classes):
        assert torch.allclose(got[0][:, k], want[0][:, k + first], rtol=0, atol=1e-12)
    background = 0 if first else classes
    assert torch.allclose(got[0][:, classes], want[0][:, background], rtol=0, atol=1e-12)
    rows = want[1].view(5, -1, 4)
    for k in range(1 if agnostic else classes):
        # mmdetection's agnostic boxes are one row of four, Detectron's are those of the foreground
        source = 0 if agnostic and kind != "caffe2" else k + first
        assert torch.allclose(got[1].view(5, -1, 4)[:, k], rows[:, source], rtol=0, atol=1e-12)
    assert got[1].shape == (5, 4 if agnostic else 4 * classes)
    if mask:
        x = random(2, WIDTH, 3, 3)
        weight, b = (part(state, names[2], p) for p in ("weight", "bias"))
        want = F.conv2d(x, weight, b)
        logits = "roi_heads.mask_head.predictor."
        got = F.conv2d(x, converted[logits + "weight"], converted[logits + "bias"])
        assert got.shape[1] == (1 if mask == "agnostic" else classes)
        for k in range(got.shape[1]):
            source = 0 if mask == "agnostic" else k + first
            assert torch.allclose(got[:, k], want[:, source], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("change", [-1, 1, "empty", "flat"])
def test_rows_of_no_convention_are_refused(kind, which, change):
    state, names, _ = MAKERS[kind](3, False, "specific", False)
    for suffix in ("weight", "bias"):
        key = next(
            k for k in (f"{names[which]}.{suffix}", f"{names[which]}_{suffix[0]}") if k in state
        )
        tensor = state[key]
        if change == "empty":
            state[key] = tensor[:0]
        elif change == "flat":
            state[key] = torch.ones((), dtype=torch.float64)
        else:
            state[key] = random(tensor.shape[0] + change, *tensor.shape[1:])
    with pytest.raises(CheckpointError) as caught:
        convert(state)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("statistics", ["none", "rm, riv"])
@pytest.mark.parametrize("where", ["conv1", "res2_0_branch2a", "res3_1_branch2b"])
def test_a_convolutions_bias_is_taken_up_by_the_batch_norm(where, statistics):
    """y = s (W x + c - m) / sqrt(v + eps) + b, in the stem and in a block."""
    gen = {n: torch.ones(s, dtype=torch.float64) for n, s in resnet18("bn", False)}
    blobs = {n.replace("_gn_", "_bn_"): v for n, v in src.caffe2_names(gen).items()}
    blobs = {n.replace("conv1_bn", "res_conv1_bn"): v for n, v in blobs.items()}
    norms = [n.removesuffix("_bn_s") for n in blobs if n.endswith("_bn_s")]
    for name in norms:
        channels = len(blobs[f"{name}_bn_s"])
        blobs[f"{name}_bn_s"], blobs[f"{name}_bn_b"] = random(channels), random(channels)
        if statistics != "none":
            blobs[f"{name}_bn_rm"] = random(channels)
            blobs[f"{name}_bn_riv"] = torch.rand(channels, dtype=torch.float64) + 0.5
    norm = "res_conv1" if where == "conv1" else where
    blobs[f"{where}_w"] = random(*blobs[f"{where}_w"].shape)
    blobs[f"{where}_b"] = random(len(blobs[f"{norm}_bn_s"]))
    converted, report = convert(blobs, Options(target="resnet", norm="BN"))
    assert report.dropped[f"{where}_b"].startswith("bias of a convolution")
    weight = blobs[f"{where}_w"]
    x = random(1, weight.shape[1], 9, 9)
    s, b = (blobs[f"{norm}_bn_{p}"].view(1, -1, 1, 1) for p in "sb")
    want = F.conv2d(x, weight, blobs[f"{where}_b"])
    if statistics != "none":
        mean, var = (blobs[f"{norm}_bn_{p}"].view(1, -1, 1, 1) for p in ("rm", "riv"))
        want = (want - mean) / torch.sqrt(var + 1e-5)
    want = want * s + b
    cfg = ours.config(18, norm="BN", formula="none")
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    model = ours.bottom_up(cfg).double()
    model.load_state_dict(converted, strict=False)
    stage, block, number = (None, None, 1)
    if where != "conv1":
        stage, block = where[:4], int(where[5])
        number = "ab".index(where[-1]) + 1
    conv = (
        model.stem.conv1
        if stage is None
        else getattr(getattr(model, stage)[block], f"conv{number}")
    )
    conv.activation = None
    with torch.no_grad():
        got = conv.norm(F.conv2d(x, conv.weight))
    assert torch.allclose(got, want, rtol=0, atol=1e-10)


def test_a_bias_before_a_group_norm_is_refused():
    gen = {n: torch.ones(s, dtype=torch.float64) for n, s in resnet18("bn", False)}
    blobs = src.caffe2_names(gen) | {"conv1_b": torch.zeros(64)}
    assert "conv1_b" in convert(blobs)[1].dropped
    blobs["conv1_b"] = torch.ones(64)
    with pytest.raises(CheckpointError, match="conv1_b is not zero and no batch norm follows"):
        convert(blobs)


def test_version_1_without_what_its_rows_tell():
    """Class-agnostic boxes and no mask: 81 and 4 rows fit both, and the names decide."""
    for version, prefix in ((1, ""), (2, "roi_head.")):
        state, _, _ = mmdet(version, 80, True, "", False)
        converted, report = convert(state)
        bias = converted["roi_heads.box_predictor.cls_score.bias"]
        want = state[f"{prefix}bbox_head.fc_cls.bias"]
        assert torch.equal(bias, torch.cat([want[1:], want[:1]]) if version == 1 else want)
        assert any("version 1" in note for note in report.notes) == (version == 1)
