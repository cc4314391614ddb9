"""Activations and weights at the ends of what training meets, against float64."""

import pytest
import reference
import torch
from torch import nn
from torch.testing import assert_close

from wsbcn_d2 import BatchChannelNorm2d, EstimatedBatchNorm2d, WSConv2d, standardize_weight
from wsbcn_d2.layers import WS_FORMULAS

CHANNELS, GROUPS = 8, 4
SHAPE = (2, CHANNELS, 5, 6)


def constant_channels():
    x = torch.randn(SHAPE)
    x[:, ::2] = torch.tensor([0.0, 1e-6, 1.0, 10.0])[:, None, None]
    return x


# Input and tolerance, relative to the largest value. All compare float32 arithmetic with float64
# on the same float32 numbers, so the tolerance is what rounding may cost: an offset of k standard
# deviations costs k times the rounding error of a float32.
INPUTS = {
    "large": (lambda: 1e4 * torch.randn(SHAPE), 2e-5),
    "small": (lambda: 1e-6 * torch.randn(SHAPE), 2e-5),
    "huge": (lambda: 1e15 * torch.randn(SHAPE), 2e-5),
    "tiny": (lambda: 1e-30 * torch.randn(SHAPE), 2e-5),
    "offset": (lambda: 1e4 + torch.randn(SHAPE), 1e-2),
    "zero": (lambda: torch.zeros(SHAPE), 2e-5),
    "constant": (lambda: torch.full(SHAPE, 3.7), 1e-3),
    "constant channels": (constant_channels, 5e-3),
    "mixed scales": (
        lambda: torch.randn(SHAPE) * 10.0 ** torch.linspace(-6, 4, CHANNELS)[:, None, None],
        2e-5,
    ),
    "one pixel": (lambda: torch.randn(1, CHANNELS, 1, 1), 1e-3),
}


def randomized(norm):
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0, 0.3)
    # Channels that differ, or the groups of constant ones would have no deviation either.
    bn = norm.bn if isinstance(norm, BatchChannelNorm2d) else norm
    bn.bias.data = torch.linspace(-1.5, 1.5, CHANNELS)
    return norm


def close(actual, expected, tolerance, floor=1e-30):
    assert actual.isfinite().all()
    scale = max(expected.abs().max().item(), floor)
    assert_close(actual.double() / scale, expected / scale, atol=tolerance, rtol=0)


@pytest.mark.parametrize("fused", ["cpp", "off"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("layer", ["BCN", "EstBN"])
def test_norms(layer, name, steps, channels_last, fused, monkeypatch):
    monkeypatch.setenv("WSBCN_FUSED", fused)
    draw, tolerance = INPUTS[name]
    if layer == "BCN" and channels_last and fused == "off":
        tolerance *= 5  # PyTorch's group norm takes this layout's variance as E[x^2] - E[x]^2
    if layer == "BCN":
        norm = randomized(BatchChannelNorm2d(CHANNELS, GROUPS, update_rate=0.3))
        bn = norm.bn
    else:
        norm = bn = randomized(EstimatedBatchNorm2d(CHANNELS, momentum=0.3))
    mean = var = None
    for step in range(steps):
        x = draw()
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        actual = norm(x)
        wide = x.detach().double().requires_grad_()
        mean, var = reference.update(mean, var, wide.detach(), 0.3, step == 0)
    leaves = [p.detach().double().requires_grad_() for p in (bn.weight, bn.bias)]
    expected = reference.batch_affine(wide, mean, var, *leaves, norm.eps)
    own = [bn.weight, bn.bias]
    if layer == "BCN":
        outer = [p.detach().double().requires_grad_() for p in (norm.weight, norm.bias)]
        expected = reference.channel_norm(expected, GROUPS, *outer, norm.eps)
        own, leaves = [*own, norm.weight, norm.bias], [*leaves, *outer]
    close(bn.running_mean, mean, 1e-6)
    close(bn.running_var, var, 1e-3 if name == "offset" else 1e-5, floor=norm.eps)
    close(actual, expected, tolerance)
    seed = torch.randn(expected.shape)
    found = torch.autograd.grad(actual, [x, *own], seed)
    wanted = torch.autograd.grad(expected, [wide, *leaves], seed.double())
    # A gradient that cancels in exact arithmetic keeps the rounding error of its parts.
    part = (leaves[0].abs().max() * (var + norm.eps).rsqrt().max()).item() if layer == "BCN" else 0
    floors = [part, *[x.numel() / CHANNELS] * 4]
    for a, e, floor in zip(found, wanted, floors, strict=False):
        close(a, e, 5 * tolerance, max(floor, 1e-30))


@pytest.mark.parametrize("statistics", ["estimated", "batch"])
@pytest.mark.parametrize("name", ["large", "small", "huge", "tiny", "zero", "constant channels"])
def test_evaluation_and_batch_statistics_are_finite(statistics, name):
    norm = randomized(BatchChannelNorm2d(CHANNELS, GROUPS, statistics=statistics))
    for training in (True, False):
        x = INPUTS[name][0]().requires_grad_()
        y = norm.train(training)(x)
        y.square().sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in norm.parameters())
        assert all(b.isfinite().all() for b in norm.buffers())


FILTERS = {
    "1e-20": (lambda: 1e-20 * torch.randn(6, 4, 3, 3), 3e-5),
    "1e-8": (lambda: 1e-8 * torch.randn(6, 4, 3, 3), 3e-5),
    "1e4": (lambda: 1e4 * torch.randn(6, 4, 3, 3), 1e-5),
    "1e15": (lambda: 1e15 * torch.randn(6, 4, 3, 3), 1e-5),
    "offset": (lambda: 10 + 0.1 * torch.randn(6, 4, 3, 3), 1e-3),
    "one filter each": (
        lambda: torch.randn(6, 4, 3, 3) * 10.0 ** torch.arange(-16, 8, 4)[:, None, None, None],
        3e-5,
    ),
}


@pytest.mark.parametrize("fused", ["cpp", "off"])
@pytest.mark.parametrize("formula", WS_FORMULAS)
@pytest.mark.parametrize("name", FILTERS)
def test_weights(name, formula, fused, monkeypatch):
    monkeypatch.setenv("WSBCN_FUSED", fused)
    draw, tolerance = FILTERS[name]
    weight = draw().requires_grad_()
    wide = weight.detach().double().requires_grad_()
    actual = standardize_weight(weight, formula=formula)
    expected = reference.standardize_weight(wide, formula, 1e-5)
    seed = torch.randn(actual.shape)
    (found,) = torch.autograd.grad(actual, weight, seed)
    (wanted,) = torch.autograd.grad(expected, wide, seed.double())
    for a, e, g, w in zip(actual, expected, found, wanted, strict=True):
        close(a, e, tolerance)
        close(g, w, 10 * tolerance)


@pytest.mark.parametrize("value", [0.0, 1e-20, 1.0, 1e4, -1e15])
@pytest.mark.parametrize("formula", WS_FORMULAS)
def test_constant_filters_through_a_convolution(formula, value):
    conv = WSConv2d(4, CHANNELS, 3, ws_formula=formula, norm=BatchChannelNorm2d(CHANNELS, GROUPS))
    nn.init.constant_(conv.weight, value)
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    y = conv(x)
    y.square().sum().backward()
    # Nothing but the rounding of the filter's own mean is left of a constant filter.
    assert y.abs().max() < 1e-3
    for tensor in (y, x.grad, *(p.grad for p in conv.parameters()), *conv.norm.buffers()):
        assert tensor.isfinite().all()
