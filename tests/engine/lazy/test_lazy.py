"""Training of Python configs: lengths and precision."""

import copy

import pytest
import torch
from detectron2.config import LazyCall
from detectron2.solver import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler
from omegaconf import OmegaConf
from torch import nn

from wsbcn_d2.engine import UsageError, lazy
from wsbcn_d2.engine.lazy import checking, training


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)


def data():
    return []


def config(folder, **train):
    """What training asks of a config, and no more."""
    scheduler = LazyCall(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[60, 80])
    return OmegaConf.create(
        {
            "model": LazyCall(Model)(),
            "dataloader": {"train": LazyCall(data)()},
            "optimizer": LazyCall(torch.optim.SGD)(
                params=LazyCall(get_default_optimizer_params)(), lr=0.5
            ),
            "lr_multiplier": {"scheduler": scheduler},
            "train": {
                **{"device": "cpu", "output_dir": str(folder), "init_checkpoint": ""},
                **{"max_iter": 90, "eval_period": 30, "log_period": 20, "ddp": {}},
                **{"amp": {"enabled": False}, "checkpointer": {"period": 45, "max_to_keep": 3}},
                **train,
            },
        }
    )


def lengths(cfg):
    return (
        *(cfg.dataloader.train.total_batch_size, cfg.optimizer.lr),
        *(list(cfg.lr_multiplier.scheduler.milestones), cfg.train.max_iter),
        *(cfg.train.eval_period, cfg.train.checkpointer.period, cfg.train.reference_world_size),
    )


@pytest.mark.parametrize(
    "reference, processes, expected",
    [
        (8, 8, (16, 0.5, [60, 80], 90, 30, 45, 8)),
        (0, 3, (16, 0.5, [60, 80], 90, 30, 45, 0)),
        (8, 4, (8, 0.25, [120, 160], 180, 60, 90, 4)),
        (8, 16, (32, 1.0, [30, 40], 45, 15, 22, 16)),
        (1, 100, (1600, 50.0, [1, 1], 1, 0, 1, 100)),
    ],
)
def test_lengths_of_another_number_of_processes(reference, processes, expected, tmp_path):
    cfg = config(tmp_path, reference_world_size=reference)
    cfg.dataloader.train.total_batch_size = 16
    before = copy.deepcopy(cfg)
    assert lengths(lazy.auto_scale(cfg, processes)) == expected
    assert cfg == before  # it is another one that is changed


@pytest.mark.parametrize("end, refused", [(79, True), (80, True), (81, False)])
def test_a_milestone_lies_before_the_end(end, refused, tmp_path):
    cfg = config(tmp_path, max_iter=end)
    if not refused:
        checking._check_milestones(cfg)
        return
    with pytest.raises(UsageError, match=f"train.max_iter {end} ends before .*milestones.*60, 80"):
        checking._check_milestones(cfg)


class Reached(Exception):
    pass


@pytest.mark.parametrize("amp", [True, False])
def test_the_precision_is_the_configs(amp, tmp_path, monkeypatch):
    def reached(*_):
        raise Reached

    chosen = "AMPTrainer" if amp else "SimpleTrainer"
    monkeypatch.setattr(training, chosen, reached)
    with pytest.raises(Reached):
        lazy.train(config(tmp_path, amp={"enabled": amp}))
