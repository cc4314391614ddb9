"""``BatchChannelNorm2d``: both halves and their state, for each kind of statistics."""

import copy
import pickle

import pytest
import reference
import torch
from detectron2.layers import FrozenBatchNorm2d, NaiveSyncBatchNorm
from torch import nn
from torch.testing import assert_close

from wsbcn_d2 import BatchChannelNorm2d, EstimatedBatchNorm2d

KINDS = ("estimated", "batch", "sync")
CHANNELS, GROUPS = 12, 3
SHAPE = (2, CHANNELS, 6, 7)

kinds = pytest.mark.parametrize("statistics", KINDS)


@pytest.fixture(autouse=True, params=["cpp", "off"])
def backend(request, monkeypatch):
    """The fused form and the readable one."""
    monkeypatch.setenv("WSBCN_FUSED", request.param)


@pytest.fixture(autouse=True)
def cpu_only(monkeypatch):
    # "sync" picks its batch norm by whether there is a GPU; these tests run on the CPU.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def make(statistics="estimated", rate=0.1, eps=1e-5, channels=CHANNELS, groups=GROUPS):
    norm = BatchChannelNorm2d(channels, groups, eps, statistics, rate)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0, 0.4)
    return norm


def batches(steps, shape=SHAPE):
    return [
        torch.randn(shape, dtype=torch.double) * (1 + 0.3 * step)
        + torch.randn(1, shape[1], 1, 1, dtype=torch.double)
        for step in range(steps)
    ]


def parameters_in_double(norm):
    """weight, bias, bn.weight, bn.bias as leaves in float64."""
    tensors = (norm.weight, norm.bias, norm.bn.weight, norm.bn.bias)
    return [t.detach().double().requires_grad_() for t in tensors]


def bcn(x, mean, var, parameters, groups, eps):
    weight, bias, bn_weight, bn_bias = parameters
    x = reference.batch_affine(x, mean, var, bn_weight, bn_bias, eps)
    return reference.channel_norm(x, groups, weight, bias, eps)


def check(norm, x, mean, var, dtype, groups=GROUPS):
    """Forward and backward against the formula; ``mean`` and ``var`` may depend on ``x``."""
    leaves = parameters_in_double(norm)
    expected = bcn(x, mean, var, leaves, groups, norm.eps)
    seed = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, [x, *leaves], seed)
    own = x.detach().to(dtype).requires_grad_()
    actual = norm(own)
    inputs = [own, norm.weight, norm.bias, norm.bn.weight, norm.bn.bias]
    gradients = torch.autograd.grad(actual, inputs, seed.to(dtype))
    tolerance = 1e-9 if dtype == torch.double else 2e-4
    assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)
    for a, e in zip(gradients, expected_gradients, strict=True):
        scale = e.abs().max().clamp(min=1).item()
        assert_close(a.double(), e, atol=tolerance * scale, rtol=0)


# Values and gradients.


@kinds
def test_both_halves_have_the_eps_that_is_given(statistics):
    norm = make(statistics, eps=0.25)
    assert norm.eps == norm.bn.eps == 0.25


@pytest.mark.parametrize("dtype", [torch.double, torch.float])
@pytest.mark.parametrize("rate", [0.01, 0.4])
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_estimated_over_several_steps(dtype, rate, eps):
    norm = make("estimated", rate, eps).to(dtype)
    mean, var = torch.zeros(CHANNELS).double(), torch.ones(CHANNELS).double()
    for step, x in enumerate(batches(4)):
        mean, var = reference.update(mean, var, x, rate, first=step == 0)
        check(norm, x.requires_grad_(), mean, var, dtype)
        tolerance = 1e-10 if dtype == torch.double else 1e-4
        assert_close(norm.bn.running_mean.double(), mean, atol=tolerance, rtol=tolerance)
        assert_close(norm.bn.running_var.double(), var, atol=tolerance, rtol=tolerance)
    assert norm.bn.num_batches_tracked == 4


@pytest.mark.parametrize("dtype", [torch.double, torch.float])
@pytest.mark.parametrize("statistics", ["batch", "sync"])
def test_batch_and_sync_use_the_moments_of_the_batch(dtype, statistics):
    norm = make(statistics).to(dtype)
    n = SHAPE[0] * SHAPE[2] * SHAPE[3]
    mean, var = torch.zeros(CHANNELS).double(), torch.ones(CHANNELS).double()
    for x in batches(3):
        x.requires_grad_()
        batch_mean, batch_var = reference.moments(x)  # gradients flow through these
        check(norm, x, batch_mean, batch_var, dtype)
        mean += 0.1 * (batch_mean.detach() - mean)
        var += 0.1 * (batch_var.detach() * n / (n - 1) - var)
    assert_close(norm.bn.running_mean, mean.to(dtype))
    assert_close(norm.bn.running_var, var.to(dtype), atol=1e-4, rtol=1e-4)


@kinds
@pytest.mark.parametrize("dtype", [torch.double, torch.float])
def test_evaluation_uses_the_estimates(statistics, dtype):
    norm = make(statistics).to(dtype)
    for x in batches(3):
        norm(x.to(dtype))
    norm.eval()
    state = {k: v.clone() for k, v in norm.state_dict().items()}
    (x,) = batches(1, (3, CHANNELS, 5, 4))
    mean, var = norm.bn.running_mean.double(), norm.bn.running_var.double()
    check(norm, x.requires_grad_(), mean, var, dtype)
    assert_close(norm.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("channels", "groups"), [(4, 1), (4, 4), (64, 32), (32, 32)], ids=lambda v: str(v)
)
def test_any_number_of_groups(channels, groups):
    norm = make(channels=channels, groups=groups)
    (x,) = batches(1, (2, channels, 5, 6))
    mean, var = reference.moments(x)
    check(norm, x.requires_grad_(), mean, var, torch.float, groups)


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(training):
    norm = make(rate=0.0, channels=4, groups=2).double().train(training)
    norm.bn.running_mean.normal_()
    norm.bn.running_var.uniform_(0.5, 2.0)
    x = torch.randn(2, 4, 3, 3, dtype=torch.double, requires_grad=True)
    tensors = (x, norm.weight, norm.bias, norm.bn.weight, norm.bn.bias)
    assert torch.autograd.gradcheck(lambda *_: norm(x), tensors)


def test_one_pixel_of_one_image_is_enough_for_estimates():
    norm = make(channels=8, groups=2)
    (x,) = batches(1, (1, 8, 1, 1))
    expected = bcn(x, *reference.moments(x), parameters_in_double(norm), 2, 1e-5)
    # Variance 0: what float32 rounds of x grows by eps ** -0.5, and then by what the channel half
    # divides by, which is the deviation of the batch half's biases.
    bn = norm.bn
    rounded = 2**-23 * (bn.weight * x.flatten()).abs().max() * 1e-5**-0.5
    deviation = bn.bias.view(2, 4).std(dim=1, correction=0).min()
    tolerance = float(2 * rounded * norm.weight.abs().max() / deviation)
    assert tolerance < 0.01
    assert_close(norm(x.float()), expected.float(), atol=tolerance, rtol=0)


def test_the_rate_of_the_first_batch_and_the_rate_of_one():
    norm = make(rate=0.01)
    first, second = batches(2)
    norm(first.float())
    assert_close(norm.bn.running_mean, reference.moments(first)[0].float())
    assert_close(norm.bn.running_var, reference.moments(first)[1].float())
    norm.bn.momentum = 1.0
    norm(second.float())
    assert_close(norm.bn.running_mean, reference.moments(second)[0].float())
    assert_close(norm.bn.running_var, reference.moments(second)[1].float())


def test_a_norm_that_runs_twice_in_a_step_has_its_gradient():
    """As in a head that all FPN levels share: the second run moves the first one's estimates."""
    norm = make(rate=0.5)
    leaves = parameters_in_double(norm)
    mean, var = torch.zeros(CHANNELS).double(), torch.ones(CHANNELS).double()
    expected, actual = 0.0, 0.0
    for step, x in enumerate(batches(2)):
        mean, var = reference.update(mean, var, x, 0.5, first=step == 0)
        expected = expected + bcn(x, mean, var, leaves, GROUPS, 1e-5).pow(3).sum()
        actual = actual + norm(x.float()).pow(3).sum()
    expected.backward()
    actual.backward()
    own = (norm.weight, norm.bias, norm.bn.weight, norm.bn.bias)
    for parameter, leaf in zip(own, leaves, strict=True):
        scale = leaf.grad.abs().max().item()
        assert_close(parameter.grad.double(), leaf.grad, atol=1e-4 * scale, rtol=0)


@kinds
@pytest.mark.parametrize("training", [True, False])
def test_an_activation_in_place_may_follow(statistics, training):
    """Detectron2's residual blocks apply ``relu_`` to the output, and add to it in place."""
    norm, twin = make(statistics), make(statistics)
    twin.load_state_dict(norm.state_dict())
    norm.train(training), twin.train(training)
    (x,) = (b.float().requires_grad_() for b in batches(1))
    y = norm(x)
    y += 0.1
    torch.relu_(y).square().sum().backward()
    gradients = [x.grad.clone(), *(p.grad for p in norm.parameters())]
    x.grad = None
    torch.relu(twin(x) + 0.1).square().sum().backward()
    assert_close(gradients, [x.grad, *(p.grad for p in twin.parameters())], atol=1e-3, rtol=1e-3)


# Batches that must not count.


def test_empty_batch_gives_every_parameter_a_zero_gradient():
    for statistics, training in (("estimated", True), ("sync", True), *((k, False) for k in KINDS)):
        norm = make(statistics).train(training)
        state = {k: v.clone() for k, v in norm.state_dict().items()}
        y = norm(torch.zeros(0, CHANNELS, 5, 5, requires_grad=True))
        assert y.shape == (0, CHANNELS, 5, 5)
        y.sum().backward()
        for name, parameter in norm.named_parameters():
            assert torch.equal(parameter.grad, torch.zeros_like(parameter)), (statistics, name)
        if statistics == "estimated":
            assert_close(norm.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("earlier_batches", [0, 2])
def test_empty_batch_between_others_changes_nothing(earlier_batches):
    norm, twin = make(), make()
    twin.load_state_dict(norm.state_dict())
    twin.bn.num_batches_tracked.zero_()
    for batch in batches(earlier_batches):
        norm(batch.float())
        twin(batch.float())
    norm(torch.zeros(0, CHANNELS, 5, 5))
    (x,) = batches(1)
    assert torch.equal(norm(x.float()), twin(x.float()))
    assert_close(norm.state_dict(), twin.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("earlier_batches", [0, 2])
def test_nan_and_inf_batches_do_not_count(bad, earlier_batches):
    norm = make()
    for batch in batches(earlier_batches):
        norm(batch.float())
    state = {k: v.clone() for k, v in norm.state_dict().items()}
    x = torch.randn(SHAPE)
    x[0, 3, 2, 2] = bad
    y = norm(x)
    assert not torch.isfinite(y[0]).all()  # the trainer must see the divergence
    assert_close(norm.state_dict(), state, rtol=0, atol=0)


def test_a_frozen_batch_half_stops_the_updates_and_not_the_channel_half():
    norm = make()
    norm(batches(1)[0].float())
    for parameter in norm.bn.parameters():
        parameter.requires_grad_(False)
    mean, var = norm.bn.running_mean.double(), norm.bn.running_var.double()
    (x,) = batches(1)
    expected = bcn(x, mean, var, parameters_in_double(norm), GROUPS, 1e-5)
    y = norm(x.float())
    assert_close(y, expected.float(), atol=1e-4, rtol=1e-4)
    assert_close(norm.bn.running_mean.double(), mean, rtol=0, atol=0)
    assert norm.bn.num_batches_tracked == 1
    y.sum().backward()
    assert norm.weight.grad is not None and norm.bn.weight.grad is None


@kinds
def test_freezing_as_detectron2_does_it(statistics):
    norm = make(statistics)
    norm(batches(1)[0].float())
    mean, var = norm.bn.running_mean.double(), norm.bn.running_var.double()
    leaves = parameters_in_double(norm)
    assert FrozenBatchNorm2d.convert_frozen_batchnorm(norm) is norm
    assert type(norm) is BatchChannelNorm2d and type(norm.bn) is FrozenBatchNorm2d
    state = {k: v.clone() for k, v in norm.state_dict().items()}
    (x,) = batches(1)
    expected = bcn(x, mean, var, leaves, GROUPS, 1e-5)
    for training in (True, False):
        y = norm.train(training)(x.float().requires_grad_())
        assert_close(y, expected.float(), atol=1e-4, rtol=1e-4)
    y.sum().backward()
    assert norm.weight.grad is not None
    assert_close(norm.state_dict(), state, rtol=0, atol=0)


def test_no_value_leaves_the_device():
    """Any ``.item()`` or ``if tensor`` in the training forward fails on the meta device."""
    norm = make().to("meta")
    for _ in range(2):
        norm(torch.empty(SHAPE, device="meta", requires_grad=True)).sum().backward()


# Types and layouts.


@pytest.mark.parametrize("channels_last", [False, True])
def test_bfloat16_autocast(channels_last):
    norm, twin = make(), make()
    twin.load_state_dict(norm.state_dict())
    twin.bn.num_batches_tracked.zero_()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for batch in batches(3):
        x = batch.bfloat16().to(memory_format=layout).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = norm(x)
        x32 = x.detach().float().requires_grad_()
        expected = twin(x32)
        assert_close(y.float(), expected, atol=0.1, rtol=0.03)
        seed = torch.randn_like(expected)
        y.backward(seed.to(y.dtype))
        expected.backward(seed)
        assert x.grad.dtype == torch.bfloat16
        assert_close(x.grad.float(), x32.grad, atol=0.1, rtol=0.03)
    for parameter, other in zip(norm.parameters(), twin.parameters(), strict=True):
        assert parameter.grad.dtype == torch.float32
        scale = other.grad.abs().max().clamp(min=1).item()
        assert_close(parameter.grad, other.grad, atol=0.03 * scale, rtol=0)
    assert norm.bn.running_mean.dtype == norm.bn.running_var.dtype == torch.float32
    assert_close(norm.bn.running_mean, twin.bn.running_mean, atol=1e-4, rtol=1e-4)
    assert_close(norm.bn.running_var, twin.bn.running_var, atol=1e-4, rtol=1e-4)


@kinds
def test_channels_last_and_strided_inputs(statistics):
    norm, twin = make(statistics), make(statistics)
    twin.load_state_dict(norm.state_dict())
    twin.bn.num_batches_tracked.zero_()
    x, y, z = (b.float() for b in batches(3))
    last = x.to(memory_format=torch.channels_last)
    assert_close(norm(last), twin(x), atol=1e-4, rtol=1e-4)
    strided = torch.zeros(2, CHANNELS, 6, 14)[..., ::2].copy_(y)
    assert_close(norm(strided), twin(y), atol=1e-4, rtol=1e-4)
    expanded = z[:, :, :1, :1].expand(SHAPE)
    assert_close(norm(expanded), twin(expanded.clone()), atol=1e-3, rtol=1e-3)
    assert_close(norm.state_dict(), twin.state_dict(), atol=1e-4, rtol=1e-4)


# State.


@kinds
def test_state_dict_layout(statistics):
    shapes = {k: tuple(v.shape) for k, v in make(statistics).state_dict().items()}
    assert shapes == {
        "weight": (GROUPS,),
        "bias": (GROUPS,),
        "bn.weight": (CHANNELS,),
        "bn.bias": (CHANNELS,),
        "bn.running_mean": (CHANNELS,),
        "bn.running_var": (CHANNELS,),
        "bn.num_batches_tracked": (),
    }
    assert list(shapes)[:2] == ["weight", "bias"]


@kinds
def test_state_dict_round_trip(statistics):
    norm, other = make(statistics), make(statistics)
    norm(batches(1)[0].float())
    other.load_state_dict({k: v.clone() for k, v in norm.state_dict().items()})
    (x,) = batches(1)
    assert torch.equal(other(x.float()), norm(x.float()))
    assert_close(other.state_dict(), norm.state_dict(), rtol=0, atol=0)


def test_estimates_without_a_count_count_as_seen():
    state = make().state_dict()
    state["bn.running_mean"] = torch.full((CHANNELS,), 3.0)
    del state["bn.num_batches_tracked"]
    norm = make(rate=0.1)
    norm.load_state_dict(state)
    norm(torch.full(SHAPE, 13.0))
    assert_close(norm.bn.running_mean, torch.full((CHANNELS,), 4.0))


@kinds
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_deepcopy_and_pickle(statistics, copied):
    norm = make(statistics, rate=0.3)
    first, second = batches(2)
    norm(first.float())
    other = copied(norm)
    assert torch.equal(other(second.float()), norm(second.float()))
    norm(first.float())
    assert not torch.equal(other.bn.running_mean, norm.bn.running_mean)


def test_the_authors_initialisation():
    norm = BatchChannelNorm2d(64)
    assert norm.num_groups == 32 and norm.eps == norm.bn.eps == 1e-5
    assert type(norm.bn) is EstimatedBatchNorm2d and norm.bn.momentum == 0.01
    for name, tensor in norm.state_dict().items():
        filled = 1.0 if name in ("weight", "bn.weight", "bn.running_var") else 0.0
        assert (tensor == filled).all(), name


def test_the_types_that_detectron2_goes_by():
    assert isinstance(make(), nn.GroupNorm)
    assert not isinstance(make(), nn.modules.batchnorm._BatchNorm)
    assert type(make("batch").bn) is nn.BatchNorm2d
    assert type(make("sync").bn) is NaiveSyncBatchNorm
    assert make("sync").bn._stats_mode == "N"


def test_sync_on_a_gpu_machine_is_torchs_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert type(make("sync").bn) is nn.SyncBatchNorm


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_channels=48), "48 channels into 32 groups.*multiple"),
        (dict(num_channels=0), "0 channels"),
        (dict(num_channels=-32), "-32 channels"),
        (dict(num_channels=32, num_groups=0), "0 groups"),
        (dict(num_channels=32, update_rate=1.5), r"\[0, 1\], got 1.5"),
        (dict(num_channels=32, update_rate=-0.1), r"\[0, 1\], got -0.1"),
        (dict(num_channels=32, statistics="running"), "'running'.*estimated, batch or sync"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchChannelNorm2d(**arguments)


@pytest.mark.parametrize("shape", [(2, CHANNELS, 5), (CHANNELS, 5, 5), (2, CHANNELS)])
def test_refused_inputs(shape):
    with pytest.raises(ValueError, match="shape"):
        make()(torch.randn(shape))


def test_repr_says_what_it_is():
    assert "12, num_groups=3, eps=1e-05, statistics=batch" in repr(make("batch"))


def test_a_hook_on_all_modules_sees_the_batch_half():
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, y: seen.append(type(module))
    )
    try:
        BatchChannelNorm2d(8, 4)(torch.randn(1, 8, 3, 3))
    finally:
        handle.remove()
    assert seen == [EstimatedBatchNorm2d, BatchChannelNorm2d]


@pytest.mark.parametrize("fused", ["cpp", "off"])
def test_a_group_of_one_number_is_worth_its_bias(fused, monkeypatch):
    monkeypatch.setenv("WSBCN_FUSED", fused)
    norm = BatchChannelNorm2d(4, 4)
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([1.0, 2.0, -3.0, 0.5]))
    y = norm(torch.randn(1, 4, 1, 1))
    assert_close(y, norm.bias.view(1, 4, 1, 1))
    y.sum().backward()
    assert_close(norm.bias.grad, torch.ones(4))
