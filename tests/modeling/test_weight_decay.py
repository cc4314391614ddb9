"""SOLVER.WEIGHT_DECAY_NORM reaches every norm parameter, and nothing else."""

import pytest
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer, get_default_optimizer_params
from torch import nn

from wsbcn_d2 import BatchChannelNorm2d


@pytest.mark.parametrize("norm", ["BCN", "BatchBCN", "SyncBCN", "EstBN", "GN"])
def test_weight_decay_norm(tiny_cfg, norm):
    keys = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
    cfg = tiny_cfg(*(part for key in keys for part in (f"MODEL.{key}.NORM", norm)))
    cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.WEIGHT_DECAY_NORM = 0.5, 0.25
    model = build_model(cfg)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decays = {
        names[parameter]: group["weight_decay"]
        for group in build_optimizer(cfg, model).param_groups
        for parameter in group["params"]
    }
    assert set(decays) == set(names.values())
    of_norms = {name for name in decays if ".norm." in name}
    per_norm = 4 if "BCN" in norm else 2
    assert len(of_norms) == per_norm * (21 + 8 + 1 + 1)  # ResNet-18, FPN, box, mask
    assert {decays[name] for name in of_norms} == {0.25}
    assert {decays[name] for name in set(decays) - of_norms} == {0.5}


def test_a_bcn_on_its_own():
    model = nn.Sequential(nn.Conv2d(3, 32, 1), BatchChannelNorm2d(32))
    groups = get_default_optimizer_params(model, base_lr=1.0, weight_decay=0.5, weight_decay_norm=0)
    decays = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert [decays[p] for p in model[0].parameters()] == [0.5, 0.5]
    assert [decays[p] for p in model[1].parameters()] == [0, 0, 0, 0]
