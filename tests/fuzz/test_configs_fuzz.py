"""Random combinations of the NORM, WS and BCN keys: they train a step or say what is wrong."""

import logging

import pytest
import torch
from detectron2.layers import Conv2d, DeformConv
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils.events import EventStorage
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from wsbcn_d2 import EstimatedBatchNorm2d, WSConv2d
from wsbcn_d2.engine import UpdateRateSchedule
from wsbcn_d2.layers import CWNConv2d, WNConv2d

COMMON = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    # An example takes a second: a failure is reported as it was found, not made smaller.
    "phases": [Phase.generate],
}
QUICK, DEEP = settings(max_examples=8, **COMMON), settings(max_examples=9, **COMMON)
FEW = settings(max_examples=3, **COMMON)

NORMS = ("BCN", "BatchBCN", "SyncBCN", "EstBN", "GN", "BN", "naiveSyncBN", "naiveSyncBN_N")
KINDS = {"ws": WSConv2d, "wn": WNConv2d, "cwn": CWNConv2d, "none": Conv2d}

valid = st.fixed_dictionaries(
    {
        # The stock ResNet and its FPN insist on a norm of the residual blocks.
        "MODEL.RESNETS.NORM": st.sampled_from([*NORMS, "FrozenBN"]),
        "MODEL.FPN.NORM": st.sampled_from([*NORMS, ""]),
        "MODEL.ROI_BOX_HEAD.NORM": st.sampled_from([*NORMS, ""]),
        "MODEL.ROI_MASK_HEAD.NORM": st.sampled_from([*NORMS, ""]),
        "MODEL.BACKBONE.NAME": st.sampled_from(
            ["build_ws_resnet_fpn_backbone", "build_resnet_fpn_backbone"]
        ),
        "MODEL.ROI_BOX_HEAD.NAME": st.sampled_from(["WSFastRCNNConvFCHead", "FastRCNNConvFCHead"]),
        "MODEL.ROI_MASK_HEAD.NAME": st.sampled_from(
            ["WSMaskRCNNConvUpsampleHead", "MaskRCNNConvUpsampleHead"]
        ),
        "MODEL.BACKBONE.FREEZE_AT": st.integers(0, 5),
        "MODEL.WS.KIND": st.sampled_from(list(KINDS)),
        "MODEL.WS.FORMULA": st.sampled_from(["unbiased", "unbiased_std", "biased"]),
        "MODEL.WS.EPS": st.sampled_from([1e-5, 1e-3]),
        "MODEL.BCN.NUM_GROUPS": st.sampled_from([None, "auto", 16]),
        "MODEL.BCN.UPDATE_RATE": st.sampled_from([0.001, 0.01, 0.1, 1.0]),
        "MODEL.BCN.UPDATE_RATE_SCHEDULE": st.sampled_from(["constant", "lr"]),
        "MODEL.ROI_BOX_HEAD.CONV_DIM": st.sampled_from([32, 64]),
        "MODEL.ROI_MASK_HEAD.CONV_DIM": st.sampled_from([32, 64]),
        "MODEL.ROI_MASK_HEAD.NUM_CONV": st.integers(1, 2),
        "MODEL.FPN.OUT_CHANNELS": st.sampled_from([32, 64]),
        "MODEL.FPN.FUSE_TYPE": st.sampled_from(["sum", "avg"]),
    }
).filter(lambda options: not overflows(options))


def overflows(options):
    """Whether untrained standardized weights meet norms that are frozen at the identity.

    Nothing then brings the activations of a deep backbone back to scale, and they leave float32.
    """
    norm = options["MODEL.RESNETS.NORM"]
    frozen = norm == "FrozenBN" or ("BN" in norm and options["MODEL.BACKBONE.FREEZE_AT"] > 3)
    ours = "ws_" in options["MODEL.BACKBONE.NAME"] and options["MODEL.WS.KIND"] != "none"
    return frozen and ours


# One change that makes a config invalid, and what it is refused with.
MISTAKES = {
    "norm": (
        ["MODEL.RESNETS.NORM", "MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM"],
        ["bcn", "BCN ", "GroupNorm"],
        "unknown norm",
    ),
    "formula": (["MODEL.WS.FORMULA"], ["Unbiased", "paper", ""], "unknown .*formula"),
    "kind": (["MODEL.WS.KIND"], ["WS", "weight"], "unknown MODEL.WS.KIND"),
    "rate": (["MODEL.BCN.UPDATE_RATE"], [-0.1, 1.5, float("nan")], "update rate must be"),
    "schedule": (["MODEL.BCN.UPDATE_RATE_SCHEDULE"], ["cosine", ""], "unknown .*SCHEDULE"),
    "channels": (
        [
            "MODEL.FPN.OUT_CHANNELS",
            "MODEL.ROI_BOX_HEAD.CONV_DIM",
            "MODEL.RESNETS.STEM_OUT_CHANNELS",
        ],
        [40, 33],
        "groups",
    ),
    "deformable": (
        ["MODEL.RESNETS.DEFORM_ON_PER_STAGE"],
        [[False, True, True, True]],
        "deformable convolution",
    ),
}
# What the change is tried on: everywhere the project's own parts.
OWN = {
    "MODEL.RESNETS.NORM": "BCN",
    "MODEL.FPN.NORM": "BCN",
    "MODEL.ROI_BOX_HEAD.NORM": "BCN",
    "MODEL.WS.KIND": "ws",
}
# Basic blocks, those of a ResNet-18, have no deformable form.
BOTTLENECKS = {"MODEL.RESNETS.DEPTH": 50, "MODEL.RESNETS.RES2_OUT_CHANNELS": 256}


def config(tiny_cfg, options):
    return tiny_cfg(*(part for pair in options.items() for part in pair))


def build(cfg):
    """As the trainer does it: the model, and the hook that sets the update rate."""
    model = build_model(cfg)
    bcn = cfg.MODEL.BCN
    return model, UpdateRateSchedule(bcn.UPDATE_RATE, bcn.UPDATE_RATE_SCHEDULE)


class Trainer:
    """What a hook sees of one."""

    def __init__(self, model, optimizer, storage):
        self.model, self.optimizer, self.storage = model, optimizer, storage


def normalized_types(module):
    return {
        type(child)
        for child in module.modules()
        if isinstance(child, Conv2d) and child.norm is not None
    }


def train_a_step(cfg, batch):
    model, schedule = build(cfg)
    model.train()
    kind = KINDS[cfg.MODEL.WS.KIND]
    # Each part has exactly the convolutions that its name and KIND ask for.
    for part, name, norm in (
        (model.backbone, cfg.MODEL.BACKBONE.NAME, cfg.MODEL.RESNETS.NORM),
        (model.roi_heads.box_head, cfg.MODEL.ROI_BOX_HEAD.NAME, cfg.MODEL.ROI_BOX_HEAD.NORM),
        (model.roi_heads.mask_head, cfg.MODEL.ROI_MASK_HEAD.NAME, cfg.MODEL.ROI_MASK_HEAD.NORM),
    ):
        own = "ws_" in name or name.startswith("WS")
        assert normalized_types(part) == ({kind if own else Conv2d} if norm else set()), name
    optimizer = build_optimizer(cfg, model)
    build_lr_scheduler(cfg, optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    with EventStorage() as storage:
        schedule.trainer = Trainer(model, optimizer, storage)
        schedule.before_train()
        schedule.before_step()
        losses = model(batch)
        loss = sum(losses.values())
        assert loss.isfinite()
        loss.backward()
    factor = optimizer.param_groups[0]["lr"] / optimizer.param_groups[0]["initial_lr"]
    rate = cfg.MODEL.BCN.UPDATE_RATE
    if cfg.MODEL.BCN.UPDATE_RATE_SCHEDULE == "lr":
        rate *= factor
    for module in model.modules():
        if isinstance(module, EstimatedBatchNorm2d):
            assert module.momentum == pytest.approx(rate)
            assert module.num_batches_tracked == 0 or rate > 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    optimizer.step()
    after = dict(model.named_parameters())
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.fixture
def quiet():
    logging.disable(logging.INFO)
    yield
    logging.disable(logging.NOTSET)


@QUICK
@given(valid, st.integers(64, 96))
def test_valid_configs_train_a_step(quiet, tiny_cfg, make_batch, options, side):
    torch.manual_seed(0)
    train_a_step(config(tiny_cfg, options), make_batch(64, side))


@pytest.mark.slow
@pytest.mark.rotated(3)
@pytest.mark.parametrize("part", range(3))
def test_valid_configs_train_a_step_deep(quiet, tiny_cfg, make_batch, part):
    @seed(part)
    @DEEP
    @given(valid, st.integers(64, 96))
    def run(options, side):
        torch.manual_seed(1)
        train_a_step(config(tiny_cfg, options), make_batch(side, 64))

    run()


@FEW
@given(valid, st.data())
@pytest.mark.parametrize("mistake", MISTAKES)
def test_invalid_configs_raise_the_documented_error(quiet, tiny_cfg, mistake, options, data):
    keys, values, message = MISTAKES[mistake]
    key, value = data.draw(st.sampled_from(keys)), data.draw(st.sampled_from(values))
    options = {**options, **OWN, "MODEL.BACKBONE.NAME": "build_ws_resnet_fpn_backbone"}
    options["MODEL.ROI_BOX_HEAD.NAME"] = "WSFastRCNNConvFCHead"
    if mistake == "deformable":
        options |= BOTTLENECKS
    # The model is not run, so it needs no memory.
    cfg = config(tiny_cfg, {**options, key: value, "MODEL.DEVICE": "meta"})
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build(cfg)


def test_deformable_stages_without_ws_build(tiny_cfg):
    # The refusal is of WS, not of the stock backbone.
    cfg = config(
        tiny_cfg,
        {
            **BOTTLENECKS,
            "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, False, False, True],
            "MODEL.DEVICE": "meta",
        },
    )
    with torch.device("meta"):
        model, _ = build(cfg)
    assert any(isinstance(module, DeformConv) for module in model.modules())
