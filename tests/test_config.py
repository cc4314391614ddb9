"""The config keys of this project, and the configs beside each other."""

import re

import pytest
from conftest import ROOT
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg

from wsbcn_d2 import add_wsbcn_config, get_cfg
from wsbcn_d2.layers import WS_FORMULAS
from wsbcn_d2.study.plan import flatten

KEYS = {
    "MODEL.WS.KIND": "ws",
    "MODEL.WS.FORMULA": "unbiased",
    "MODEL.WS.EPS": 1e-5,
    "MODEL.WS.PARTS": [],
    "MODEL.BCN.NUM_GROUPS": None,
    "MODEL.BCN.UPDATE_RATE": 0.01,
    "MODEL.BCN.UPDATE_RATE_SCHEDULE": "constant",
    "MODEL.BCN.FIRST_BATCH_INIT": True,
    "MODEL.BCN.SYNC_ESTIMATES": True,
    "MODEL.BCN.MONITOR_PERIOD": 0,
}
VARIANTS = ("bn", "gn", "gn_ws", "bcn", "bcn_ws")


STOCK, OURS = flatten(get_detectron2_cfg()), flatten(get_cfg())
ADDED = sorted(OURS.keys() - STOCK.keys())


def test_defaults_are_those_of_the_design():
    assert {key: OURS[key] for key in KEYS} == KEYS
    assert [key for key in ADDED if key.startswith(("MODEL.WS.", "MODEL.BCN."))] == sorted(KEYS)


def test_detectron2s_own_keys_are_left_alone():
    assert {key: OURS[key] for key in STOCK} == STOCK
    assert OURS["MODEL.WS.FORMULA"] in WS_FORMULAS


def test_adding_to_a_config_of_ones_own():
    cfg = get_detectron2_cfg()
    cfg.MODEL.OWN = CfgNode({"KEY": 1})
    add_wsbcn_config(cfg)
    assert cfg.MODEL.OWN.KEY == 1 and cfg.MODEL.BCN.UPDATE_RATE == 0.01
    # Detectron2's defaults themselves are untouched.
    assert "BCN" not in get_detectron2_cfg().MODEL


@pytest.mark.parametrize("key", ADDED)
def test_every_key_is_explained_and_read(key):
    source = (ROOT / "wsbcn_d2" / "config.py").read_text()
    assert re.search(rf"    # .*\n    cfg\.{re.escape(key)} = ", source), "no comment above it"
    node, name = key.rsplit(".", 1)
    # cfg.MODEL.BCN.UPDATE_RATE, or UPDATE_RATE of a node that was taken out of the config first.
    reading = re.compile(rf"\.{re.escape(node.split('.')[-1])}\b[\s\S]*\.{name}\b")
    readers = [
        path
        for folder in ("wsbcn_d2", "tools")
        for path in (ROOT / folder).rglob("*.py")
        if path != ROOT / "wsbcn_d2" / "config.py" and reading.search(path.read_text())
    ]
    assert readers


def load(variant):
    cfg = get_cfg()
    cfg.merge_from_file(str(ROOT / "configs" / "shapes" / f"mask_rcnn_R_18_FPN_{variant}.yaml"))
    return cfg


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_shapes_variants_differ_in_norm_and_ws_alone(variant):
    cfg = load(variant)
    norm, ws = variant.split("_")[0].upper(), variant.endswith("_ws")
    prefix = "WS" if ws else ""
    expected = {
        "MODEL.BACKBONE.NAME": f"build_{prefix.lower() + '_' * ws}resnet_fpn_backbone",
        "MODEL.ROI_BOX_HEAD.NAME": prefix + "FastRCNNConvFCHead",
        "MODEL.ROI_MASK_HEAD.NAME": prefix + "MaskRCNNConvUpsampleHead",
        "MODEL.RESNETS.NORM": norm,
        "MODEL.FPN.NORM": norm,
        "MODEL.ROI_BOX_HEAD.NORM": norm,
        "MODEL.ROI_MASK_HEAD.NORM": norm,
    }
    own, base = flatten(cfg), flatten(load("bcn_ws"))
    assert {key: own[key] for key in expected} == expected
    assert {k: v for k, v in own.items() if k not in expected} == {
        k: v for k, v in base.items() if k not in expected
    }
    assert own["SOLVER.IMS_PER_BATCH"] == 1 and own["MODEL.WEIGHTS"] == ""
