"""Runs that would work for days for nothing, or not as said, are refused; a GPU is not needed."""

import sys

import pytest
import torch
from conftest import ROOT
from detectron2.config import LazyConfig
from torch import nn

from wsbcn_d2.cli.train import main
from wsbcn_d2.engine import UsageError, check_config, lazy
from wsbcn_d2.engine.trainer import Trainer
from wsbcn_d2.modeling import recomputation

CONFIG = str(ROOT / "configs" / "shapes" / "mask_rcnn_R_18_FPN_gn_ws.yaml")
LAZY = str(ROOT / "configs/lazy/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_2x_bcn_ws_1img.py")


def options(cfg, tiny_shapes):
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (tiny_shapes["train"],), (tiny_shapes["val"],)
    return cfg


def lazy_cfg(tiny_shapes, *overrides):
    cfg = lazy.load_lazy_config(
        LAZY,
        [
            f"dataloader.train.dataset.names={tiny_shapes['train']}",
            f"dataloader.test.dataset.names={tiny_shapes['val']}",
            "train.init_checkpoint=''",
            *overrides,
        ],
    )
    return cfg


def message(check, *args, **kwargs):
    with pytest.raises(UsageError) as error:
        check(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_frozen_layers_without_weights(tiny_cfg, tiny_shapes, tmp_path):
    cfg = options(tiny_cfg("MODEL.BACKBONE.FREEZE_AT", 2, "OUTPUT_DIR", str(tmp_path)), tiny_shapes)
    assert message(check_config, cfg) == (
        "MODEL.WEIGHTS '' leaves 6 frozen layers at random values, 'backbone.bottom_up.stem.conv1' "
        "first: give weights, or train all, MODEL.BACKBONE.FREEZE_AT 0"
    )
    check_config(cfg, eval_only=True)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    check_config(cfg, resume=True)
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    check_config(cfg)


def test_frozen_layers_without_weights_in_python(tiny_shapes):
    text = message(lazy.check_lazy_config, lazy_cfg(tiny_shapes), world_size=1)
    assert text.startswith("train.init_checkpoint '' leaves 11 frozen layers at random values")
    assert "freeze_at of model.backbone 0" in text
    free = lazy_cfg(tiny_shapes, "model.backbone.module.bottom_up.freeze_at=0")
    lazy.check_lazy_config(free, world_size=1)


def test_a_length_that_ends_before_the_milestones(tiny_shapes):
    cfg = lazy_cfg(
        tiny_shapes, "model.backbone.module.bottom_up.freeze_at=0", "train.max_iter=90000"
    )
    text = message(lazy.check_lazy_config, cfg, world_size=4)
    steps = cfg.lr_multiplier.scheduler.milestones
    assert f"train.max_iter 90000 ends before lr_multiplier.scheduler.milestones {steps}" in text
    mended = LazyConfig.apply_overrides(cfg, [text.split("for example ")[1]])
    lazy.check_lazy_config(mended, world_size=4)


PATTERNS = ["backbone.bottom_up.res?", "roi_heads.*_head"]


def recomputed(model):
    names = [name for name, m in model.named_modules() if "forward" in vars(m)]
    return [name.removeprefix("module.") for name in names]


EXPECTED = [f"backbone.bottom_up.res{i}" for i in (2, 3, 4, 5)]
EXPECTED += ["roi_heads.box_head", "roi_heads.mask_head"]


def test_modules_to_recompute_by_key(tiny_cfg, tiny_shapes):
    cfg = options(tiny_cfg("MODEL.RECOMPUTE", PATTERNS), tiny_shapes)
    check_config(cfg)
    assert recomputed(Trainer.build_model(cfg)) == EXPECTED
    cfg.MODEL.RECOMPUTE = ["backbone.res4"]
    assert message(check_config, cfg).startswith(
        "MODEL.RECOMPUTE: 'backbone.res4' fits no module of the model: for 'backbone.res4' there "
        "are backbone.fpn_lateral2"
    )


def test_modules_to_recompute_by_python(tiny_shapes):
    free = "model.backbone.module.bottom_up.freeze_at=0"
    lazy.check_lazy_config(lazy_cfg(tiny_shapes, free, f"train.recompute={PATTERNS}"), world_size=1)
    cfg = lazy_cfg(tiny_shapes, free, "train.recompute=[heads]")
    text = message(lazy.check_lazy_config, cfg, world_size=1)
    assert text.startswith("train.recompute: 'heads' fits no module of the model: for 'heads'")


@pytest.mark.slow
def test_no_gpu_is_one_process_on_the_cpu(tiny_options, tmp_path, monkeypatch):
    ran = []
    run = recomputation._Recomputed.__call__
    monkeypatch.setattr(
        recomputation._Recomputed, "__call__", lambda self, *a: ran.append(1) or run(self, *a)
    )
    argv = ["--config-file", CONFIG, "--num-gpus", "0", *tiny_options]
    argv += ["MODEL.DEVICE", "cuda", "MODEL.RECOMPUTE", str(PATTERNS)]
    monkeypatch.setattr(sys, "argv", ["wsbcn-train", *argv])
    assert main() == 0
    assert (tmp_path / "output" / "model_final.pth").is_file() and len(ran) >= 3 * 6


@pytest.mark.parametrize("words", [["--num-gpus", "-1"], ["--num-machines", "0"]])
def test_processes_that_there_are_none_of(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["wsbcn-train", "--config-file", CONFIG, *words])
    assert main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and " ".join(words) in error


class ReadsANumber(nn.Module):
    def __init__(self):
        super().__init__()
        self.rates = [x.item() for x in torch.linspace(0, 0.1, 3)]


def test_a_model_that_reads_numbers_while_it_is_built_is_no_error(
    tiny_cfg, tiny_shapes, monkeypatch
):
    """As the stochastic depth of transformers does, which no number on the meta device bears."""
    from wsbcn_d2.engine.checks import from_yaml as checks

    build = checks.build_model

    def with_depth(cfg):
        model = build(cfg)
        model.depth = ReadsANumber()
        return model

    monkeypatch.setattr(checks, "build_model", with_depth)
    with torch.device("meta"), pytest.raises(RuntimeError):
        ReadsANumber()
    check_config(options(tiny_cfg(), tiny_shapes))
    cfg = options(tiny_cfg("MODEL.RESNETS.NORM", "XY"), tiny_shapes)
    assert "unknown norm 'XY'" in message(check_config, cfg)


@pytest.mark.slow
def test_a_resumed_run_says_whose_learning_rate_holds(tiny_options, tmp_path, monkeypatch):
    """And another one's lengths hold, as the log says."""

    def run(*words):
        argv = ["wsbcn-train", "--config-file", CONFIG, "--resume", *tiny_options, *words]
        monkeypatch.setattr(sys, "argv", argv)
        assert main() == 0
        state = torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)
        return {
            group["initial_lr"]
            for group in state["trainer"]["_trainer"]["optimizer"]["param_groups"]
        }

    assert run("SOLVER.BASE_LR", "0.01") == {0.01}
    log = tmp_path / "output" / "log.txt"
    assert "of the config differ" not in log.read_text()
    assert run("SOLVER.BASE_LR", "0.002", "SOLVER.MAX_ITER", "4") == {0.01}
    said = log.read_text().split("of the config differ: ")[1].splitlines()[0]
    assert said == (
        "SOLVER.BASE_LR was 0.01, is 0.002; 0.01 holds (for the config's, SOLVER.ON_RESUME config)"
        "; SOLVER.MAX_ITER was 3, is 4, which holds (to go on as before, set 3)"
    )
    assert run("SOLVER.BASE_LR", "0.002", "SOLVER.MAX_ITER", "5", "SOLVER.ON_RESUME", "config") == {
        0.002
    }
