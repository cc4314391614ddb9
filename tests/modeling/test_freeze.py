"""Freezing: FREEZE_AT 0-5 as Detectron2 does it, and ``requires_grad`` by hand."""

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone, build_model
from detectron2.utils.events import EventStorage
from torch.testing import assert_close

from wsbcn_d2 import BatchChannelNorm2d, EstimatedBatchNorm2d, WSConv2d

STAGES = {"stem": 1, "res2": 2, "res3": 3, "res4": 4, "res5": 5}


def train_step(module, x):
    optimizer = torch.optim.SGD(
        [p for p in module.parameters() if p.requires_grad] or [torch.zeros(1, requires_grad=True)],
        lr=0.1,
        weight_decay=0.1,
    )
    features = module(x)
    loss = sum(value.square().mean() for value in features.values())
    if loss.requires_grad:
        loss.backward()
    optimizer.step()


def changed(before, after):
    return {key for key in after if not torch.equal(before[key], after[key])}


def snapshot(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.mark.parametrize("freeze_at", [0, 1, 2, 3, 4, 5])
def test_freeze_at(tiny_cfg, freeze_at):
    # With 32 channels in 32 groups the channel half would cancel the affine of the batch half.
    cfg = tiny_cfg("MODEL.BACKBONE.FREEZE_AT", freeze_at, "MODEL.RESNETS.STEM_OUT_CHANNELS", 64)
    resnet = build_backbone(cfg).bottom_up
    frozen = {name for name, number in STAGES.items() if number <= freeze_at}
    for stage in STAGES:
        modules = list(getattr(resnet, stage).modules())
        norms = [m for m in modules if isinstance(m, BatchChannelNorm2d)]
        convs = [m for m in modules if isinstance(m, torch.nn.Conv2d)]
        kind = FrozenBatchNorm2d if stage in frozen else EstimatedBatchNorm2d
        assert len(norms) == len(convs) > 0
        assert {type(norm.bn) for norm in norms} == {kind}  # the channel half is still there
        assert {type(conv) for conv in convs} == {WSConv2d}
        trainable = {p.requires_grad for p in getattr(resnet, stage).parameters()}
        assert trainable == {stage not in frozen}
    before = snapshot(resnet)
    train_step(resnet, torch.randn(2, 3, 64, 64))
    moved = changed(before, snapshot(resnet))
    assert {key.split(".")[0] for key in moved} == set(STAGES) - frozen
    # Where it is not frozen, everything moves: raw weights, both affines and the estimates.
    for key in before:
        if key.split(".")[0] not in frozen:
            assert key in moved, key


def test_a_frozen_stage_computes_what_the_unfrozen_one_would_in_evaluation(tiny_cfg):
    free = build_backbone(tiny_cfg("MODEL.BACKBONE.FREEZE_AT", 0))
    x = torch.randn(2, 3, 64, 64)
    for _ in range(2):
        train_step(free, x)
    frozen = build_backbone(tiny_cfg("MODEL.BACKBONE.FREEZE_AT", 5))
    missing = frozen.load_state_dict(free.state_dict(), strict=False).missing_keys
    assert missing == []
    with torch.no_grad():
        assert_close(frozen.bottom_up(x), free.eval().bottom_up(x), atol=1e-4, rtol=1e-3)


def test_by_requires_grad(tiny_cfg, make_batch):
    model = build_model(tiny_cfg())
    with EventStorage(0):
        model(make_batch())
        stage = model.backbone.bottom_up.res3
        stage.requires_grad_(False)
        before = snapshot(model)
        sum(model(make_batch()).values()).backward()
    moved = changed(before, snapshot(model))
    assert not any(".res3." in key for key in moved)
    for other in ("stem", "res2", "res4", "res5"):
        assert any(f".{other}." in key and "running_mean" in key for key in moved)
    assert all(p.grad is None for p in stage.parameters())
