"""Converting and folding: whatever is wrong is one line and exit code 2, and nothing is written."""

import os
import sys

import pytest
import torch
from checkpoint.torchvision_names import basic_resnet
from conftest import ROOT

from wsbcn_d2.checkpoint import Options
from wsbcn_d2.cli import convert as command
from wsbcn_d2.cli.convert import main as convert
from wsbcn_d2.files import PART_FILE

CONFIG = str(ROOT / "configs/shapes/mask_rcnn_R_18_FPN_gn_ws.yaml")


@pytest.fixture
def fold(monkeypatch):
    import importlib.util

    spec = importlib.util.spec_from_file_location("fold_tool", ROOT / "tools/fold_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["fold_checkpoint.py"])
    return module.main


def refused(capsys, status, match=""):
    error = capsys.readouterr().err
    assert status == 2 and len(error.strip().splitlines()) == 1 and match in error
    assert "Traceback" not in error and len(error) < 1500


@pytest.mark.parametrize("output", ["{0}/w.pth", "{0}/./w.pth", "{0}/below/../w.pth"])
def test_folding_does_not_write_over_what_it_reads(fold, output, tmp_path, capsys):
    weights = tmp_path / "w.pth"
    weights.write_bytes(b"dear")
    words = ["--config-file", CONFIG, "--weights", str(weights)]
    with pytest.raises(SystemExit) as stop:
        fold([*words, "--output", output.format(tmp_path)])
    assert stop.value.code == 2 and weights.read_bytes() == b"dear"
    assert "--output would overwrite --weights" in capsys.readouterr().err


def predictor(shape):
    state = {"roi_head.bbox_head.fc_cls.weight": torch.zeros(shape)}
    for name in ("fc_cls.bias", "fc_reg.weight", "fc_reg.bias"):
        state[f"roi_head.bbox_head.{name}"] = torch.zeros(shape)
    names = ("backbone.conv1.weight", "backbone.layer1.0.conv1.weight")
    return state | {name: torch.zeros(1) for name in names}


BAD = {
    "keys that are no text": {1: torch.ones(1), (2, 3): torch.ones(1)},
    "keys in several lines": {"a\nb": torch.ones(1), "\x1b[2J": torch.ones(1)},
    "predictors without dimensions": predictor(()),
    "empty predictors": predictor((0,)),
    "a stem without dimensions": {
        "stem.conv1.weight": torch.ones(()),
        "stem.conv1.norm.weight": torch.ones(()),
        "res2.0.conv1.weight": torch.ones(()),
        "res2.0.conv3.weight": torch.ones(()),
    },
    "Caffe2 without dimensions": {"conv1_w": torch.ones(()), "res2_0_branch2a_w": torch.ones(())},
    "Caffe2 predictors without dimensions": {
        **{
            n: torch.ones(())
            for n in ("conv1_w", "res2_0_branch2a_w", "cls_score_w", "bbox_pred_w")
        }
    },
    "a formula that is none": {
        "model": {"stem.conv1.weight": torch.ones(1)},
        "wsbcn_d2": {"ws_eps": "x"},
    },
    "a record that is no dict": {"model": {"stem.conv1.weight": torch.ones(1)}, "wsbcn_d2": [1]},
    "a scalar BCN": {
        "conv1.weight": torch.ones(64, 3, 7, 7),
        "bn1.weight": torch.ones(()),
        "bn1.pbn.running_mean": torch.ones(()),
        "layer1.0.conv1.weight": torch.ones(()),
    },
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("arguments", [[], ["--to", "resnet"], ["--norm", "BCN"]])
def test_converting_nonsense(name, arguments, tmp_path, capsys):
    torch.save(BAD[name], tmp_path / "bad.pth")
    target = tmp_path / "out" / "target.pth"
    refused(capsys, convert([str(tmp_path / "bad.pth"), str(target), *arguments]), "bad.pth")
    assert not target.exists()


def resnet18():
    return {name: torch.ones(shape) for name, shape in basic_resnet().items()}


def test_the_options_of_convert_reach_the_converter(tmp_path, monkeypatch, capsys):
    class Report:
        def lines(self):
            return ["a line", "another"]

    calls = []
    monkeypatch.setattr(command, "convert_file", lambda *args: calls.append(args) or Report())
    every = ["--to", "resnet", "--format", "mmdet", "--norm", "BCN", "--formula", "biased"]
    assert convert(["in.pth", "out.pth", *every]) == 0
    assert capsys.readouterr().out.splitlines() == ["a line", "another", "written       out.pth"]
    assert convert(["in.pth"]) == 0
    assert capsys.readouterr().out.splitlines() == ["a line", "another"]
    assert calls == [
        ("in.pth", "out.pth", Options("resnet", "mmdet", "BCN", "biased")),
        ("in.pth", None, Options("fpn", None, None, None)),
    ]
    with pytest.raises(SystemExit) as stopped:
        convert(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    for text in ("names (default: fpn)", "source format", "norm that the result", "WS formula"):
        assert text in said
    for norm in ("GN", "BCN", "BN"):
        assert convert(["in.pth", "--norm", norm]) == 0 and calls[-1][2].norm == norm


def test_converting_onto_a_full_disk_or_to_nowhere(tmp_path, capsys):
    source = tmp_path / "r18.pth"
    torch.save(resnet18(), source)
    target = tmp_path / "target.pth"
    target.write_text("the old one")
    (tmp_path / PART_FILE).symlink_to("/dev/full")
    refused(capsys, convert([str(source), str(target)]), "No space left on device")
    assert target.read_text() == "the old one" and not os.path.lexists(tmp_path / PART_FILE)
    for bad in ("/proc/none/x.pth", str(source / "x.pth"), str(tmp_path)):
        refused(capsys, convert([str(source), bad]), "cannot write")
    refused(capsys, convert([str(tmp_path / "absent.pth"), str(target)]), "no such file")
    assert convert([str(source), str(target)]) == 0 and torch.load(target)["model"]


def test_folding_onto_a_full_disk_or_what_is_none(fold, tmp_path, capsys):
    from detectron2.modeling import build_model

    from wsbcn_d2.config import load_config

    model = build_model(load_config(CONFIG, ["MODEL.DEVICE", "cpu"]))
    weights, output = tmp_path / "model.pth", tmp_path / "out.pth"
    torch.save({"model": model.state_dict()}, weights)
    arguments = ["--config-file", CONFIG, "--weights", str(weights), "--output", str(output)]
    (tmp_path / PART_FILE).symlink_to("/dev/full")
    capsys.readouterr()
    refused(capsys, fold(arguments), "No space left on device")
    assert not output.exists()
    for changed, match in (
        ([*arguments[:5], "/proc/none/x.pth"], "cannot write"),
        ([*arguments[:3], str(tmp_path / "absent.pth"), *arguments[4:]], "absent.pth"),
        (["--config-file", "absent.yaml", *arguments[2:]], "absent.yaml"),
        ([*arguments, "MODEL.NOTHING", "1"], "NOTHING"),
        ([*arguments, "MODEL.RESNETS.NORM", "GM"], "GM"),
    ):
        refused(capsys, fold(changed), match)
    for content in BAD.values():
        torch.save(content, weights)
        refused(capsys, fold(arguments), "model.pth")
    assert not output.exists()
