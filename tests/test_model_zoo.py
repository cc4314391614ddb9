"""Configs and models by name, as Detectron2's model zoo gives its own."""

import inspect

import pytest
from conftest import ROOT
from detectron2 import model_zoo as stock

from wsbcn_d2 import BatchChannelNorm2d, WSConv2d, model_zoo

MASK = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_2x_bcn_ws_1img"
PUBLISHED = "published/mmdet_mask_rcnn_R_50_FPN_gn_ws_2x.yaml"


@pytest.mark.parametrize("name", ["get", "get_config", "get_config_file", "get_checkpoint_url"])
def test_the_interface_is_detectron2s(name):
    ours, theirs = (inspect.signature(getattr(m, name)).parameters for m in (model_zoo, stock))
    assert [(p.name, p.default) for p in ours.values()] == [
        (p.name, p.default) for p in theirs.values()
    ]


def test_every_shipped_config_is_found_by_name():
    for path in (ROOT / "configs").rglob("*.yaml"):
        name = path.relative_to(ROOT / "configs").as_posix()
        assert model_zoo.get_config_file(name) == str(path)
    path = model_zoo.get_config_file(f"lazy/{MASK}.py")
    assert path == str(ROOT / "configs" / "lazy" / f"{MASK}.py")


def test_a_config_and_the_same_in_python():
    cfg, lazy = model_zoo.get_config(f"{MASK}.yaml"), model_zoo.get_config(f"lazy/{MASK}.py")
    assert cfg.MODEL.RESNETS.NORM == "BCN" and cfg.MODEL.WS.FORMULA == "unbiased"
    assert lazy.train.init_checkpoint == cfg.MODEL.WEIGHTS
    assert not cfg.is_frozen()


def test_weights_of_whole_detectors_are_those_that_were_published():
    url = model_zoo.get_checkpoint_url(PUBLISHED)
    assert url.startswith("wsbcn://")
    assert url == model_zoo.get_config(PUBLISHED, trained=True).MODEL.WEIGHTS
    for name in (f"{MASK}.yaml", f"lazy/{MASK}.py"):
        with pytest.raises(RuntimeError, match="Pretrained model for .* is not available"):
            model_zoo.get_config(name, trained=True)


def test_a_model_has_its_weights_and_is_in_training_mode(monkeypatch):
    loaded = []
    monkeypatch.setattr(
        model_zoo.WSBCNCheckpointer, "load", lambda self, path: loaded.append((self.model, path))
    )
    model = model_zoo.get(PUBLISHED, trained=True, device="cpu")
    lazy = model_zoo.get(f"lazy/{MASK}.py", device="cpu")
    assert model.training and any(isinstance(m, WSConv2d) for m in model.modules())
    assert lazy.training and any(isinstance(m, BatchChannelNorm2d) for m in lazy.modules())
    assert loaded == [
        (model, model_zoo.get_checkpoint_url(PUBLISHED)),
        (lazy, "wsbcn://ImageNetPretrained/R-50-BCN-WS"),
    ]


@pytest.mark.parametrize(
    "name",
    ["nothing.yaml", f"{MASK}.yml", MASK, "../setup.py", "README.md", "lazy", "/etc/x.yaml", ""],
)
def test_an_unknown_name_is_one_line(name):
    with pytest.raises(RuntimeError, match="not available in Model Zoo!") as error:
        model_zoo.get_config_file(name)
    assert "\n" not in str(error.value)


def test_a_similar_name_is_proposed():
    with pytest.raises(RuntimeError, match=f"Did you mean {MASK}.yaml"):
        model_zoo.get_config_file(MASK.replace("bcn_ws", "bcn-ws") + ".yaml")
