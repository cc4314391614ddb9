"""Configs and models by name, as Detectron2's model zoo gives its own."""

import inspect

import pytest
import torch
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


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("device, with_gpu", [(None, "cuda"), ("cpu", "cpu"), ("meta", "meta")])
def test_where_a_model_is_put_and_what_its_weights_have_to_be(device, with_gpu, there, monkeypatch):
    built, loaded = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(model_zoo, "build_model", lambda cfg: built.append(cfg) or "model")
    monkeypatch.setattr(
        model_zoo.LoadExpectation, "from_model", lambda model, cfg: (model, cfg is built[-1])
    )

    class Checkpointer:
        def __init__(self, model, *, expected):
            loaded.append((model, expected))

        def load(self, weights):
            loaded.append(weights)

    monkeypatch.setattr(model_zoo, "WSBCNCheckpointer", Checkpointer)
    assert model_zoo.get(f"{MASK}.yaml", device=device) == "model"
    assert (with_gpu if there or device else "cpu") == built[0].MODEL.DEVICE
    assert loaded == [("model", ("model", True)), built[0].MODEL.WEIGHTS]


def test_what_is_proposed(monkeypatch):
    with pytest.raises(RuntimeError) as error:
        model_zoo.get_config_file("qqqqqqqq")
    assert str(error.value) == (
        f"qqqqqqqq not available in Model Zoo! They are below {ROOT / 'configs'}"
    )
    with pytest.raises(RuntimeError) as error:
        model_zoo.get_config_file(f"{MASK}.yam")
    assert 1 <= str(error.value).count(" or ") <= 2
    url = rf"^Pretrained model for {MASK}\.yaml is not available! There are those of published/$"
    with pytest.raises(RuntimeError, match=url):
        model_zoo.get_checkpoint_url(f"{MASK}.yaml")
