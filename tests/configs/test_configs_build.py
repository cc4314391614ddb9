"""Every shipped YAML builds its model, and that model takes one training step on the CPU.

Many configs train one model under another protocol. Each distinct model steps once, for all the
configs that it stands for; ResNets deeper than 50 step with 50 layers (the same blocks, fewer of
them) and are built at full depth on the meta device.
"""

import functools

import pytest
import torch
from conftest import ROOT
from detectron2.modeling import ResNetBlockBase, build_model
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage

from wsbcn_d2.engine import load_config

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))

# What changes neither the modules of a model nor how a step goes through them, and fewer boxes.
SAME = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.PIXEL_MEAN": [110.0, 110.0, 110.0],
    "MODEL.PIXEL_STD": [58.0, 58.0, 58.0],
    "MODEL.BCN.UPDATE_RATE": 0.0,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 100,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 30,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
}


@functools.cache
def configs():
    options = [str(part) for pair in SAME.items() for part in pair]
    return {
        str(path.relative_to(ROOT / "configs")): load_config(str(path), options) for path in CONFIGS
    }


def models(deepest):
    """The distinct models of all configs: name of the first config -> (config, all names)."""
    found = {}
    for name, cfg in configs().items():
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.RESNETS.DEPTH = min(cfg.MODEL.RESNETS.DEPTH, deepest)
        if "Base-" in name and cfg.MODEL.RESNETS.NORM == "FrozenBN":
            # Detectron2's default: a base that leaves the norm to its variants. Without weights,
            # activations overflow in a deep network.
            cfg.MODEL.RESNETS.NORM = "BN"
        found.setdefault(cfg.MODEL.dump(), (cfg, []))[1].append(name)
    return {names[0]: (cfg, names) for cfg, names in found.values()}


def parameters(deepest, keep=lambda cfg: True):
    return [
        pytest.param(cfg, id=name, marks=[] if cfg.MODEL.RESNETS.DEPTH < 50 else [pytest.mark.slow])
        for name, (cfg, _) in models(deepest).items()
        if keep(cfg)
    ]


def test_every_config_is_stood_for():
    names = [name for _, names in models(50).values() for name in names]
    assert len(names) == len(CONFIGS) >= 8


@pytest.mark.rotated(3)
@pytest.mark.parametrize("cfg", parameters(50))
def test_one_training_step(cfg, make_batch):
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    with EventStorage(0):
        losses = model(make_batch(num_classes=min(6, cfg.MODEL.ROI_HEADS.NUM_CLASSES)))
    assert losses and all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    name, parameter = next(iter(trained.items()))
    before = parameter.detach().clone()
    optimizer.step()
    assert not torch.equal(before, parameter), name


@pytest.mark.parametrize("cfg", parameters(1000, lambda cfg: cfg.MODEL.RESNETS.DEPTH > 50))
def test_deep_models_build_at_full_depth(cfg):
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    blocks = sum(isinstance(module, ResNetBlockBase) for module in model.modules())
    # The stem, and blocks of three convolutions each, or of two in the CIFAR ones.
    assert blocks == {101: 34, 110: 55, 152: 51}[cfg.MODEL.RESNETS.DEPTH]
