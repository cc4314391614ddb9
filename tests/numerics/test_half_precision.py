"""Training under autocast with a GradScaler, with steps that overflow."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from wsbcn_d2 import BatchChannelNorm2d, EstimatedBatchNorm2d, WSConv2d

STEPS = 14
INF_ACTIVATION, NAN_ACTIVATION, INF_GRADIENT, LARGE_ACTIVATION = 3, 5, 7, 9
INJECTED = {INF_ACTIVATION, NAN_ACTIVATION, INF_GRADIENT, LARGE_ACTIVATION}

NORMS = {
    "BCN": lambda channels: BatchChannelNorm2d(channels, 4, update_rate=0.1),
    "BatchBCN": lambda channels: BatchChannelNorm2d(channels, 4, statistics="batch"),
    "EstBN": lambda channels: EstimatedBatchNorm2d(channels, momentum=0.1),
    "GN": lambda channels: nn.GroupNorm(4, channels),
    "BN": lambda channels: nn.BatchNorm2d(channels),
}

halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
backends = pytest.mark.parametrize("fused", ["cpp", "off"])


class Overflow(nn.Module):
    """Multiplies activations by ``forward`` and gradients by ``backward``; both 1 if unset."""

    def __init__(self):
        super().__init__()
        self.activation = self.gradient = None

    def forward(self, x):
        if self.activation is not None:
            x = x.clone()
            x[0, 0, 0, 0] = self.activation
        if self.gradient is not None:
            x.register_hook(lambda gradient: gradient * float("inf"))
        return x


def make(norm):
    layers, channels = [], 3
    for _ in range(2):
        conv = WSConv2d(channels, 8, 3, padding=1, norm=norm(8), activation=nn.ReLU())
        layers += [conv, Overflow()]
        channels = 8
    return nn.Sequential(*layers, nn.Conv2d(8, 1, 1))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def run(norm, dtype):
    """Train on a fixed task; returns (steps skipped, losses, states after every step)."""
    torch.manual_seed(0)
    model = make(NORMS[norm])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
    image = torch.randn(2, 3, 8, 8)
    target = image.mean(dim=1, keepdim=True)
    first = model[1]
    skipped, losses, states = [], [], [state(model)]
    for step in range(STEPS):
        first.activation = {
            INF_ACTIVATION: float("inf"),
            NAN_ACTIVATION: float("nan"),
        }.get(step)
        first.gradient = step == INF_GRADIENT or None
        # Finite in float32, beyond the largest float16 (65504) and nearly bfloat16's.
        x = image * 3e38 if step == LARGE_ACTIVATION else image
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = (model(x).float() - target).square().mean()
        scaler.scale(loss).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < before:
            skipped.append(step)
        losses.append(loss.item())
        states.append(state(model))
    return skipped, losses, states


@halves
@backends
@pytest.mark.parametrize("norm", ["BCN", "EstBN"])
def test_overflowing_steps_are_skipped_and_training_goes_on(norm, fused, dtype, monkeypatch):
    monkeypatch.setenv("WSBCN_FUSED", fused)
    skipped, losses, states = run(norm, dtype)
    # As for any norm: exactly the steps that group norm skips.
    assert skipped == run("GN", dtype)[0]
    assert set(skipped) == INJECTED
    parameters = {name for name, _ in make(NORMS[norm]).named_parameters()}
    for step in range(STEPS):
        before, after = states[step], states[step + 1]
        for name, value in after.items():
            assert value.isfinite().all(), (step, name)
            assert value.dtype in (torch.float32, torch.int64)
            if name in parameters and step in INJECTED:
                assert torch.equal(value, before[name]), (step, name)
        moved = [
            name
            for name in before
            if "running" in name and not torch.equal(before[name], after[name])
        ]
        if step in (INF_ACTIVATION, NAN_ACTIVATION):
            # The layer before the fault saw a good batch, the one after it did not.
            assert moved and all(name.startswith("0.") for name in moved)
        elif step != LARGE_ACTIVATION:
            assert len(moved) == 4
    counts = [v for name, v in states[-1].items() if name.endswith("num_batches_tracked")]
    assert STEPS - 1 <= counts[0].item() <= STEPS
    assert STEPS - 3 <= counts[1].item() <= STEPS - 2
    good = [loss for step, loss in enumerate(losses) if step not in INJECTED]
    assert all(loss == loss for loss in good)
    assert good[-1] < 0.7 * good[0]


@halves
def test_batch_statistics_are_lost_where_estimates_are_not(dtype):
    # What the check of update_estimates is for: PyTorch's own batch norm does not recover.
    _, _, states = run("BatchBCN", dtype)
    lost = [name for name, value in states[-1].items() if not value.isfinite().all()]
    assert lost and all("running" in name for name in lost)


@halves
@pytest.mark.parametrize("norm", ["BCN", "EstBN"])
def test_half_precision_trains_like_float32(norm, dtype):
    torch.manual_seed(0)
    model = make(NORMS[norm])
    x = torch.randn(2, 3, 8, 8)
    outputs = []
    for enabled in (False, True):
        model.load_state_dict(make_state(model))
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            outputs.append(model(x).float())
    tolerance = 0.01 if dtype == torch.float16 else 0.08
    assert_close(outputs[1], outputs[0], atol=tolerance, rtol=0)


def make_state(model):
    return {
        name: torch.zeros_like(value) if name.endswith("tracked") else value.clone()
        for name, value in model.state_dict().items()
    }
