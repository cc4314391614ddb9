"""The monitor's figures on nets whose channels were made to be what they are."""

import json

import pytest
import torch
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.utils.events import JSONWriter
from torch import nn

from wsbcn_d2 import BatchChannelNorm2d, EstimatedBatchNorm2d
from wsbcn_d2.engine import ChannelMonitor, Trainer
from wsbcn_d2.engine import monitor as monitor_module
from wsbcn_d2.engine.monitor import MAX_SHIFT, part_of

QUANTITIES = ("inactive", "shift", "estimate_error")


class Net(nn.Module):
    """One norm under a name of the detector's backbone, on what comes in."""

    def __init__(self, norm):
        super().__init__()
        self.bottom_up = norm
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return {"loss": (self.bottom_up(x) * self.scale).square().sum()}


class Keep(HookBase):
    def __init__(self):
        self.values = {}

    def after_step(self):
        for name, (value, iteration) in self.trainer.storage.latest().items():
            if name.startswith("channels/") and iteration == self.trainer.iter:
                self.values.setdefault(name, {})[iteration] = value


def watch(norm, batches, period=1, window=1, **kwargs):
    """Trains at a learning rate of 0; returns {name: {iteration: value}}."""
    net = Net(norm)
    keep = Keep()
    trainer = SimpleTrainer(net, batches, torch.optim.SGD(net.parameters(), lr=0.0))
    monitor = ChannelMonitor(period, window, **kwargs)
    trainer.register_hooks([monitor, keep])
    trainer.train(0, len(batches))
    assert not any(m._forward_hooks for m in net.modules())  # nothing stays attached
    return keep.values


def test_channels_forced_negative_are_counted():
    norm = nn.GroupNorm(2, 8)
    with torch.no_grad():
        norm.bias[:3] = -50.0  # never active
        norm.bias[3] = 50.0  # always active
    values = watch(norm, [torch.randn(2, 8, 16, 16)])
    assert values["channels/backbone/inactive_mean"] == {0: 3 / 8}
    assert "channels/backbone/estimate_error_mean" not in values


def test_the_threshold_is_a_share_of_positions():
    norm = nn.BatchNorm2d(2)
    x = torch.full((1, 2, 10, 10), -1.0)
    x[0, 0, 0, :2] = 1.0  # active at 2 % of its positions
    x[0, 1, 0, :50] = 1.0  # ... at 10 %
    assert watch(norm, [x])["channels/backbone/inactive_mean"] == {0: 0.0}
    loose = watch(norm, [x], threshold=0.95)
    assert loose["channels/backbone/inactive_mean"] == {0: 0.5}


@pytest.mark.parametrize(
    "shape, stride", [((1, 32, 32), 1), ((1, 63, 65), 1), ((1, 64, 64), 2), ((9, 32, 32), 3)]
)
def test_about_a_thousand_positions_are_looked_at(shape, stride):
    samples, height, width = shape
    x = torch.full((samples, 2, height, width), -1.0)
    x[0, 0, 0, stride] = 1.0  # active at one position that is looked at
    x[:, 1] = 1.0
    x[:, 1, ::stride, ::stride] = -1.0  # active elsewhere only
    norm = EstimatedBatchNorm2d(2, momentum=0.0)
    norm.num_batches_tracked.fill_(1)  # its estimates stay 0 and 1
    found = watch(norm, [x], threshold=1 - 1e-6)["channels/backbone/inactive_mean"]
    assert found == {0: 0.5}


def test_a_window_counts_all_its_steps():
    """Negative throughout one batch, not throughout two."""
    norm = EstimatedBatchNorm2d(1, momentum=0.0)
    batches = [torch.full((1, 1, 4, 4), value) for value in (-1.0, 1.0, -1.0, -1.0)]
    values = watch(norm, batches, period=2, window=2)
    assert values["channels/backbone/inactive_mean"] == {1: 0.0, 3: 1.0}


def test_shift_is_mean_over_deviation_of_a_channel():
    norm = nn.BatchNorm2d(4, eps=1e-8)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 1.0, 0.0]))
        norm.bias.copy_(torch.tensor([0.0, 3.0, -0.5, 1.0]))
    values = watch(norm, [torch.randn(2, 4, 8, 8)])
    assert MAX_SHIFT == 10  # of a channel that never changes
    expected = (0 + 3 / 2 + 0.5 + MAX_SHIFT) / 4
    assert values["channels/backbone/shift_mean"][0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("make", [EstimatedBatchNorm2d, lambda c: BatchChannelNorm2d(c, 2)])
def test_estimates_that_equal_the_batch_have_no_error(make):
    values = watch(make(4), [torch.randn(2, 4, 8, 8) + 3])  # the first batch sets them outright
    assert values["channels/backbone/estimate_error_max"][0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("make", [EstimatedBatchNorm2d, lambda c: BatchChannelNorm2d(c, 2)])
def test_a_known_error_of_the_estimates(make):
    norm = make(4)
    estimates = getattr(norm, "bn", norm)
    estimates.num_batches_tracked.fill_(1)
    estimates.running_mean.copy_(torch.tensor([0.0, 1.0, 2.0, -3.0]))
    estimates.running_var.fill_(4.0)
    estimates.momentum = 0.0  # they stay
    base = torch.randn(2, 4, 8, 8)
    base -= base.mean((0, 2, 3), keepdim=True)
    # The window's mean counts, not each batch's: 3 and -1 around 1.
    values = watch(norm, [base + 3, base - 1], period=2, window=2)
    expected = (1 + 0 + 1 + 4) / 4 / 2
    error = values["channels/backbone/estimate_error_mean"]
    assert list(error) == [1]
    assert error[1] == pytest.approx(expected, rel=1e-4)


def test_zero_is_inactive_and_the_estimates_error_is_bounded_by_eps():
    norm = EstimatedBatchNorm2d(1, eps=1e-4, momentum=0.0)
    norm.num_batches_tracked.fill_(1)
    norm.running_var.fill_(3e-4)
    values = watch(norm, [torch.zeros(1, 1, 4, 4)])
    assert values["channels/backbone/inactive_mean"] == {0: 1.0}
    norm.running_mean.fill_(0.05)
    error = watch(norm, [torch.zeros(1, 1, 4, 4)])["channels/backbone/estimate_error_mean"]
    assert error[0] == pytest.approx(0.05 / 4e-4**0.5)
    norm.running_var.fill_(0.0)
    error = watch(norm, [torch.zeros(1, 1, 4, 4)])["channels/backbone/estimate_error_mean"]
    assert error[0] == pytest.approx(0.05 / 1e-4**0.5)


def test_the_norms_of_a_part_have_a_mean_and_a_largest():
    norms = nn.Sequential(*(nn.BatchNorm2d(2) for _ in range(4)))
    with torch.no_grad():
        for norm, biases in zip(norms, ((-50, -50), (-50, 50), (50, 50), (-50, 50)), strict=True):
            norm.bias.copy_(torch.tensor(biases))
    values = watch(norms, [torch.randn(2, 2, 8, 8)])
    assert values["channels/backbone/inactive_mean"] == {0: 0.5}
    assert values["channels/backbone/inactive_max"] == {0: 1.0}


def test_hooks_are_on_sampled_steps_alone():
    attached = []

    class Look(nn.BatchNorm2d):
        def forward(self, x):
            attached.append(len(self._forward_hooks))
            return super().forward(x)

    watch(Look(2), [torch.randn(1, 2, 4, 4)] * 10, period=5, window=2)
    assert attached == [0, 0, 0, 1, 1] * 2


def test_a_training_that_ends_within_a_step_leaves_no_hooks():
    norm = nn.BatchNorm2d(2)
    net = Net(norm)

    class Interrupt(HookBase):
        def before_step(self):
            assert len(norm._forward_hooks) == 1
            raise KeyboardInterrupt

    trainer = SimpleTrainer(
        net, [torch.ones(1, 2, 4, 4)], torch.optim.SGD(net.parameters(), lr=0.0)
    )
    trainer.register_hooks([ChannelMonitor(2, 2), Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train(0, 2)
    assert not norm._forward_hooks


def test_an_evaluation_between_the_steps_is_not_watched():
    norm = EstimatedBatchNorm2d(1, momentum=0.0)

    class Evaluate(HookBase):
        def after_step(self):
            norm.eval()
            norm(torch.ones(1, 1, 4, 4))
            norm.train()

    net, keep = Net(norm), Keep()
    trainer = SimpleTrainer(
        net, [-torch.ones(1, 1, 4, 4)] * 2, torch.optim.SGD(net.parameters(), lr=0.0)
    )
    trainer.register_hooks([ChannelMonitor(2, 2), Evaluate(), keep])
    trainer.train(0, 2)
    assert keep.values["channels/backbone/inactive_mean"] == {1: 1.0}


def test_empty_batches_and_their_windows_say_nothing():
    values = watch(EstimatedBatchNorm2d(2), [torch.zeros(0, 2, 4, 4)])
    assert values == {}


def test_bad_period():
    with pytest.raises(ValueError, match="period"):
        ChannelMonitor(0)


@pytest.mark.parametrize(
    "name,part",
    [
        ("module.backbone.bottom_up.res2.0.conv1.norm", "backbone"),
        ("backbone.fpn_lateral2.norm", "fpn"),
        ("roi_heads.box_head.conv1.norm", "box_head"),
        ("roi_heads.mask_head.mask_fcn1.norm", "mask_head"),
        ("head.cls_subnet.1", "head"),
        ("proposal_generator.rpn_head.conv.norm", "rpn"),
        ("model.backbone.fpn_output5.norm", "fpn"),
    ],
)
def test_parts(name, part):
    assert part_of(name) == part


def test_figures_reach_metrics_json(tmp_path):
    net = Net(nn.GroupNorm(1, 2))
    trainer = SimpleTrainer(
        net, [torch.randn(1, 2, 4, 4)] * 2, torch.optim.SGD(net.parameters(), lr=0.0)
    )

    class Write(HookBase):
        def after_train(self):
            writer = JSONWriter(str(tmp_path / "metrics.json"))
            writer.write()
            writer.close()

    trainer.register_hooks([ChannelMonitor(2), Write()])
    trainer.train(0, 2)
    (line,) = (tmp_path / "metrics.json").read_text().splitlines()
    names = {name for name in json.loads(line) if name.startswith("channels/")}
    assert names == {
        f"channels/backbone/{q}_{how}" for q in ("inactive", "shift") for how in ("mean", "max")
    }


def test_the_trainer_adds_it_by_config(tiny_cfg, monkeypatch, tmp_path):
    monkeypatch.setattr(Trainer, "build_train_loader", classmethod(lambda cls, cfg: [1]))
    for period in (0, 7):
        cfg = tiny_cfg("OUTPUT_DIR", str(tmp_path), "MODEL.BCN.MONITOR_PERIOD", period)
        found = [h for h in Trainer(cfg)._hooks if isinstance(h, ChannelMonitor)]
        assert [hook._period for hook in found] == [period] * bool(period)


@pytest.mark.parametrize(
    "options, window", [((100,), 8), ((3,), 3), ((8, 9), 8), ((5, 0), 1), ((5, 2), 2)]
)
def test_a_window_is_eight_steps_and_no_longer_than_the_period(options, window):
    monitor = ChannelMonitor(*options)
    assert (monitor._window, monitor._threshold) == (window, 0.99)


@pytest.mark.parametrize("active, inactive", [(9, 0.5), (11, 0.0)])
def test_more_than_99_of_100_positions_are_never_active(active, inactive):
    norm = EstimatedBatchNorm2d(2, momentum=0.0)
    norm.num_batches_tracked.fill_(1)
    x = torch.full((1, 2, 25, 40), -1.0)
    x[0, 0].view(-1)[:active] = 1.0
    x[0, 1] = 1.0
    assert watch(norm, [x])["channels/backbone/inactive_mean"] == {0: inactive}


def test_figures_are_those_of_one_window_and_of_the_first_process(monkeypatch):
    """Not smoothed with those of earlier windows; other processes watch nothing."""
    norm = EstimatedBatchNorm2d(1, momentum=0.0)
    net, hints = Net(norm), []

    class Look(HookBase):
        def after_step(self):
            hints.append(dict(self.trainer.storage.smoothing_hints()))

    for main in (True, False):
        monkeypatch.setattr(monitor_module.comm, "is_main_process", lambda main=main: main)
        trainer = SimpleTrainer(
            net, [-torch.ones(1, 1, 4, 4)] * 2, torch.optim.SGD(net.parameters(), lr=0.0)
        )
        trainer._write_metrics = lambda *_: None
        trainer.register_hooks([ChannelMonitor(1), Look()])
        trainer.train(0, 2)
    names = {f"channels/backbone/{q}_{h}" for q in QUANTITIES for h in ("mean", "max")}
    assert hints[0] == dict.fromkeys(names, False) and hints[-1] == {}


def test_outputs_that_are_no_maps_are_not_watched():
    layer = monitor_module._Layer("part", nn.BatchNorm1d(3))
    layer.observe(layer.module, (torch.randn(4, 3),), torch.randn(4, 3))
    assert layer.finish(0.99) == {}


def test_a_constant_channel_has_no_nan():
    """E[y^2] - E[y]^2 may round below zero."""
    layer = monitor_module._Layer("part", nn.GroupNorm(1, 1))
    for value in (0.1, 1e3 / 3, 0.0):
        layer.observe(layer.module, (), torch.full((1, 1, 7, 7), value))
        shift = layer.finish(0.99)["shift"].item()
        assert shift == (MAX_SHIFT if value else 0)
