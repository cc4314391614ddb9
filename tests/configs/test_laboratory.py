"""The ways of moving estimates that the study on nuclei tried: they do what their page says."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import batch_norm

from wsbcn_d2.layers import NORM_REGISTRY, BatchChannelNorm2d

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def laboratory():
    sys.path.insert(0, str(ROOT))
    try:
        from configs.nuclei import laboratory

        yield laboratory
    finally:
        sys.path.remove(str(ROOT))


def batches(count, size=(2, 8, 5, 6)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=generator) * 3 + i for i in range(count)]


def moments(xs):
    """Means of the batches' own means and biased variances, in float64."""
    means = torch.stack([x.double().mean((0, 2, 3)) for x in xs])
    variances = torch.stack([x.double().var((0, 2, 3), correction=0) for x in xs])
    return means.mean(0), variances.mean(0)


@pytest.mark.parametrize("name", ["CompensatedBCN", "RefreshedBCN", "MeasuredBCN"])
def test_names(laboratory, name):
    norm = NORM_REGISTRY.get(name)(64)
    assert type(norm) is BatchChannelNorm2d and norm.num_groups == 32
    assert type(norm.bn).__name__ + "BCN" == name
    norm(torch.randn(1, 64, 3, 3))
    assert norm.bn.num_batches_tracked == 1


def test_compensated_moves_leave_the_function_as_it_was(laboratory):
    bn = laboratory.Compensated(8, momentum=0.3)
    torch.nn.init.normal_(bn.weight)
    torch.nn.init.normal_(bn.bias)
    plain = laboratory.EstimatedBatchNorm2d(8, momentum=0.3)
    probe = torch.randn(1, 8, 4, 4)

    def function():
        estimates = bn.running_mean, bn.running_var
        return batch_norm(probe, *estimates, bn.weight, bn.bias, eps=bn.eps).detach()

    before = function()
    for x in batches(9):
        y = bn(x)
        plain(x)
        torch.testing.assert_close(function(), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(bn.running_mean, plain.running_mean) and bn.running_mean.mean() > 4
    y.sum().backward()  # the weight was not changed under autograd's hands
    assert bn.weight.grad.isfinite().all()


def test_refreshed_estimates_are_replaced_by_averages_now_and_then(laboratory, monkeypatch):
    monkeypatch.setattr(laboratory, "PERIOD", 4)
    bn, plain = laboratory.Refreshed(8, momentum=0.3), laboratory.EstimatedBatchNorm2d(8, 1e-5, 0.3)
    held = []
    for i, x in enumerate(batches(10)):
        bn(x)
        plain(x)
        if i % 4 == 0:
            held = [plain.running_mean.clone(), plain.running_var.clone()]
        assert torch.equal(bn.running_mean, held[0]) and torch.equal(bn.running_var, held[1])
    assert not torch.equal(plain.running_mean, held[0])


def test_measured_estimates_are_the_average_of_the_first_batches(laboratory, monkeypatch):
    monkeypatch.setattr(laboratory, "PERIOD", 5)
    bn, xs = laboratory.Measured(8, momentum=0.3), batches(9)
    for x in xs:
        bn(x)
    mean, var = moments(xs[:5])
    torch.testing.assert_close(bn.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bn.running_var.double(), var, rtol=1e-5, atol=1e-5)
    assert bn.momentum == 0.3 and bn.num_batches_tracked == 5


def test_one_contrast(laboratory):
    dark = np.full((20, 20, 3), 10, np.uint8)
    dark[5:9, 5:9] = (40, 50, 60)
    found = laboratory.one_contrast(dark)
    assert found.dtype == np.uint8 and found.shape == dark.shape
    assert found[0, 0].tolist() == [0, 0, 0] and found[6, 6].tolist() == [255, 255, 255]
    # A stain on a bright slide looks the same.
    assert np.array_equal(laboratory.one_contrast(255 - dark), found)
    assert not laboratory.one_contrast(np.full((4, 4, 3), 7, np.uint8)).any()
