"""Averaged models: ``torch.optim.swa_utils`` and moving averages of whole models."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.testing import assert_close

from wsbcn_d2 import BatchChannelNorm2d, EstimatedBatchNorm2d, WSConv2d
from wsbcn_d2.engine.sync import EstimateSynchronizer


@pytest.fixture(autouse=True, params=["cpp", "off"])
def backend(request, monkeypatch):
    monkeypatch.setenv("WSBCN_FUSED", request.param)


def make(kind, affine=True):
    if kind == "BCN":
        return BatchChannelNorm2d(8, 4).double()
    return EstimatedBatchNorm2d(8, affine=affine).double()


def half(norm):
    return norm.bn if isinstance(norm, BatchChannelNorm2d) else norm


def batches(count=5):
    return [torch.randn(2, 8, 5, 6, dtype=torch.float64) * (1 + i) + i for i in range(count)]


@pytest.mark.parametrize("kind", ["BCN", "EstBN"])
def test_update_bn_averages_the_batches_as_batch_norm_does(kind):
    norm, stock = make(kind), nn.BatchNorm2d(8).double()
    norm(torch.randn(2, 8, 5, 6, dtype=torch.float64) + 50)  # what was before must not matter
    xs = batches()
    update_bn(xs, norm)
    update_bn(xs, stock)
    bn = half(norm)
    assert bn.momentum == 0.01 and bn.num_batches_tracked == len(xs) and norm.training
    assert_close(bn.running_mean, stock.running_mean)
    # Batch norms take unbiased variances; with these n the two differ by n / (n - 1).
    n = xs[0].numel() // 8
    assert_close(bn.running_var, stock.running_var * (n - 1) / n)
    variances = [x.var((0, 2, 3), correction=0) for x in xs]
    assert_close(bn.running_var, sum(variances) / len(xs))


def test_update_bn_passes_over_what_other_batches_are_passed_over():
    norm, xs = make("BCN"), batches()
    bad = xs[1].clone()
    bad[0, 0, 0, 0] = torch.nan
    update_bn([xs[0], bad, xs[0][:0], xs[1]], norm)
    twin = make("BCN")
    update_bn(xs[:2], twin)
    assert_close(dict(norm.named_buffers()), dict(twin.named_buffers()))


def test_a_frozen_affine_keeps_its_estimates():
    norm, xs = make("BCN"), batches()
    norm.bn.requires_grad_(False)
    norm.bn.momentum = None
    before = norm.bn.running_mean.clone()
    norm(xs[0])
    assert torch.equal(norm.bn.running_mean, before)
    assert norm.bn.num_batches_tracked == 0


def test_cumulative_averages_take_part_in_synchronization():
    norm = make("EstBN")
    norm.momentum = None
    norm(batches(1)[0])
    EstimateSynchronizer([norm])  # and see tests/distributed for the rest


def model():
    layers = [WSConv2d(8, 8, 3, norm=BatchChannelNorm2d(8, 4)), EstimatedBatchNorm2d(8)]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("ema", [True, False])
def test_averaged_models(use_buffers, ema):
    source = model()
    averaged = AveragedModel(
        source, use_buffers=use_buffers, multi_avg_fn=get_ema_multi_avg_fn(0.5) if ema else None
    )
    optimizer = torch.optim.SGD(source.parameters(), lr=0.1)
    snapshots, xs = [], batches()
    for x in xs:
        source(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(source)
        snapshots.append(copy.deepcopy(dict(source.named_buffers())))
    buffers = dict(averaged.module.named_buffers())
    for name, value in buffers.items():
        if name.endswith("num_batches_tracked"):
            continue
        expected = snapshots[-1][name]
        if use_buffers and ema:
            expected = snapshots[0][name]
            for later in snapshots[1:]:
                expected = 0.5 * expected + 0.5 * later[name]
        elif use_buffers:
            expected = sum(s[name] for s in snapshots) / len(snapshots)
        assert_close(value, expected)
    update_bn(xs, averaged)
    twin = copy.deepcopy(averaged.module)
    for bn in twin.modules():
        if isinstance(bn, EstimatedBatchNorm2d):
            bn.reset_running_stats()
    update_bn(xs, twin)
    assert_close(dict(averaged.module.named_buffers()), dict(twin.named_buffers()))
    assert averaged.eval()(xs[0]).isfinite().all()


def test_a_moving_average_of_the_state_as_detectron2_keeps_it():
    """Its EMA blends floating buffers and parameters and copies the rest."""
    source = model()
    state = copy.deepcopy(dict(source.state_dict()))
    for x in batches():
        source(x)
        for name, value in source.state_dict().items():
            if value.is_floating_point():
                state[name].mul_(0.5).add_(value, alpha=0.5)
            else:
                state[name].copy_(value)
    twin = model()
    twin.load_state_dict(state)
    x = batches(1)[0]
    assert twin.eval()(x).isfinite().all()
    twin.train()(x)  # goes on from the average: the first batch does not set it outright
    bn = twin[0].norm.bn
    assert bn.num_batches_tracked == 6
    moved = (bn.running_mean - state["0.norm.bn.running_mean"]).abs()
    assert (moved > 0).all() and (moved < 0.2).all()
