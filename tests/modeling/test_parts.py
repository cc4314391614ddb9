"""``MODEL.WS.PARTS``: WS in any model; what is standardized, what is said of the rest."""

import logging

import detectron2.modeling.meta_arch.build as meta_arch
import pytest
import torch
from conftest import ROOT
from detectron2.engine import DefaultPredictor, DefaultTrainer
from detectron2.layers import Conv2d
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from model_families import FAMILIES, a_batch
from torch import nn

from wsbcn_d2 import BatchChannelNorm2d, EstimatedBatchNorm2d, WSConv2d, fold, get_cfg
from wsbcn_d2.checkpoint import (
    METADATA_KEY,
    CheckpointError,
    LoadExpectation,
    WSBCNCheckpointer,
)
from wsbcn_d2.layers import CWNConv2d, WNConv2d, standardize_weight
from wsbcn_d2.modeling import standardize_parts
from wsbcn_d2.modeling.parts import register_preparation

# What a test below made; configs/README.md shows it.
TABLE = """
| model | norm | WS | convolutions standardized | plain, without a norm |
|---|---|---|---|---|
| Mask R-CNN | yes | yes | 63 | 5 |
| Cascade R-CNN | yes | yes | 65 | 5 |
| Keypoint R-CNN | yes | yes | 62 | 12 |
| Panoptic FPN | yes | yes | 70 | 6 |
| Semantic FPN | yes | yes | 68 | 1 |
| RetinaNet, stock head | yes | yes | 67 | 4 |
| FCOS | yes | yes | 67 | 5 |
| RegNetX | yes | yes | 82 | 9 |
| RegNetY | yes | yes | 79 | 53 |
| DeepLab V3 | yes | yes | 60 | 2 |
| DeepLab V3+ | yes | yes | 63 | 2 |
| Panoptic-DeepLab | yes | yes | 83 | 5 |
| PointRend | yes | yes | 62 | 4 |
"""


def standardized(model):
    return {name for name, m in model.named_modules() if isinstance(m, WSConv2d)}


def normalized(model):
    """Names of convolutions that a norm follows, counted another way: in the order of running."""
    order, names = [], {module: name for name, module in model.named_modules()}
    own = {getattr(module, "norm", None) for module in model.modules()}  # run within
    own |= {module.bn for module in model.modules() if isinstance(module, BatchChannelNorm2d)}
    hooks = [
        m.register_forward_hook(lambda module, *_: order.append(module))
        for m in model.modules()
        if isinstance(m, nn.Conv2d) or ("Norm" in type(m).__name__ and m not in own)
    ]
    model.eval()
    with torch.no_grad():
        model(a_batch())
    for hook in hooks:
        hook.remove()
    result = {names[m] for m in order if getattr(m, "norm", None) is not None}
    for one, after in zip(order, order[1:], strict=False):
        if isinstance(one, nn.Conv2d) and "Norm" in type(after).__name__:
            result.add(names[one])
    return result


@pytest.mark.slow
@pytest.mark.rotated(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_a_step_and_evaluates(family):
    model = FAMILIES[family]()
    ws = standardized(model)
    plain = [
        n
        for n, m in model.named_modules()
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) and n not in ws
    ]
    assert {n for n, m in model.named_modules() if isinstance(m, BatchChannelNorm2d)}
    model.train()
    with EventStorage():
        losses = model(a_batch())
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    weights = dict(model.named_parameters())
    assert all(weights[f"{name}.weight"].grad is not None for name in ws)
    model.eval()
    with torch.no_grad():
        assert model(a_batch())
    assert ws == normalized(model), ws ^ normalized(model)
    assert f"| {family} | yes | yes | {len(ws)} | {len(plain)} |" in TABLE.splitlines()


# The parts.


REGNET = "COCO-InstanceSegmentation/mask_rcnn_regnetx_4gf_dds_fpn_1x.py"


def tiny(tiny_cfg, *options):
    """The tiny Mask R-CNN from stock builders, where nothing else standardizes."""
    stock = [
        *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
        *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"),
        *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
    ]
    return tiny_cfg(*stock, *options)


def test_nothing_is_standardized_by_default(tiny_cfg):
    assert not standardized(build_model(tiny(tiny_cfg)))


@pytest.mark.parametrize(
    "parts, begin, count",
    [
        (["*"], ("backbone.", "roi_heads."), 21 + 8 + 1 + 1),
        (["backbone"], ("backbone.",), 29),
        (["backbone.bottom_up"], ("backbone.bottom_up.",), 21),
        (
            ["backbone.bottom_up.res[45]"],
            ("backbone.bottom_up.res4", "backbone.bottom_up.res5"),
            10,
        ),
        (["backbone.fpn_*"], ("backbone.fpn_",), 8),
        (["roi_heads.*_head"], ("roi_heads.box_head", "roi_heads.mask_head"), 2),
        (["backbone", "!backbone.bottom_up"], ("backbone.fpn_",), 8),
        (["*", "!backbone.*", "!roi_heads.mask_head"], ("roi_heads.box_head",), 1),
        (["backbone.bottom_up.stem.conv1"], ("backbone.bottom_up.stem.conv1",), 1),
    ],
)
def test_patterns(parts, begin, count, tiny_cfg):
    names = standardized(build_model(tiny(tiny_cfg, "MODEL.WS.PARTS", parts)))
    assert len(names) == count and all(name.startswith(begin) for name in names)


def test_options_hold_and_names_stay(tiny_cfg):
    stock = build_model(tiny(tiny_cfg)).state_dict()
    options = ["MODEL.WS.PARTS", ["*"], "MODEL.WS.FORMULA", "biased", "MODEL.WS.EPS", 0.03]
    model = build_model(tiny(tiny_cfg, *options))
    assert {(m.ws_formula, m.ws_eps) for m in model.modules() if isinstance(m, WSConv2d)} == {
        ("biased", 0.03)
    }
    assert list(model.state_dict()) == list(stock)
    for kind, conv in (("wn", WNConv2d), ("cwn", CWNConv2d)):
        model = build_model(tiny(tiny_cfg, "MODEL.WS.PARTS", ["*"], "MODEL.WS.KIND", kind))
        assert sum(type(m) is conv for m in model.modules()) == 31
    model = build_model(tiny(tiny_cfg, "MODEL.WS.PARTS", ["*"], "MODEL.WS.KIND", "none"))
    assert not standardized(model)


def test_beside_the_ws_backbones_and_heads(tiny_cfg, caplog):
    with caplog.at_level(logging.INFO):
        model = build_model(tiny_cfg("MODEL.WS.PARTS", ["*"]))
    assert len(standardized(model)) == 31
    line = next(m for m in caplog.messages if m.startswith("WS in"))
    assert line.startswith("WS in 31 of 36 convolutions of *; plain stay 5: ")
    assert "roi_heads.mask_head.predictor (no norm)" in line and "\n" not in line


@pytest.mark.parametrize(
    "parts, message",
    [
        (["head"], "MODEL.WS.PARTS: 'head' fits no module .* there are backbone, "),
        (["backbone.bottom"], "there are .*backbone.bottom_up"),
        (["*", "!rpn"], "MODEL.WS.PARTS: 'rpn' fits no module"),
        (["proposal_generator"], "MODEL.WS.PARTS: nothing to standardize .*rpn_head.conv"),
        (["roi_heads.box_head", "!roi_heads"], "nothing to standardize .* no convolution"),
    ],
)
def test_parts_that_are_refused(parts, message, tiny_cfg):
    with pytest.raises(ValueError, match=message):
        build_model(tiny(tiny_cfg, "MODEL.WS.PARTS", parts))


def test_a_deformable_stage_can_be_left_out(tiny_cfg):
    options = [
        *("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256),
        *("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, False, True]),
    ]
    with pytest.raises(ValueError, match="res5.0.conv2'.*!backbone.bottom_up.res5.0"):
        build_model(tiny(tiny_cfg, *options, "MODEL.WS.PARTS", ["backbone"]))
    parts = ["backbone", "!backbone.bottom_up.res5"]
    model = build_model(tiny(tiny_cfg, *options, "MODEL.WS.PARTS", parts))
    names = standardized(model)
    assert len(names) == 53 - 10 + 8 and not any("res5" in name for name in names)


class Odd(nn.Module):
    """Convolutions that the rule does and does not see."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.conv_bn = nn.BatchNorm2d(8)
        self.other = nn.Conv2d(8, 8, 3, padding="same")
        self.wrong_width = nn.BatchNorm2d(4)
        self.reflecting = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.norm1 = nn.GroupNorm(2, 8)
        self.pointwise = nn.Conv2d(8, 8, 1, groups=8)
        self.norm2 = nn.GroupNorm(2, 8)
        self.up = nn.ConvTranspose2d(8, 8, 2)
        self.norm3 = nn.GroupNorm(2, 8)


@pytest.mark.parametrize(
    "norm, fits",
    [
        (nn.BatchNorm2d(8), True),
        (nn.InstanceNorm2d(8), True),
        (nn.GroupNorm(2, 8), True),
        (nn.LayerNorm(8), True),  # over the last axis: channels, where they are last
        (nn.LayerNorm((4, 5, 8)), True),
        (nn.LayerNorm((8, 4, 5)), False),
        (nn.BatchNorm2d(6), False),
        (nn.Identity(), False),
    ],
    ids=repr,
)
def test_a_norm_is_known_by_its_name_and_width(norm, fits):
    model = nn.ModuleDict({"part": nn.Sequential(nn.Conv2d(3, 8, 3), norm)})
    if fits:
        assert standardized(standardize_parts(model, ["part"])) == {"part.0"}
    else:
        with pytest.raises(ValueError, match=r"no convolution with a norm; there are part\.0"):
            standardize_parts(model, ["part"])


def test_the_rule_on_plain_convolutions(caplog):
    with caplog.at_level(logging.INFO):
        model = standardize_parts(nn.ModuleDict({"odd": Odd()}), ["odd"])
    assert standardized(model) == {"odd.conv"}
    line = caplog.messages[-1]
    for reason in (
        "odd.other (no norm)",
        "odd.reflecting (padding reflect)",
        "odd.pointwise (one element per filter)",
        "odd.up (ConvTranspose2d)",
    ):
        assert reason in line
    assert "WS in 1 of 5" in line
    standardize_parts(model, ["odd.other"])  # named in full: taken
    assert standardized(model) == {"odd.conv", "odd.other"}
    conv = model["odd"].other
    x = torch.randn(2, 8, 5, 5)
    want = nn.functional.conv2d(x, standardize_weight(conv.weight), conv.bias, padding="same")
    torch.testing.assert_close(conv(x), want)
    assert {"norm", "activation"}.isdisjoint(dict(conv.named_children()))
    assert list(conv.state_dict()) == ["weight", "bias"]


@pytest.mark.slow
def test_a_regnet_computes_on_standardized_weights():
    """Against the stock model on weights that were standardized beforehand."""
    model, stock = FAMILIES["RegNetX"]().eval(), FAMILIES["RegNetX"]().eval()
    state = model.state_dict()
    for name in standardized(model):
        state[f"{name}.weight"] = standardize_weight(state[f"{name}.weight"])
    stock.load_state_dict(state)
    for module in stock.modules():
        if isinstance(module, WSConv2d):
            module.__class__ = Conv2d
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for key, value in stock.backbone(x).items():
            torch.testing.assert_close(model.backbone(x)[key], value, rtol=1e-3, atol=1e-4)
        folded = fold(model)
        assert not standardized(folded)
        for key, value in folded.backbone(x).items():
            torch.testing.assert_close(model.backbone(x)[key], value, rtol=1e-3, atol=1e-4)


# Whoever builds it.


def test_detectron2s_own_trainer_and_predictor(tiny_cfg, tmp_path):
    cfg = tiny(tiny_cfg, "MODEL.WS.PARTS", ["backbone"], "MODEL.BCN.UPDATE_RATE", 0.3)
    model = DefaultTrainer.build_model(cfg)
    assert len(standardized(model)) == 29
    norms = [m for m in model.modules() if isinstance(m, EstimatedBatchNorm2d)]
    assert norms and {m.momentum for m in norms} == {0.3}
    assert {int(m.num_batches_tracked) for m in norms} == {0}
    cfg.MODEL.BCN.FIRST_BATCH_INIT = False
    model = DefaultTrainer.build_model(cfg)
    norms = [m for m in model.modules() if isinstance(m, EstimatedBatchNorm2d)]
    assert {int(m.num_batches_tracked) for m in norms} == {1}
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    assert len(standardized(DefaultPredictor(cfg).model)) == 29


@pytest.mark.parametrize(
    "norm, rate, warned", [("EstBN", 0.0, 8), ("EstBN", 0.01, 0), ("BCN", 0.0, 0)]
)
def test_held_estimates_without_a_channel_norm_are_warned_of(tiny_cfg, caplog, norm, rate, warned):
    cfg = tiny(tiny_cfg, "MODEL.FPN.NORM", norm, "MODEL.BCN.UPDATE_RATE", rate)
    with caplog.at_level("WARNING", "wsbcn_d2.modeling.parts"):
        model = build_model(cfg)
    found = [r.getMessage() for r in caplog.records if "EstBN" in r.getMessage()]
    assert len(found) == bool(warned)
    for line in found:
        assert line.startswith(f"{warned} norms (backbone.fpn_lateral2.norm, ...)")
        assert "MODEL.BCN.UPDATE_RATE" in line
    norms = [m for m in model.modules() if isinstance(m, EstimatedBatchNorm2d)]
    assert {m.momentum for m in norms} == {rate}


def test_a_stock_config_is_left_alone(tiny_cfg):
    cfg = tiny(tiny_cfg, "MODEL.RESNETS.NORM", "GN", "MODEL.FPN.NORM", "GN")
    del cfg.MODEL["WS"], cfg.MODEL["BCN"]
    assert not standardized(build_model(cfg))


def test_building_is_prepared_once(tiny_cfg):
    """Registered again (by a reload, say), it is the same function, around Detectron2's own."""
    before = meta_arch.build_model
    register_preparation()
    assert meta_arch.build_model is before is build_model  # as detectron2.modeling exports it
    assert before.__wrapped__.__module__ == "detectron2.modeling.meta_arch.build"
    assert not hasattr(before.__wrapped__, "__wrapped__")


def test_the_stem_of_deeplab_is_not_dropped():
    make = FAMILIES["DeepLab V3"]
    assert "backbone.stem.conv3" in standardized(make())
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_ws_resnet_backbone"
    cfg.MODEL.RESNETS.STEM_TYPE = "deeplab"
    with pytest.raises(ValueError, match="MODEL.WS.PARTS to .'backbone'."):
        build_model(cfg)


# Groups.


@pytest.mark.parametrize("groups, made", [("auto", {32, 24}), (16, {16}), (None, None)])
def test_groups_by_config(groups, made, tiny_cfg):
    options = ["MODEL.FPN.OUT_CHANNELS", 48, "MODEL.BCN.NUM_GROUPS", groups]
    if made is None:
        with pytest.raises(ValueError, match="48 channels into 32 groups"):
            build_model(tiny_cfg(*options))
        return
    model = build_model(tiny_cfg(*options))
    assert {m.num_groups for m in model.modules() if isinstance(m, BatchChannelNorm2d)} == made


def test_what_was_built_is_recorded_and_checked(tiny_cfg, tmp_path):
    """Formula and groups of a model standardized by parts, whose backbone's name says nothing."""
    cfg = tiny(tiny_cfg, "MODEL.WS.PARTS", ["*"], "MODEL.WS.FORMULA", "biased")
    cfg.merge_from_list(["MODEL.FPN.OUT_CHANNELS", 48, "MODEL.BCN.NUM_GROUPS", "auto"])
    model = build_model(cfg)
    WSBCNCheckpointer(model, str(tmp_path), expected=LoadExpectation.from_model(model, cfg)).save(
        "model"
    )
    path = str(tmp_path / "model.pth")
    saved = torch.load(path, weights_only=True)[METADATA_KEY]
    assert saved["ws_formula"] == "biased" and saved["bcn_groups"] == [24, 32]
    for key, value, message in (
        ("MODEL.WS.FORMULA", "unbiased", "biased"),
        ("MODEL.WS.PARTS", ["roi_heads.*_head"], "biased"),
    ):
        other = cfg.clone()
        other.merge_from_list([key, value])
        model = build_model(other)
        with pytest.raises(CheckpointError, match=message):
            WSBCNCheckpointer(model, expected=LoadExpectation.from_model(model, other)).load(path)
    model = build_model(cfg)
    WSBCNCheckpointer(model, expected=LoadExpectation.from_model(model, cfg)).load(path)


@pytest.mark.parametrize(
    "channels, groups", [(48, 24), (80, 20), (144, 24), (64, 32), (37, 1), (1, 1), (33, 11)]
)
def test_the_largest_divisor(channels, groups):
    norm = BatchChannelNorm2d(channels, "auto")
    assert norm.num_groups == groups and norm.weight.shape == (groups,)


def test_wrong_groups():
    with pytest.raises(ValueError, match="unknown number of groups 'many'"):
        BatchChannelNorm2d(64, "many")


def test_the_table_is_shown():
    readme = (ROOT / "configs" / "README.md").read_text()
    assert all(row in readme for row in TABLE.strip().splitlines())


class _OwnConv(nn.Module):
    """A convolution that is no ``nn.Conv2d``, with its norm inside, like TridentNet's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(32, 32, 3, 3))
        self.norm = nn.GroupNorm(32, 32)


def test_a_convolution_of_a_class_of_its_own_is_named(caplog):
    model = nn.ModuleDict({"own": _OwnConv(), "conv": Conv2d(32, 32, 3, norm=nn.GroupNorm(8, 32))})
    with caplog.at_level(logging.INFO):
        standardize_parts(model, ["*"])
    assert "WS in 1 of 2 convolutions of *; plain stay 1: own (_OwnConv)" in caplog.messages[-1]


def _vitdet(backbones):
    net = backbones.ViT(
        *(64, 8),  # sides of the picture and of a patch
        **dict(embed_dim=128, depth=2, num_heads=2, window_size=4, window_block_indexes=[0]),
        drop_path_rate=0.1,
        out_feature="last_feat",
    )
    return backbones.SimpleFeaturePyramid(
        net, "last_feat", 32, (2.0, 1.0, 0.5), norm="BCN", square_pad=64
    )


def _swin(backbones):
    net = backbones.SwinTransformer(
        embed_dim=16, depths=(1,) * 4, num_heads=(1, 1, 2, 2), window_size=4, drop_path_rate=0.1
    )
    return backbones.FPN(net, ["p0", "p1", "p2", "p3"], 32, norm="BCN")


def _mvit(backbones):
    net = backbones.MViT(
        **dict(img_size=64, embed_dim=16, depth=4, last_block_indexes=(0, 1, 2, 3)),
        **dict(drop_path_rate=0.1, adaptive_window_size=8),
    )
    return backbones.FPN(net, [f"scale{i}" for i in (2, 3, 4, 5)], 32, norm="BCN")


@pytest.mark.parametrize(
    ("make", "standardized", "plain"),
    [(_vitdet, 6, ["simfp_2.0", "net.patch_embed.proj"]), (_swin, 9, []),
     (_mvit, 20, ["bottom_up.patch_embed.proj"])],
)  # fmt: skip
def test_transformers_of_detectron2_main(make, standardized, plain, caplog):
    pytest.importorskip("timm", reason="Detectron2's transformers are built of timm's layers")
    backbones = pytest.importorskip("detectron2.modeling.backbone")
    if not hasattr(backbones, "ViT"):
        pytest.skip("Detectron2 v0.6 has no transformers: tools/test_compat.sh")
    model = make(backbones)
    with caplog.at_level(logging.INFO):
        standardize_parts(model, ["*"])
    total = standardized + len(plain)
    assert f"WS in {standardized} of {total} convolutions of *" in caplog.messages[-1]
    assert all(f"{name} (no norm)" in caplog.messages[-1] for name in plain)
    assert sum(isinstance(m, WSConv2d) for m in model.modules()) == standardized
    x = torch.randn(1, 3, 64, 64)
    sum(y.square().mean() for y in model(x).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        assert all(y.isfinite().all() for y in model.eval()(x).values())
