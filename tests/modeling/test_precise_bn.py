"""PreciseBN (fvcore's ``update_bn_stats``) on running estimates."""

import copy

import pytest
import reference
import torch
from fvcore.nn import update_bn_stats
from torch import nn
from torch.testing import assert_close

from wsbcn_d2 import BatchChannelNorm2d, EstimatedBatchNorm2d

BATCHES, PIXELS = 6, 2 * 12 * 12


def network(make_norm):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        make_norm(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        make_norm(8),
    )


def bcn(statistics):
    return lambda channels: BatchChannelNorm2d(channels, 4, statistics=statistics)


@pytest.mark.parametrize(
    ("estimated", "stock"),
    [(EstimatedBatchNorm2d, nn.BatchNorm2d), (bcn("estimated"), bcn("batch"))],
    ids=["EstBN", "BCN"],
)
@pytest.mark.parametrize("trained_before", [False, True])
def test_the_statistics_are_those_of_batch_norm(estimated, stock, trained_before):
    ours, theirs = network(estimated), network(stock)
    theirs.load_state_dict(ours.state_dict())
    data = [torch.randn(2, 3, 12, 12) * (i + 1) + i for i in range(BATCHES)]
    if trained_before:
        ours(torch.randn(2, 3, 12, 12))
    for model in (ours, theirs):
        update_bn_stats(model, data, BATCHES)
    state = theirs.state_dict()
    for key, value in ours.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            # fvcore takes Bessel's correction out of the variance, which ours never had in.
            tolerance = 1e-4 if key.endswith("mean") else 1.2 / PIXELS
            assert_close(value, state[key], atol=1e-5, rtol=tolerance)
    assert all(m.momentum == 0.01 for m in ours.modules() if isinstance(m, EstimatedBatchNorm2d))


def test_they_are_the_moments_of_all_images_together():
    model = nn.Sequential(bcn("estimated")(8))
    data = [torch.randn(2, 8, 12, 12) * (i + 1) + i for i in range(BATCHES)]
    update_bn_stats(model, data, BATCHES)
    mean, var = reference.moments(torch.cat(data).double())
    assert_close(model[0].bn.running_mean.double(), mean, atol=1e-5, rtol=1e-5)
    assert_close(model[0].bn.running_var.double(), var, atol=1e-5, rtol=1.2 / PIXELS)


def test_training_goes_on_from_them():
    model = nn.Sequential(bcn("estimated")(8))
    data = [torch.randn(2, 8, 12, 12) + 5 for _ in range(BATCHES)]
    update_bn_stats(model, data, BATCHES)
    twin = copy.deepcopy(model)
    norm = model[0].bn
    mean, var = norm.running_mean.double(), norm.running_var.double()
    x = torch.randn(2, 8, 12, 12)
    mean, var = reference.update(mean, var, x.double(), 0.01, first=False)
    assert torch.equal(model(x), twin(x))
    assert_close(norm.running_mean.double(), mean, atol=1e-5, rtol=1e-5)
    assert_close(norm.running_var.double(), var, atol=1e-4, rtol=1e-4)
