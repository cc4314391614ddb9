"""``EstimatedBatchNorm2d``: estimates, outputs and gradients over several steps, and its edges."""

import copy
import pickle

import pytest
import reference
import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn
from torch.testing import assert_close

from wsbcn_d2 import (
    BatchChannelNorm2d,
    EstimatedBatchNorm2d,
    set_update_rate,
    skip_first_batch_init,
)

CHANNELS = 5


def batches(steps, shape=(2, CHANNELS, 6, 7)):
    """Batches whose moments wander from step to step."""
    return [
        torch.randn(shape, dtype=torch.double) * (1 + 0.3 * step)
        + torch.randn(1, shape[1], 1, 1, dtype=torch.double)
        for step in range(steps)
    ]


def make(rate=0.1, **kwargs):
    norm = EstimatedBatchNorm2d(CHANNELS, momentum=rate, **kwargs)
    if norm.affine:
        nn.init.normal_(norm.weight, 1.0, 0.3)
        nn.init.normal_(norm.bias)
    return norm


def estimates(norm):
    return [
        norm.running_mean.clone(),
        norm.running_var.clone(),
        norm.num_batches_tracked.clone(),
    ]


@pytest.mark.parametrize("rate", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("eps", [1e-5, 0.5])
@pytest.mark.parametrize("dtype", [torch.double, torch.float])
def test_steps_against_the_reference(rate, eps, dtype):
    norm = make(rate, eps=eps).to(dtype)
    mean, var = torch.zeros(CHANNELS).double(), torch.ones(CHANNELS).double()
    weight, bias = norm.weight.detach().double(), norm.bias.detach().double()
    tolerance = dict(atol=1e-10, rtol=1e-9) if dtype == torch.double else {}
    tolerance = tolerance or dict(atol=1e-4, rtol=1e-4)
    for step, batch in enumerate(batches(5)):
        mean, var = reference.update(mean, var, batch, rate, first=step == 0 or rate == 1)
        x64, w64, b64 = (t.clone().requires_grad_() for t in (batch, weight, bias))
        expected = reference.batch_affine(x64, mean, var, w64, b64, eps)
        x = batch.to(dtype).requires_grad_()
        actual = norm(x)
        assert_close(norm.running_mean.double(), mean, **tolerance)
        assert_close(norm.running_var.double(), var, **tolerance)
        assert_close(actual.double(), expected, **tolerance)
        # The estimates are constants to autograd: no terms through mean and variance.
        seed = torch.randn_like(expected)
        expected = torch.autograd.grad(expected, [x64, w64, b64], seed)
        actual = torch.autograd.grad(actual, [x, norm.weight, norm.bias], seed.to(dtype))
        for a, e in zip(actual, expected, strict=True):
            assert_close(a.double(), e, atol=10 * tolerance["atol"], rtol=tolerance["rtol"])
    assert norm.num_batches_tracked == 5


def test_the_first_batch_sets_the_estimates_and_the_second_moves_them():
    norm = make(rate=0.01)
    first, second = batches(2)
    norm(first.float())
    mean, var = reference.moments(first)
    assert_close(norm.running_mean, mean.float())
    assert_close(norm.running_var, var.float())
    norm(second.float())
    moved = reference.moments(second)[0]
    assert_close(norm.running_mean, (mean + 0.01 * (moved - mean)).float())


def test_skipping_the_first_batch_init_moves_from_mean_0_and_variance_1():
    norm, started = make(rate=0.01), make(rate=0.01)
    first, second = batches(2)
    for _ in range(3):  # what averages over the batches needs their number
        started(second.float())
    before = started.running_mean.clone()
    model = nn.Sequential(norm, nn.Sequential(started), nn.BatchNorm2d(4))
    assert skip_first_batch_init(model) is model
    assert [int(m.num_batches_tracked) for m in (norm, started, model[2])] == [1, 3, 0]
    norm(first.float())
    mean, _ = reference.moments(first)
    around_zero = (first**2).mean(dim=(0, 2, 3))
    assert_close(norm.running_mean, 0.01 * mean.float())
    assert_close(norm.running_var, (1 + 0.01 * (around_zero - 1)).float())
    assert torch.equal(started.running_mean, before)  # it has an estimate to go on from


def test_the_variance_is_taken_around_the_old_mean():
    norm = EstimatedBatchNorm2d(1, momentum=0.5)
    norm(torch.tensor([0.0, 2.0]).view(2, 1, 1, 1))  # mean 1, variance 1
    norm(torch.tensor([4.0, 6.0]).view(2, 1, 1, 1))  # mean square around 1: (9 + 25) / 2 = 17
    assert norm.running_mean.item() == 3.0
    assert norm.running_var.item() == 9.0


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_a_large_mean_does_not_cost_the_variance(rate):
    norm = EstimatedBatchNorm2d(1, momentum=rate)
    x = torch.randn(2, 1, 40, 40).double() + 1000.0
    for _ in range(3):
        norm(x.float())
    assert_close(norm.running_var.double(), x.var(correction=0).view(1), atol=1e-3, rtol=1e-3)


def test_rate_one_sets_outright_and_rate_zero_never_moves():
    norm = make(rate=1.0)
    for batch in batches(3):
        norm(batch.float())
        mean, var = reference.moments(batch)
        assert_close(norm.running_mean, mean.float())
        assert_close(norm.running_var, var.float())
    norm.momentum = 0.0
    *before, count = estimates(norm)
    norm(torch.randn(2, CHANNELS, 4, 4))
    *after, counted = estimates(norm)
    assert_close(after, before, rtol=0, atol=0)
    assert counted == count + 1


def test_without_affine():
    norm = EstimatedBatchNorm2d(CHANNELS, momentum=0.2, affine=False)
    (x,) = batches(1)
    mean, var = reference.moments(x)
    ones, zeros = torch.ones(CHANNELS).double(), torch.zeros(CHANNELS).double()
    expected = reference.batch_affine(x, mean, var, ones, zeros, 1e-5)
    assert_close(norm(x.float()), expected.float(), atol=1e-5, rtol=1e-4)


def test_evaluation_is_that_of_batch_norm():
    norm, stock = make(), nn.BatchNorm2d(CHANNELS)
    for batch in batches(3):
        norm(batch.float())
    stock.load_state_dict(norm.state_dict())
    before = estimates(norm)
    x = torch.randn(3, CHANNELS, 4, 4)
    assert torch.equal(norm.eval()(x), stock.eval()(x))
    assert_close(estimates(norm), before, rtol=0, atol=0)


# Batches that must not count.


@pytest.mark.parametrize("shape", [(0, CHANNELS, 6, 6), (2, CHANNELS, 0, 6)])
@pytest.mark.parametrize("earlier_batches", [0, 2])
def test_empty_batch(shape, earlier_batches):
    norm = make()
    for batch in batches(earlier_batches):
        norm(batch.float())
    before = estimates(norm)
    y = norm(torch.zeros(shape, requires_grad=True))
    assert y.shape == shape
    y.sum().backward()
    assert torch.equal(norm.weight.grad, torch.zeros(CHANNELS))
    assert torch.equal(norm.bias.grad, torch.zeros(CHANNELS))
    assert_close(estimates(norm), before, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("earlier_batches", [0, 2])
@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_nan_and_inf_batches_do_not_count(bad, earlier_batches, rate):
    norm = make(rate)
    for batch in batches(earlier_batches):
        norm(batch.float())
    before = estimates(norm)
    x = torch.randn(2, CHANNELS, 4, 4)
    x[1, 2, 3, 0] = bad
    norm(x)
    assert_close(estimates(norm), before, rtol=0, atol=0)
    # ... and the next one does.
    (batch,) = batches(1)
    norm(batch.float())
    assert norm.num_batches_tracked == before[2] + 1
    if not earlier_batches:
        assert_close(norm.running_mean, reference.moments(batch)[0].float())


def test_a_frozen_affine_stops_the_updates():
    norm = make()
    norm(batches(1)[0].float())
    before = estimates(norm)
    for parameter in norm.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(2, CHANNELS, 4, 4) + 3
    y = norm(x)
    assert_close(estimates(norm), before, rtol=0, atol=0)
    stock = nn.BatchNorm2d(CHANNELS)
    stock.load_state_dict(norm.state_dict())
    assert_close(y, stock.eval()(x))


def test_no_value_leaves_the_device():
    """Any ``.item()`` or ``if tensor`` in the training forward fails on the meta device."""
    norm = EstimatedBatchNorm2d(4).to("meta")
    for _ in range(2):
        norm(torch.empty(2, 4, 5, 5, device="meta", requires_grad=True)).sum().backward()


def test_a_norm_that_runs_twice_in_a_step_has_its_gradient():
    norm = make(rate=0.5)
    mean, var = torch.zeros(CHANNELS).double(), torch.ones(CHANNELS).double()
    weight, bias = norm.weight.detach().double(), norm.bias.detach().double()
    expected, actual = 0.0, 0.0
    first, second = batches(2)
    w64 = weight.clone().requires_grad_()
    for x, is_first in ((first, True), (second, False)):
        mean, var = reference.update(mean, var, x, 0.5, is_first)
        expected = expected + reference.batch_affine(x, mean, var, w64, bias, 1e-5).pow(3).sum()
        actual = actual + norm(x.float()).pow(3).sum()
    expected.backward()
    actual.backward()
    assert_close(norm.weight.grad, w64.grad.float(), atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_an_activation_in_place_may_follow(training):
    norm, twin = make(), EstimatedBatchNorm2d(CHANNELS, momentum=0.1)
    twin.load_state_dict(norm.state_dict())
    norm.train(training), twin.train(training)
    x = torch.randn(2, CHANNELS, 4, 4)
    torch.relu_(norm(x)).square().sum().backward()
    torch.relu(twin(x)).square().sum().backward()
    for own, other in zip(norm.parameters(), twin.parameters(), strict=True):
        assert_close(own.grad, other.grad)


# Types and layouts.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_has_float32_estimates(dtype):
    norm, twin = make(), EstimatedBatchNorm2d(CHANNELS, momentum=0.1)
    twin.load_state_dict(norm.state_dict())
    twin.num_batches_tracked.zero_()
    for batch in batches(3):
        x = (10 * batch).to(dtype)
        y = norm(x)
        expected = twin(x.float())
        assert y.dtype == dtype
        assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
        assert_close(y.float(), expected, atol=0.1, rtol=0.02)
    assert_close(estimates(norm), estimates(twin), atol=1e-4, rtol=1e-4)


def test_autocast_and_channels_last():
    norm, twin = make(), EstimatedBatchNorm2d(CHANNELS, momentum=0.1)
    twin.load_state_dict(norm.state_dict())
    for batch in batches(3):
        x = batch.bfloat16().to(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = norm(x)
        y.float().square().sum().backward()
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert x.grad.dtype == torch.bfloat16 and norm.weight.grad.dtype == torch.float32
        assert_close(y.float(), twin(x.float()), atol=0.1, rtol=0.02)
    assert_close(estimates(norm), estimates(twin), atol=1e-4, rtol=1e-4)


# State.


def test_state_dict_is_that_of_batch_norm_and_comes_back():
    norm = make()
    norm(batches(1)[0].float())
    assert list(norm.state_dict()) == list(nn.BatchNorm2d(CHANNELS).state_dict())
    other = EstimatedBatchNorm2d(CHANNELS, momentum=0.1)
    other.load_state_dict(norm.state_dict())
    x = torch.randn(2, CHANNELS, 4, 4)
    assert torch.equal(other(x), norm(x))
    assert_close(estimates(other), estimates(norm), rtol=0, atol=0)


def test_estimates_without_a_count_are_estimates_all_the_same():
    state = nn.BatchNorm2d(CHANNELS).state_dict()
    state["running_mean"] += 3.0
    del state["num_batches_tracked"]
    norm = make(rate=0.1)
    norm.load_state_dict(state)  # strict: no missing key
    assert norm.num_batches_tracked == 1
    norm(torch.full((2, CHANNELS, 4, 4), 13.0))
    assert_close(norm.running_mean, torch.full((CHANNELS,), 4.0))  # moved, not overwritten


def test_a_count_of_zero_stays_zero():
    norm = make(rate=0.1)
    norm.load_state_dict(EstimatedBatchNorm2d(CHANNELS).state_dict())
    norm(torch.full((2, CHANNELS, 4, 4), 13.0))
    assert_close(norm.running_mean, torch.full((CHANNELS,), 13.0))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_deepcopy_and_pickle(copied):
    norm = make(rate=0.25)
    first, second = batches(2)
    norm(first.float())
    other = copied(norm)
    assert torch.equal(other(second.float()), norm(second.float()))
    norm(first.float())
    assert not torch.equal(other.running_mean, norm.running_mean)


def test_freezing_makes_it_a_frozen_batch_norm_of_the_same_function():
    norm = make()
    norm(batches(1)[0].float())
    frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(norm)
    assert type(frozen) is FrozenBatchNorm2d
    x = torch.randn(2, CHANNELS, 4, 4)
    assert_close(frozen(x), norm.eval()(x))


# Arguments.


def test_refused_arguments():
    for rate in (-0.1, 1.1, float("nan"), "fast", None):
        with pytest.raises(ValueError, match="update rate"):
            EstimatedBatchNorm2d(4, momentum=rate)
    with pytest.raises(ValueError, match="at least one channel"):
        EstimatedBatchNorm2d(0)
    with pytest.raises(ValueError, match="4D input"):
        EstimatedBatchNorm2d(4)(torch.randn(2, 4, 5))


def test_default_rate():
    assert EstimatedBatchNorm2d(4).momentum == 0.01


def test_set_update_rate():
    model = nn.Sequential(make(), nn.BatchNorm2d(4), nn.Sequential(make()))
    assert set_update_rate(model, 0.5) is model
    assert [model[0].momentum, model[1].momentum, model[2][0].momentum] == [0.5, 0.1, 0.5]
    with pytest.raises(ValueError, match="2"):
        set_update_rate(model, 2)
    assert model[0].momentum == 0.5


@pytest.mark.parametrize("layer", [EstimatedBatchNorm2d, BatchChannelNorm2d])
@pytest.mark.parametrize("first_batch", [True, False])
def test_at_rate_zero_the_first_batch_sets_the_estimates_and_they_are_held(layer, first_batch):
    norm = set_update_rate(layer(32), 0.0)
    if not first_batch:
        skip_first_batch_init(norm)
    bn = getattr(norm, "bn", norm)
    batches = [torch.randn(2, 32, 5, 6) * 3 + 1 for _ in range(3)]
    want = (torch.zeros(32), torch.ones(32))
    if first_batch:
        want = batches[0].mean((0, 2, 3)), batches[0].var((0, 2, 3), correction=0)
    for batch in batches:
        norm(batch)
        assert_close((bn.running_mean, bn.running_var), want)
    held = bn.running_mean.clone(), bn.running_var.clone()
    norm(batches[1])
    assert torch.equal(bn.running_mean, held[0]) and torch.equal(bn.running_var, held[1])
    assert bn.num_batches_tracked == 4 + (not first_batch)
