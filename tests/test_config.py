"""The config keys of this project, and the configs beside each other."""

import dataclasses
import inspect
import re
import sys

import pytest
from conftest import ROOT
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg

from wsbcn_d2 import add_wsbcn_config, get_cfg
from wsbcn_d2.config import WRONG_MODEL, UsageError, load_config, one_line, refusing
from wsbcn_d2.layers import WS_FORMULAS
from wsbcn_d2.study.plan import flatten

KEYS = {
    "MODEL.WS.KIND": "ws",
    "MODEL.WS.FORMULA": "unbiased",
    "MODEL.WS.EPS": 1e-5,
    "MODEL.WS.PARTS": [],
    "MODEL.BCN.NUM_GROUPS": None,
    "MODEL.BCN.UPDATE_RATE": 0.0,
    "MODEL.BCN.UPDATE_RATE_SCHEDULE": "constant",
    "MODEL.BCN.FIRST_BATCH_INIT": True,
    "MODEL.BCN.SYNC_ESTIMATES": True,
    "MODEL.BCN.MONITOR_PERIOD": 0,
    "MODEL.CLASSIFIER.NUM_CLASSES": 1000,
    "MODEL.CLASSIFIER.ZERO_INIT_LAST_NORM": False,
    "MODEL.RECOMPUTE": [],
    "DATASETS.COCO_SETS": [],
    "INPUT.PICTURE_RANGE": [],
    # As the official ImageNet code.
    "INPUT.CLASSIFICATION.SIZE": 224,
    "INPUT.CLASSIFICATION.TRAIN_CROP": "random_resized",
    "INPUT.CLASSIFICATION.CROP_SCALE": [0.08, 1.0],
    "INPUT.CLASSIFICATION.PADDING": 4,
    "INPUT.CLASSIFICATION.RESIZE_TEST": 256,
    "SOLVER.ACCUMULATE": 1,
    "SOLVER.EPOCHS": 0,
    "SOLVER.ON_RESUME": "checkpoint",
}
VARIANTS = ("bn", "gn", "gn_ws", "bcn", "bcn_ws")


STOCK, OURS = flatten(get_detectron2_cfg()), flatten(get_cfg())
ADDED = sorted(OURS.keys() - STOCK.keys())


def test_defaults_are_those_of_the_design():
    assert {key: OURS[key] for key in KEYS} == KEYS
    assert sorted(KEYS) == ADDED


# What a key's default is called where somebody builds without a config.
ARGUMENTS = {
    "MODEL.WS.KIND": ("ws_kind", "kind"),
    "MODEL.WS.FORMULA": ("ws_formula", "formula"),
    "MODEL.WS.EPS": ("ws_eps", "eps"),
    "MODEL.BCN.UPDATE_RATE": ("update_rate", "momentum"),
    "MODEL.BCN.FIRST_BATCH_INIT": ("first_batch_init",),
    "MODEL.CLASSIFIER.ZERO_INIT_LAST_NORM": ("zero_init_last_norm",),
}
OTHERWISE = {
    # None: what each norm has.
    ("estimate_hooks", "update_rate"): None,
    ("UpdateRateSchedule", "update_rate"): None,
    # The classes are the paper's; the names that a config has for them hold their estimates.
    ("EstimatedBatchNorm2d", "momentum"): 0.01,
    ("BatchChannelNorm2d", "update_rate"): 0.01,
}


def test_functions_have_the_keys_defaults():
    """One that was changed in one of two places builds two models of one name."""
    seen = set()
    packages = tuple(f"wsbcn_d2.{name}" for name in ("layers", "modeling", "engine"))
    for module in [m for n, m in sys.modules.items() if n.startswith(packages)]:
        for function in vars(module).values():
            owner = inspect.getmodule(function)
            ours = getattr(owner, "__name__", "").startswith(packages)
            if not callable(function) or not ours or dataclasses.is_dataclass(function):
                continue
            methods = [function, getattr(function, "convert", None), function.__init__]
            for method in filter(inspect.isroutine, methods):
                parameters = inspect.signature(method).parameters
                for key, names in ARGUMENTS.items():
                    for name in set(names) & set(parameters):
                        default = parameters[name].default
                        if default is not inspect.Parameter.empty:
                            where = (function.__name__, name)
                            assert default == OTHERWISE.get(where, KEYS[key]), where
                            seen.add(where)
    assert {("standardize_weight", "eps"), ("WNConv2d", "ws_eps"), ("WSConv2d", "eps")} < seen
    assert {("convert_convs", "kind"), ("WSFastRCNNConvFCHead", "ws_formula")} < seen
    assert ("BatchChannelNorm2d", "update_rate") in seen and len(seen) > 20, seen


def test_detectron2s_own_keys_are_left_alone():
    assert {key: OURS[key] for key in STOCK} == STOCK
    assert OURS["MODEL.WS.FORMULA"] in WS_FORMULAS


def test_adding_to_a_config_of_ones_own():
    cfg = get_detectron2_cfg()
    cfg.MODEL.OWN = CfgNode({"KEY": 1})
    add_wsbcn_config(cfg)
    assert cfg.MODEL.OWN.KEY == 1 and cfg.MODEL.BCN.UPDATE_RATE == 0.0
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


@pytest.mark.parametrize(
    "error, text",
    [
        (KeyError("a\n  b"), "a b"),  # whose text has quotes around it
        (ValueError("a\n\tb  c"), "a b c"),
        (KeyError(), "KeyError"),
        (RuntimeError(""), "RuntimeError"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_an_error_in_a_line(error, text):
    assert one_line(error) == text


def test_errors_of_some_kinds_are_the_users():
    refused = pytest.raises(UsageError, match="^before: why; mend$")
    with refused as caught, refusing("before: ", KeyError, ValueError, mend="; mend"):
        raise KeyError("why")
    assert isinstance(caught.value.__cause__, KeyError)
    own = UsageError("as it is")
    with pytest.raises(UsageError) as caught, refusing("before: ", ValueError):
        raise own
    assert caught.value is own
    with pytest.raises(TypeError, match="^other$"), refusing("before: ", KeyError, ValueError):
        raise TypeError("other")
    assert set(WRONG_MODEL) == {
        *(KeyError, ValueError, AssertionError, AttributeError, TypeError, IndexError)
    }


def test_a_key_of_one_value_has_no_several(tmp_path):
    (tmp_path / "base.yaml").write_text("MODEL: {WEIGHTS: a, RPN: {NMS_THRESH: 0.5}}\nSEED: 3\n")
    path = tmp_path / "own.yaml"
    path.write_text("_BASE_: base.yaml\nSEED: {A: 1}\n")
    message = "SEED is one value in its _BASE_, here it has several"
    with pytest.raises(UsageError, match=message) as caught:
        load_config(str(path))
    assert str(path) in str(caught.value)
    path.write_text("_BASE_: base.yaml\nMODEL: {RPN: {NMS_THRESH: 0.25}}\n")
    cfg = load_config(str(path))
    assert (cfg.MODEL.WEIGHTS, cfg.MODEL.RPN.NMS_THRESH, cfg.SEED) == ("a", 0.25, 3)
    path.write_text("_BASE_: base.yaml\nMODEL: 3\n")
    with pytest.raises(UsageError):
        load_config(str(path))
