"""Resuming with another schedule: what differs is said, and either one can be had."""

import logging

import pytest
import torch
from detectron2.engine import SimpleTrainer, hooks
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler
from torch import nn

from wsbcn_d2.engine.from_config import resumed_schedule
from wsbcn_d2.engine.hooks import ResumedSchedule

LONG = {"values": [1.0, 0.1], "milestones": [6], "num_updates": 10}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, data):
        return {"loss": self.layer(data).square().mean()}


def trainer(lr, *, weight_decay=0.0, schedule=LONG, take="checkpoint", attached=True, hook=True):
    """A trainer of 10 steps, whose scheduler is attached at once (YAML) or at the start."""
    torch.manual_seed(0)
    model = Model()
    groups = [{"params": [model.layer.weight]}, {"params": [model.layer.bias], "lr": 2 * lr}]
    optimizer = torch.optim.SGD(groups, lr, momentum=0.9, weight_decay=weight_decay)
    result = SimpleTrainer(model, [torch.ones(1, 2)] * 20, optimizer)
    scheduler = WarmupParamScheduler(MultiStepParamScheduler(**schedule), 0.5, 0.2)
    if attached:
        scheduler = LRMultiplier(optimizer, scheduler, 10)
    options = {"lr": lr, "decay": weight_decay}
    lengths = {"steps": schedule["milestones"], "batch": 1}
    ours = [ResumedSchedule(optimizer, options, lengths, take=take, key="WHOSE")] if hook else []
    rates = []

    class Watch(hooks.HookBase):
        def before_step(self):
            rates.append([g["lr"] for g in optimizer.param_groups])

    result.register_hooks([*ours, hooks.LRScheduler(scheduler=scheduler), Watch()])
    return result, rates


def state(t):
    return {**super(type(t), t).state_dict(), "optimizer": t.optimizer.state_dict()}


def resumed(start, caplog, before, **options):
    """Learning rates from step 3 on, after three of ``before``; and what was said."""
    first, _ = before
    first.train(0, 3)
    saved = {**state(first), "iteration": 2}  # as saved within the third step
    second, rates = trainer(start, **options)
    second.optimizer.load_state_dict(saved.pop("optimizer"))
    super(type(second), second).load_state_dict(saved)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="wsbcn_d2"):
        second.train(second.iter + 1, 10)
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("wsbcn_d2")]
    return [rate for rate, _ in rates], rates, lines, second


@pytest.mark.parametrize("attached", [True, False])
def test_nothing_is_said_where_nothing_differs(caplog, attached):
    rates, _, lines, _ = resumed(0.1, caplog, trainer(0.1, attached=attached), attached=attached)
    assert rates == pytest.approx([0.1] * 3 + [0.01] * 4) and lines == []


@pytest.mark.parametrize("attached", [True, False])
def test_the_checkpoints_rate_holds_and_that_is_said(caplog, attached):
    rates, _, lines, _ = resumed(0.03, caplog, trainer(0.1, attached=attached), attached=attached)
    assert rates == pytest.approx([0.1] * 3 + [0.01] * 4)
    assert lines == [
        "The schedule of the checkpoint and of the config differ: lr was 0.1, is 0.03; 0.1 holds "
        "(for the config's, WHOSE config)"
    ]


@pytest.mark.parametrize("attached", [True, False])
def test_the_configs_rate_can_be_had(caplog, attached):
    options = {"take": "config", "weight_decay": 0.5, "attached": attached}
    _, rates, lines, after = resumed(0.03, caplog, trainer(0.1, attached=attached), **options)
    expected = [[0.03, 0.06]] * 3 + [[0.003, 0.006]] * 4
    assert all(a == pytest.approx(e) for a, e in zip(rates, expected, strict=True))
    assert [g["weight_decay"] for g in after.optimizer.param_groups] == [0.5, 0.5]
    assert lines[0].count("which holds") == 2 and "set 0.1" in lines[0]


@pytest.mark.parametrize("attached", [True, False])
def test_the_configs_steps_hold_and_that_is_said(caplog, attached):
    schedule = {**LONG, "milestones": [4]}
    rates, _, lines, _ = resumed(
        0.1, caplog, trainer(0.1, attached=attached), schedule=schedule, attached=attached
    )
    assert rates == pytest.approx([0.1] + [0.01] * 6)
    assert lines == [
        "The schedule of the checkpoint and of the config differ: steps was [6], is [4], which "
        "holds (to go on as before, set [6])"
    ]


def test_a_checkpoint_that_has_no_record_of_its_schedule(caplog):
    rates, _, lines, _ = resumed(0.03, caplog, trainer(0.1, hook=False))
    assert rates == pytest.approx([0.1] * 3 + [0.01] * 4)
    assert lines[0].endswith("lr was 0.1, is 0.03; 0.1 holds (for the config's, WHOSE config)")


def test_every_key_of_the_solver_that_a_schedule_rests_on_is_compared(tiny_cfg):
    cfg = tiny_cfg("SOLVER.STEPS", (3, 4))
    hook = resumed_schedule(cfg, torch.optim.SGD([torch.zeros(1)], 0.1))
    names = {
        *("BASE_LR", "BIAS_LR_FACTOR", "MOMENTUM", "NESTEROV", "WEIGHT_DECAY"),
        *("WEIGHT_DECAY_NORM", "WEIGHT_DECAY_BIAS", "IMS_PER_BATCH", "LR_SCHEDULER_NAME"),
        *("STEPS", "GAMMA", "MAX_ITER", "WARMUP_FACTOR", "WARMUP_ITERS", "WARMUP_METHOD"),
    }
    saved = hook.state_dict()["schedule"]
    assert saved == {
        f"SOLVER.{name}": list(v) if isinstance(v := cfg.SOLVER[name], tuple) else v
        for name in names
    }
    for name in saved:
        hook.load_state_dict({"schedule": {**saved, name: "other"}})
        (said,) = hook._differences()
        assert said.startswith(f"{name} was other, is ")
        holds = "for the config's, SOLVER.ON_RESUME config" not in said
        options = ("BASE_LR", "BIAS_LR_", "MOMENTUM", "NESTEROV", "WEIGHT_DECAY")
        assert holds != name.removeprefix("SOLVER.").startswith(options), said


def test_a_run_from_the_start_says_nothing(caplog):
    fresh, rates = trainer(0.1, take="config")
    with caplog.at_level(logging.WARNING, logger="wsbcn_d2"):
        fresh.train(0, 2)
    assert rates[0][0] == pytest.approx(0.05) and caplog.records == []


def test_an_unknown_wish():
    with pytest.raises(ValueError, match="WHOSE 'mine': say 'checkpoint' or 'config'"):
        trainer(0.1, take="mine")
