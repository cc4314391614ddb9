"""``ImageClassifier``: what it is built of, its loss and its answers."""

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.backbone import ResNet
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils.events import EventStorage
from torch.nn import functional as F

from wsbcn_d2 import BatchChannelNorm2d, WSConv2d
from wsbcn_d2.modeling.classifier import with_linear_head, zero_last_norms

LEAVES = [
    f"ImageNet-Classification/{net}_{norm}"
    for net in ("R_50", "R_101", "X_50_32x4d", "X_101_32x4d")
    for norm in ("gn_ws", "bcn_ws")
]
LEAVES += [
    f"CIFAR-Classification/{data}_R_110_{norm}"
    for data in ("cifar10", "cifar100")
    for norm in ("gn_ws", "bcn_ws")
]
LEAVES += ["shapes/classifier_R_18_gn_ws", "shapes/classifier_R_18_bcn_ws"]
# Convolutions: of, CIFAR's R-110 (109 and two projections), R-18.
CONVS = {"R_50": 53, "X_50": 53, "R_101": 104, "X_101": 104, "R_110": 111, "R_18": 20}


def batch(n=4, size=32, classes=6):
    images = torch.randint(0, 256, (n, 3, size, size)).to(torch.uint8)
    return [{"image": image, "label": i % classes} for i, image in enumerate(images)]


@pytest.mark.parametrize("name", LEAVES)
def test_every_config_builds_a_standardized_classifier(name, classifier_cfg):
    cfg = classifier_cfg("MODEL.DEVICE", "meta", name=name)
    with torch.device("meta"):
        model = build_model(cfg)
    convs = [m for m in model.modules() if isinstance(m, Conv2d)]
    assert len(convs) == next(n for part, n in CONVS.items() if part in name)
    assert all(isinstance(conv, WSConv2d) for conv in convs)
    bcn = name.endswith("bcn_ws")
    assert all(isinstance(conv.norm, BatchChannelNorm2d) == bcn for conv in convs)
    assert {p.requires_grad for p in model.parameters()} == {True}
    assert model.backbone.linear.out_features == cfg.MODEL.CLASSIFIER.NUM_CLASSES
    assert all(key.startswith("backbone.") for key in model.state_dict())  # pixels are the config's
    # The released recipes do so for BCN alone; those on shapes compare norms and nothing else.
    zero = bcn or name.startswith("shapes/")
    assert zero == cfg.MODEL.CLASSIFIER.ZERO_INIT_LAST_NORM
    # The released code decays norms and biases like everything else.
    decays = {group["weight_decay"] for group in build_optimizer(cfg, model).param_groups}
    assert decays == {1e-4}


@pytest.mark.parametrize("name", LEAVES[:12])
def test_schedules_are_the_released_ones(name, classifier_cfg):
    cfg = classifier_cfg(name=name)
    images = 1281167 if name.startswith("ImageNet") else 50000
    per_epoch = images // cfg.SOLVER.IMS_PER_BATCH
    expected = {
        "R_50_g": (256, 90, 30, 60),
        "R_50_b": (256, 90, 30, 60),
        "R_110": (128, 164, 81, 122),
    }
    size, *epochs = next(
        (v for k, v in expected.items() if f"/{k}" in name or (k == "R_110" and k in name)),
        (128, 100, 30, 60, 90),
    )
    assert size == cfg.SOLVER.IMS_PER_BATCH and cfg.SOLVER.BASE_LR == 0.1
    assert [cfg.SOLVER.MAX_ITER, *cfg.SOLVER.STEPS] == [e * per_epoch for e in epochs]
    optimizer = torch.optim.SGD([torch.zeros(1)], cfg.SOLVER.BASE_LR)
    build_lr_scheduler(cfg, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.1  # no warm-up


def test_loss_and_answers(classifier_cfg):
    model = build_model(classifier_cfg())
    inputs = batch()
    with EventStorage(0) as storage:
        loss = model(inputs)
    assert list(loss) == ["loss_cls"]
    assert 0 <= storage.latest()["classifier/batch_top1"][0] <= 100
    with torch.no_grad():
        model.backbone.linear.bias[0] = 1e4  # the label of one of the four
    with EventStorage(0) as storage:
        model(inputs)
    assert storage.latest()["classifier/batch_top1"][0] == 25.0
    with torch.no_grad():
        model.backbone.linear.bias[0] = 0
    model.eval()
    with torch.no_grad():
        model.backbone.linear.weight.normal_()
        outputs = model(inputs)
        images = torch.stack([x["image"] for x in inputs]).double()
        mean, std = (
            torch.tensor(v).view(3, 1, 1).double()
            for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
        )
        logits = model.backbone(((images - mean) / std).float())["linear"]
    for row, out in zip(logits.softmax(1), outputs, strict=True):
        order = row.argsort(descending=True)[:5]
        assert torch.equal(out["pred_classes"], order)
        torch.testing.assert_close(out["scores"], row[order], atol=1e-5, rtol=1e-4)
    with torch.no_grad(), EventStorage(0):  # in eval, so that both see one statistic
        expected = F.cross_entropy(logits, torch.tensor([0, 1, 2, 3]))
        model.training = True
        torch.testing.assert_close(model(inputs)["loss_cls"], expected, atol=1e-5, rtol=1e-4)


def test_the_head_is_detectron2s_over_the_builders_own_blocks(classifier_cfg):
    backbone = build_backbone(classifier_cfg("MODEL.RESNETS.OUT_FEATURES", ["res5"]))
    before = {name: p for name, p in backbone.named_parameters()}
    net = with_linear_head(backbone, 7)
    after = dict(net.named_parameters())
    assert after.keys() - before.keys() == {"linear.weight", "linear.bias"}
    assert all(after[name] is p for name, p in before.items())
    assert net(torch.randn(2, 3, 32, 32))["linear"].shape == (2, 7)


@pytest.mark.parametrize("out_features", [["res4"], ["stem", "res3"]])
def test_all_stages_are_there_whatever_a_detector_would_read(out_features, classifier_cfg):
    model = build_model(classifier_cfg("MODEL.RESNETS.OUT_FEATURES", out_features))
    assert model.backbone.stage_names == ("res2", "res3", "res4", "res5")


def test_frozen_stages_stay_frozen(classifier_cfg):
    model = build_model(classifier_cfg("MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.RESNETS.NORM", "BN"))
    trained = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"res3", "res4", "res5", "linear"}
    assert isinstance(model.backbone.stem.conv1.norm, FrozenBatchNorm2d)


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("depth,last", [(18, "conv2"), (50, "conv3")])
def test_zeroed_blocks_are_the_identity(depth, last, zero, classifier_cfg):
    cfg = classifier_cfg(
        *("MODEL.RESNETS.DEPTH", depth, "MODEL.CLASSIFIER.ZERO_INIT_LAST_NORM", zero),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64 if depth == 18 else 256),
    )
    block = build_model(cfg).backbone.res2[1]
    x = torch.rand(2, block.in_channels, 8, 8)
    assert torch.equal(block(x), x) == zero
    weight = getattr(block, last).norm.weight
    assert weight.shape == (32,) and bool((weight == 0).all()) == zero
    assert (block.conv1.norm.weight == 1).all()


def test_frozen_norms_are_left_alone_by_zeroing(classifier_cfg):
    cfg = classifier_cfg("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.RESNETS.OUT_FEATURES", ["res5"])
    backbone = build_backbone(cfg, ShapeSpec(channels=3))
    zero_last_norms(backbone)
    assert (backbone.res2[0].conv2.norm.weight == 1).all()


def test_refusals(classifier_cfg):
    with pytest.raises(ValueError, match="needs a ResNet, not FPN.*build_ws_resnet_backbone"):
        build_model(
            classifier_cfg(
                *("MODEL.BACKBONE.NAME", "build_ws_resnet_fpn_backbone"),
                *("MODEL.FPN.IN_FEATURES", ["res5"]),
            )
        )
    with pytest.raises(ValueError, match="NUM_CLASSES must be positive, not 0"):
        build_model(classifier_cfg("MODEL.CLASSIFIER.NUM_CLASSES", 0))
    model = build_model(classifier_cfg()).eval()
    with pytest.raises(ValueError, match="different shapes"):
        model([*batch(1, 32), *batch(1, 48)])


@pytest.mark.parametrize("depth", [8, 20])
def test_cifar_resnet(depth, classifier_cfg):
    cfg = classifier_cfg(
        "MODEL.RESNETS.DEPTH", depth, name="CIFAR-Classification/cifar10_R_110_gn_ws"
    )
    net = build_model(cfg).backbone
    assert isinstance(net, ResNet) and net.stage_names == ("res2", "res3", "res4")
    assert sum(isinstance(m, WSConv2d) for m in net.modules()) == depth - 1 + 2
    x = torch.randn(1, 3, 32, 32)
    shapes = []
    for stage in net.stages:
        stage.register_forward_hook(lambda _, __, y: shapes.append(tuple(y.shape[1:])))
    net(x)
    assert shapes == [(32, 32, 32), (64, 16, 16), (128, 8, 8)]


@pytest.mark.parametrize("freeze_at", [0, 1, 2, 3, 4])
def test_stages_of_a_cifar_resnet_are_frozen(freeze_at, classifier_cfg):
    cfg = classifier_cfg(
        *("MODEL.RESNETS.DEPTH", 8, "MODEL.BACKBONE.FREEZE_AT", freeze_at),
        name="CIFAR-Classification/cifar10_R_110_bcn_ws",
    )
    backbone = build_backbone(cfg)
    trained = {name.split(".")[0] for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained == set(["stem", "res2", "res3", "res4"][freeze_at:])


def test_pixel_statistics_are_the_configs_and_not_the_checkpoints(classifier_cfg):
    model = build_model(classifier_cfg("MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0]))
    assert model.pixel_mean.flatten().tolist() == [1.0, 2.0, 3.0]
    assert not {"pixel_mean", "pixel_std"} & set(model.state_dict())


@pytest.mark.parametrize("depth", [2, 18])
def test_cifar_resnet_refuses_other_depths(depth, classifier_cfg):
    cfg = classifier_cfg(
        "MODEL.RESNETS.DEPTH", depth, name="CIFAR-Classification/cifar10_R_110_gn_ws"
    )
    with pytest.raises(ValueError, match=f"no CIFAR ResNet of depth {depth}.*6n"):
        build_model(cfg)
