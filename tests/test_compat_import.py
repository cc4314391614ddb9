"""Importing wsbcn_d2 changes nothing for models that do not use it."""

import json
import os
import subprocess
import sys

import pytest
from conftest import STOCK_TINY

# Builds stock models in a fresh process, with or without this package; prints what they are.
SCRIPT = r"""
import hashlib, json, sys
import torch
from detectron2.config import get_cfg
torch.set_num_threads(1)
if sys.argv[1] == "import":
    import wsbcn_d2
from detectron2.modeling import build_model
from detectron2.layers import get_norm
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

def digest(tensors):
    result = hashlib.sha256()
    for tensor in tensors:
        result.update(tensor.detach().contiguous().numpy().tobytes())
    return result.hexdigest()

def image():
    instances = Instances((64, 64))
    instances.gt_boxes = Boxes(torch.tensor([[4.0, 4, 40, 44]]))
    instances.gt_classes = torch.tensor([1])
    masks = torch.zeros(1, 64, 64, dtype=torch.bool)
    masks[0, 4:44, 4:40] = True
    instances.gt_masks = BitMasks(masks)
    pixels = (torch.arange(3 * 64 * 64).view(3, 64, 64) * 7 % 251).to(torch.uint8)
    return [{"image": pixels, "height": 64, "width": 64, "instances": instances}]

def describe(norm):
    cfg = get_cfg()
    cfg.merge_from_list(json.loads(sys.argv[2]))
    for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
        cfg.MODEL[part].NORM = norm
    torch.manual_seed(0)
    model = build_model(cfg)
    modules = [f"{name} {type(m).__module__}.{type(m).__qualname__}"
               for name, m in model.named_modules()]
    weights = digest(model.state_dict().values())
    with EventStorage():
        losses = model.train()(image())
    sum(losses.values()).backward()
    gradients = digest(p.grad for p in model.parameters() if p.grad is not None)
    with torch.no_grad():
        features = model.eval().backbone(torch.arange(3 * 64 * 64.0).view(1, 3, 64, 64) / 5000)
        found = model(image())[0]["instances"]
    return {
        "modules": modules,
        "weights": weights,
        "losses": {name: loss.item() for name, loss in losses.items()},
        "gradients": gradients,
        "features": digest(features.values()),
        "found": digest([found.pred_boxes.tensor, found.scores]),
        "after": digest(model.state_dict().values()),
    }

result = {norm or "none": describe(norm) for norm in ("FrozenBN", "BN", "SyncBN", "GN", "")}
for name in ("", "BN", "SyncBN", "FrozenBN", "GN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N"):
    norm = get_norm(name, 32)
    result["get_norm " + name] = f"{type(norm).__module__}.{type(norm).__qualname__}"
result["rng"] = torch.rand(1).item()
print(json.dumps(result))
"""

STOCK = [
    *STOCK_TINY,
    *("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.MASK_ON", "True"),
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", "0"),
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    *("MODEL.RESNETS.OUT_FEATURES", "['res2', 'res3', 'res4', 'res5']"),
    *("MODEL.FPN.IN_FEATURES", "['res2', 'res3', 'res4', 'res5']"),
    *("MODEL.RPN.IN_FEATURES", "['p2', 'p3', 'p4', 'p5', 'p6']"),
    *("MODEL.ANCHOR_GENERATOR.SIZES", "[[16], [32], [64], [128], [256]]"),
    *("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.NUM_CLASSES", "3"),
    *("MODEL.ROI_HEADS.IN_FEATURES", "['p2', 'p3', 'p4', 'p5']"),
    *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", "1"),
    *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "7"),
    *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
    *("INPUT.MASK_FORMAT", "bitmask"),
]


def describe(how):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how, json.dumps(STOCK)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_stock_models_are_the_same_with_and_without_the_import():
    """Modules, initial weights, losses, gradients, outputs and random numbers, bit for bit."""
    without, with_import = describe("nothing"), describe("import")
    assert with_import.keys() == without.keys()
    for name, expected in without.items():
        assert with_import[name] == expected, name
    # That the comparison sees something: the norms do differ from each other.
    assert len({json.dumps(without[norm]["modules"]) for norm in ("FrozenBN", "BN", "GN")}) == 3
    assert len({without[norm]["features"] for norm in ("FrozenBN", "GN", "none")}) >= 2
    assert not any("wsbcn_d2" in line for line in without["GN"]["modules"])
