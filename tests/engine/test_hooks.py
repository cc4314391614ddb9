"""The hooks, on Detectron2's ``SimpleTrainer``: no trainer of this project is needed."""

import logging
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from detectron2.engine import HookBase, SimpleTrainer, hooks
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler
from torch import nn
from torch.testing import assert_close

from wsbcn_d2 import BatchChannelNorm2d, EstimatedBatchNorm2d
from wsbcn_d2.engine import ChannelMonitor, EstimateSync, UpdateRateSchedule
from wsbcn_d2.engine import hooks as own_hooks
from wsbcn_d2.engine.from_config import estimate_hooks

STEPS = 8


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            BatchChannelNorm2d(4, 2),
            nn.Conv2d(4, 4, 3),
            EstimatedBatchNorm2d(4),
            nn.BatchNorm2d(4, momentum=0.3),
        )

    def forward(self, x):
        return {"loss": self.layers(x).square().mean()}

    def estimated(self):
        return [m for m in self.modules() if isinstance(m, EstimatedBatchNorm2d)]


class Recorder(HookBase):
    def __init__(self):
        self.rates, self.stored, self.learning_rates, self.stock = [], [], [], []

    def before_step(self):
        model = self.trainer.model
        self.rates.append([norm.momentum for norm in model.estimated()])
        self.stock.append(model.layers[4].momentum)
        self.learning_rates.append(self.trainer.optimizer.param_groups[0]["lr"])

    def after_step(self):
        latest = self.trainer.storage.latest()
        self.stored.append(latest.get("bcn_update_rate", (None,))[0])


def train(*added, model=None, base_lr=0.2):
    """Trains over a warmup and a decay by 10; returns the recording."""
    model = model or Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=base_lr)
    multiplier = WarmupParamScheduler(
        MultiStepParamScheduler([1.0, 0.1], milestones=[6], num_updates=STEPS), 0.25, 3 / STEPS
    )
    scheduler = LRMultiplier(optimizer, multiplier, STEPS)
    data = [torch.randn(2, 3, 9, 9) for _ in range(STEPS)]
    trainer = SimpleTrainer(model, data, optimizer)
    recorder = Recorder()
    trainer.register_hooks([hooks.LRScheduler(optimizer, scheduler), *added, recorder])
    trainer.train(0, STEPS)
    return recorder


def test_constant():
    recorder = train(UpdateRateSchedule(0.2, "constant"))
    assert recorder.rates == [[0.2, 0.2]] * STEPS
    assert recorder.stored == [0.2] * STEPS
    assert recorder.stock == [0.3] * STEPS  # other norms are left alone


@pytest.mark.parametrize("base_lr", [0.2, 0.02])
def test_lr_follows_the_learning_rates_factor(base_lr):
    recorder = train(UpdateRateSchedule(0.2, "lr"), base_lr=base_lr)
    expected = [0.2 * lr / base_lr for lr in recorder.learning_rates]
    assert min(expected) == pytest.approx(0.02) and max(expected) == pytest.approx(0.2)
    assert expected[0] == pytest.approx(0.05)  # the warmup too
    for rates, rate in zip(recorder.rates, expected, strict=True):
        assert rates == pytest.approx([rate, rate])
    assert recorder.stored == pytest.approx(expected)
    assert recorder.stock == [0.3] * STEPS


def test_the_rate_never_passes_one():
    recorder = train(UpdateRateSchedule(1.0, "lr"))

    class Double(HookBase):
        def before_step(self):
            self.trainer.optimizer.param_groups[0]["lr"] = 0.4

    assert max(max(rates) for rates in recorder.rates) <= 1.0
    recorder = train(Double(), UpdateRateSchedule(1.0, "lr"))
    assert recorder.rates == [[1.0, 1.0]] * STEPS


def test_a_model_without_estimates_stores_nothing():
    model = Model()
    model.layers = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.layers.append(nn.Identity()).extend([nn.Identity(), nn.Identity(), nn.BatchNorm2d(4)])
    recorder = train(UpdateRateSchedule(0.2, "lr"), model=model)
    assert recorder.stored == [None] * STEPS


def test_refused_arguments():
    with pytest.raises(ValueError, match="'cosine'.*constant, lr"):
        UpdateRateSchedule(0.1, "cosine")
    for rate in (-0.1, 1.5, "0.1"):
        with pytest.raises(ValueError, match="update rate"):
            UpdateRateSchedule(rate)


def test_estimate_sync_does_nothing_on_one_process(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a collective on one process")

    monkeypatch.setattr(dist, "all_reduce", refuse)
    results = []
    for added in ([], [EstimateSync()]):
        torch.manual_seed(3)
        model = Model()
        train(*added, model=model)
        results.append(model.state_dict())
    assert_close(results[1], results[0], rtol=0, atol=0)


def test_estimate_sync_averages_after_every_step(monkeypatch):
    """A second process whose estimates are, channel by channel, all zero means."""
    calls = []

    def all_reduce(total):
        calls.append(total.clone())
        channels = 8
        mine = total.clone()
        total[channels : 2 * channels] += mine[channels : 2 * channels]  # its variances are ours
        total[3 * channels :] += mine[3 * channels :]  # and so are its counts

    # For the hook alone: the trainer itself stays on one process.
    monkeypatch.setattr(own_hooks, "comm", SimpleNamespace(get_world_size=lambda: 2))
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    model = Model()
    train(EstimateSync(), model=model)
    assert len(calls) == STEPS  # one collective a step, for all layers together
    means = torch.cat([norm.running_mean for norm in model.estimated()])
    assert_close(means.double(), calls[-1][:8] / 2)
    assert [norm.num_batches_tracked for norm in model.estimated()] == [STEPS, STEPS]


def test_without_a_rate_it_is_the_models_and_that_is_said(caplog):
    model = Model()
    for norm in model.estimated():
        norm.momentum = 0.125
    with caplog.at_level(logging.INFO, logger="wsbcn_d2"):
        recorder = train(UpdateRateSchedule(), model=model)
    assert recorder.rates == [[0.125, 0.125]] * STEPS
    said = [r.getMessage() for r in caplog.records if r.name.startswith("wsbcn_d2")]
    assert said == ["Running estimates of 2 norms: update rate 0.125, schedule constant"]


@pytest.mark.parametrize(
    "options, kinds, rate",
    [
        ({}, [UpdateRateSchedule, EstimateSync], None),
        ({"sync_estimates": False, "update_rate": 0.5}, [UpdateRateSchedule], 0.5),
        (
            {"monitor_period": 7, "first_batch_init": False},
            [UpdateRateSchedule, EstimateSync, ChannelMonitor],
            None,
        ),
    ],
)
def test_what_looks_after_estimates(options, kinds, rate):
    found = estimate_hooks(**options)
    assert [type(hook) for hook in found] == kinds
    assert (found[0]._rate, found[0]._schedule) == (rate, "constant")
    with pytest.raises(ValueError, match="period"):
        estimate_hooks(monitor_period=-1)
