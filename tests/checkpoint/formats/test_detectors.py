"""Whole detectors of mmdetection, and Caffe2 files."""

import functools

import pytest
import torch

from wsbcn_d2.checkpoint import CheckpointError, Options, convert

from .. import ours
from .. import source_models as src
from ..parity import error

R50 = {
    "mmdet2": (src.Net(prefix="backbone.", norm_name="gn"), src.mmdet_heads(2)),
    "mmdet1": (src.Net(prefix="backbone.", norm_name="gn"), src.mmdet_heads(1)),
}


def entries(kind, mask=True, net=None):
    own, heads = R50[kind]
    yield from src.resnet_entries(net or own, classifier=False)
    yield from src.head_entries(heads, mask)


@functools.lru_cache(1)
def inputs():
    gen = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=gen)

    features = [random(1, 256 * 2**i, 16 // 2**i, 16 // 2**i).relu() for i in range(4)]
    return features, random(2, 256, 7, 7), random(1, 256, 14, 14)


@pytest.mark.slow
@pytest.mark.parametrize("mask", [True, False], ids=["mask", "faster"])
@pytest.mark.parametrize("kind", R50)
def test_outputs_equal_the_sources(kind, mask):
    net, heads = R50[kind]
    state = src.random_state(entries(kind, mask))
    count = 223 if mask else 207
    assert len(state) == count
    converted, report = convert({"state_dict": state, "meta": {}, "iteration": 1})
    assert report.keys_in == count and len(report.mapped) == (223 if mask else 207)
    assert not report.dropped
    assert report.detector == ("mask_rcnn" if mask else "faster_rcnn")
    assert report.metadata.ws_formula == "unbiased_std"
    assert report.metadata.input_format == "RGB"
    lines = report.config_lines()
    assert 'MODEL.ROI_BOX_HEAD.NAME: "WSFastRCNNConvFCHead"' in lines
    assert f"MODEL.MASK_ON: {mask}" in lines

    model = ours.Parts(ours.config(formula="unbiased_std", mask=mask)).double()
    model.load_state_dict(converted, strict=True)
    features, boxes, masks = inputs()
    masks = masks if mask else None
    want = src.detector_forward(state, heads, features, boxes, masks)
    got = model.detect(features, boxes, masks)
    assert set(got) == set(want) and len(want) == 8 + mask
    assert {name: error(got[name], want[name]) < 1e-10 for name in want} == dict.fromkeys(
        want, True
    )
    # The ResNet inside is the one of test_backbones under another prefix: stem and one block do.
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        want_features = src.resnet_forward(state, net, image)
        got_features = model.backbone.bottom_up(image)
    assert error(got_features["res5"], want_features[3]) < 1e-10
    # 61 = 8 FPN + 53 backbone, 4 box and 4 mask convs: all show a wrong formula, the RPN none.
    assert ours.set_formula(model, "unbiased") == (69 if mask else 65)
    wrong = model.detect(features, boxes, masks)
    assert all(error(wrong[n], want[n]) > 1e-3 for n in want)
    # float32: FPN and heads are few layers deep.
    ours.set_formula(model, "unbiased_std")
    single = masks.float() if mask else None
    got = model.float().detect([f.float() for f in features], boxes.float(), single)
    assert {name: error(got[name], want[name]) < 1e-6 for name in want} == dict.fromkeys(want, True)


@pytest.mark.parametrize(
    "net", [dict(groups=32, width=4), dict(depth=101), dict(depth=101, groups=32, width=4)]
)
def test_other_backbones_by_shape(net, kind="mmdet2"):
    own, _ = R50[kind]
    net = src.Net(**net, prefix=own.prefix, stem=own.stem, norm_name=own.norm_name)
    state = {n: torch.empty(shape, device="cpu") for n, shape in entries(kind, net=net)}
    converted, report = convert(state)
    assert len(converted) == (376 if net.depth == 101 else 223)
    assert (report.layout.depth, report.layout.groups) == (net.depth, net.groups)
    with torch.device("meta"):
        cfg = ours.config(net.depth, net.groups, net.width, "GN", "unbiased_std")
        expected = {k: tuple(v.shape) for k, v in ours.Parts(cfg).state_dict().items()}
    assert {k: tuple(v.shape) for k, v in converted.items()} == expected


def rows(kind):
    """A detector whose predictor rows carry their own number."""
    state = {name: torch.zeros(shape) for name, shape in entries(kind)}
    _, heads = R50[kind]
    for name in (heads.cls, heads.reg, heads.logits):
        for part in (f"{name}.weight", f"{name}.bias"):
            values = torch.arange(len(state[part]), dtype=torch.float32)
            shape = [-1] + [1] * (state[part].dim() - 1)
            state[part] = values.view(shape).expand_as(state[part]).contiguous()
    return state


def test_background_rows_are_cut_in_weights_and_biases_alike():
    converted, _ = convert(rows("mmdet1"))
    for part in ("weight", "bias"):
        predictor = "roi_heads.box_predictor."
        cls = converted[f"{predictor}cls_score.{part}"].reshape(81, -1)[:, 0]
        reg = converted[f"{predictor}bbox_pred.{part}"].reshape(320, -1)[:, 0]
        mask = converted[f"roi_heads.mask_head.predictor.{part}"].reshape(80, -1)[:, 0]
        assert cls.tolist() == [*range(1, 81), 0]
        assert reg.tolist() == list(range(4, 324))
        assert mask.tolist() == list(range(1, 81))


@pytest.mark.parametrize("kind", R50)
def test_no_tensor_carries_more_than_its_own_numbers(kind):
    """A view would be saved with all that it is a view of."""
    for name, value in convert(rows(kind))[0].items():
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), name


def test_later_mmdetection_keeps_its_rows():
    converted, report = convert(rows("mmdet2"))
    bias = converted["roi_heads.box_predictor.cls_score.bias"]
    assert bias.tolist() == list(range(81)) and not any("version 1" in n for n in report.notes)


@pytest.mark.parametrize(
    "kind, name, count, message",
    [
        ("mmdet2", "roi_head.bbox_head.fc_reg.weight", 321, "fit no mmdetection version"),
        ("mmdet2", "roi_head.bbox_head.fc_reg.bias", 324, "fit no|expected 324 and 81"),
        ("mmdet1", "mask_head.conv_logits.bias", 80, "mask rows"),
    ],
)
def test_rows_that_do_not_fit_are_refused(kind, name, count, message):
    state = rows(kind)
    old = state[name]
    state[name] = torch.zeros((count, *old.shape[1:]))
    with pytest.raises(CheckpointError, match=message):
        convert(state)


@pytest.mark.parametrize("kind", R50)
@pytest.mark.parametrize("what", ["missing", "extra", "transposed"])
def test_damaged_detectors_are_refused(kind, what):
    state = rows(kind)
    _, heads = R50[kind]
    if what == "missing":
        del state[heads.box_conv[2][1] + ".bias"]
        message = "1 parameters are missing: roi_heads.box_head.conv3.norm.bias"
    elif what == "extra":
        state["surprise.weight"] = torch.zeros(1)
        message = "1 keys are unknown to the .*: surprise.weight"
    else:
        state[heads.fc + ".weight"] = state[heads.fc + ".weight"].t()
        message = "wrong shape"
    with pytest.raises(CheckpointError, match=message):
        convert(state)


@pytest.mark.parametrize(
    "config, formula",
    [("conv_cfg = dict(type='ConvWS')", "unbiased_std"), ("norm_cfg = dict(type='GN')", "none")],
)
def test_mmdetections_own_config_tells_the_formula(config, formula):
    data = {"state_dict": rows("mmdet2"), "meta": {"config": config}}
    report = convert(data)[1]
    assert report.metadata.ws_formula == formula
    assert report.metadata.input_format == ("RGB" if formula != "none" else "BGR")
    data["meta"]["config"] = "ConvAWS"
    with pytest.raises(CheckpointError, match="ConvAWS"):
        convert(data)


def caffe2(dtype=torch.float32):
    return src.caffe2_names(src.random_state(src.resnet_entries(src.Net()), dtype=dtype))


@pytest.mark.slow
def test_caffe2_backbone():
    torch_style = src.random_state(src.resnet_entries(src.Net()))
    blobs = src.caffe2_names(torch_style) | {"conv1_w_momentum": torch.zeros(1)}
    converted, report = convert(blobs, Options(source_name="R-50-GN-WS.pkl"))
    direct, _ = convert(torch_style)
    assert set(converted) == set(direct)
    assert all(torch.equal(converted[name], direct[name]) for name in direct)
    assert set(report.dropped) == {"pred_w", "pred_b", "conv1_w_momentum"}
    assert report.metadata.ws_formula == "unbiased_std"
    assert report.metadata.input_format == "BGR" and report.metadata.pixel_std == (1.0, 1.0, 1.0)
    plain = convert(blobs, Options(source_name="R-50-GN.pkl"))[1].metadata
    assert plain.ws_formula == "none"
    # and through the source's forward pass
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    want = src.resnet_forward(torch_style, src.Net(), image)[3]
    model = ours.bottom_up(ours.config(formula="unbiased_std")).double()
    model.load_state_dict({k.removeprefix("backbone.bottom_up."): v for k, v in converted.items()})
    with torch.no_grad():
        assert error(model(image)["res5"], want) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("bias", [0.0, 0.7])
def test_msra_affine_layers(bias):
    """Caffe2's MSRA files: batch norm folded to y = s x + b, stride in the 1x1, bias on conv1."""
    blobs = {}
    for name, tensor in caffe2(torch.float64).items():
        name = name.replace("_gn_", "_bn_").replace("conv1_bn", "res_conv1_bn")
        blobs[name.replace("pred_", "fc1000_")] = tensor
    blobs["conv1_b"] = torch.full((64,), bias, dtype=torch.float64)
    kept, report = convert({"blobs": blobs}, Options(norm="BN"))
    assert set(report.dropped) == {"fc1000_w", "fc1000_b", "conv1_b"}
    assert "MODEL.RESNETS.STRIDE_IN_1X1: True" in report.config_lines()

    cfg = ours.config(norm="FrozenBN", formula="none", fpn_norm="")
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = True
    model = ours.bottom_up(cfg).double()
    bare = {k.removeprefix("backbone.bottom_up."): v for k, v in kept.items()}
    missing, unexpected = model.load_state_dict(bare, strict=False)
    assert not missing and all(k.endswith("num_batches_tracked") for k in unexpected)
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)

    def affine(x, name):
        return x * blobs[f"{name}_bn_s"].view(1, -1, 1, 1) + blobs[f"{name}_bn_b"].view(1, -1, 1, 1)

    conv = torch.nn.functional.conv2d
    x = affine(conv(image, blobs["conv1_w"], blobs["conv1_b"], 2, 3), "res_conv1").relu()
    x = torch.nn.functional.max_pool2d(x, 3, 2, 1)
    y = affine(conv(x, blobs["res2_0_branch2a_w"]), "res2_0_branch2a").relu()
    y = affine(conv(y, blobs["res2_0_branch2b_w"], None, 1, 1), "res2_0_branch2b").relu()
    y = affine(conv(y, blobs["res2_0_branch2c_w"]), "res2_0_branch2c")
    want = (y + affine(conv(x, blobs["res2_0_branch1_w"]), "res2_0_branch1")).relu()
    with torch.no_grad():
        assert error(model.res2[0](model.stem(image)), want) < 1e-10
    bcn, report = convert({"blobs": blobs})
    assert report.metadata.norm == "BCN" and len(bcn) == 424
    counters = {int(v) for k, v in bcn.items() if k.endswith("num_batches_tracked")}
    assert counters == {1}


def test_detectron_gn_detector():
    """Detectron's own 4conv1fc GN Mask R-CNN: every blob lands under Detectron2's name."""
    blobs = {k: v for k, v in caffe2().items() if not k.startswith("pred_")}
    gen = torch.Generator().manual_seed(0)

    def put(name, *shape, gn=False):
        blobs[f"{name}_w"] = torch.randn(shape, generator=gen)
        rows = shape[0]
        if gn:
            blobs[f"{name}_gn_s"], blobs[f"{name}_gn_b"] = torch.ones(rows), torch.zeros(rows)
        else:
            blobs[f"{name}_b"] = torch.randn(rows, generator=gen)

    for stage, last in zip((2, 3, 4, 5), (2, 3, 5, 2), strict=True):
        top = f"fpn_inner_res{stage}_{last}_sum"
        put(top + ("" if stage == 5 else "_lateral"), 256, 256 * 2 ** (stage - 2), 1, 1, gn=True)
        put(f"fpn_res{stage}_{last}_sum", 256, 256, 3, 3, gn=True)
    put("conv_rpn_fpn2", 256, 256, 3, 3)
    put("rpn_cls_logits_fpn2", 3, 256, 1, 1)
    put("rpn_bbox_pred_fpn2", 12, 256, 1, 1)
    for i in range(1, 5):
        put(f"head_conv{i}", 256, 256, 3, 3, gn=True)
        put(f"_[mask]_fcn{i}", 256, 256, 3, 3, gn=True)
    put("fc6", 1024, 256 * 49)
    put("cls_score", 81, 1024)
    put("bbox_pred", 324, 1024)
    put("conv5_mask", 256, 256, 2, 2)
    put("mask_fcn_logits", 81, 256, 1, 1)
    converted, report = convert({"blobs": blobs, "cfg": "MODEL: ..."})
    assert report.detector == "mask_rcnn" and report.metadata.ws_formula == "none"
    assert report.metadata.pixel_mean == (102.9801, 115.9465, 122.7717)
    with torch.device("meta"):
        expected = ours.Parts(ours.config(formula="none")).state_dict()
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in expected.items()}
    bias = converted["roi_heads.box_predictor.cls_score.bias"]
    assert torch.equal(bias, torch.cat([blobs["cls_score_b"][1:], blobs["cls_score_b"][:1]]))
    bias = converted["roi_heads.mask_head.predictor.bias"]
    assert torch.equal(bias, blobs["mask_fcn_logits_b"][1:])
    assert bias.untyped_storage().nbytes() == 80 * 4, "a view would drag the background along"


def test_detectron2_names_and_targets():
    direct, _ = convert({n: torch.zeros(s) for n, s in src.resnet_entries(src.Net())})
    bare = {k.removeprefix("backbone.bottom_up."): v for k, v in direct.items()}
    zoo = bare | {"stem.fc.weight": torch.zeros(1), "stem.fc.bias": torch.zeros(1)}
    again, report = convert(zoo)
    assert set(again) == set(direct) and set(report.dropped) == {"stem.fc.weight", "stem.fc.bias"}
    assert report.metadata.ws_formula is None, "Detectron2's names say nothing about WS"
    c4, _ = convert(zoo, Options(target="c4"))
    assert {"backbone.stem.conv1.weight", "roi_heads.res5.0.conv1.weight"} < set(c4)
    back, _ = convert(c4, Options(target="resnet"))
    assert set(back) == set(bare)
    with pytest.raises(CheckpointError, match="1 keys are no part of a ResNet: surprise.weight"):
        convert(zoo | {"surprise.weight": torch.zeros(1)})
    for name in ("stem.conv2.weight", "res2.0.conv1.norm.extra", "res5.2.conv4.weight"):
        with pytest.raises(CheckpointError, match=f"1 are not part of this architecture: {name}$"):
            convert(bare | {name: torch.zeros(1)})
    detector, _ = convert(rows("mmdet2"))
    with pytest.raises(CheckpointError, match="not part of .*: backbone.fpn_lateral2.bias$"):
        convert(rows("mmdet2") | {"neck.lateral_convs.0.conv.bias": torch.zeros(256)})
    with pytest.raises(CheckpointError, match="heads of this fpn detector do not fit a c4"):
        convert(detector, Options(target="c4"))
    only, report = convert(detector, Options(target="resnet"))
    assert set(only) == set(bare)
    assert set(report.dropped.values()) == {"not part of a resnet target"}
    with pytest.raises(CheckpointError, match="'retina' is not one of fpn, resnet, c4"):
        Options(target="retina")
