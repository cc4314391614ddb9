"""The fused BCN equals its definition, in every setting in which it runs."""

import contextlib
import copy

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn
from torch.autograd import gradgradcheck
from torch.nn import functional as F
from torch.testing import assert_close

from wsbcn_d2 import BatchChannelNorm2d

# (N, C, H, W), groups: several samples, one pixel, one channel per group.
SHAPES = [((1, 6, 5, 7), 3), ((3, 8, 4, 3), 2), ((5, 6, 1, 1), 2), ((2, 4, 3, 3), 4)]
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(params=["cpp"])
def backend(request, monkeypatch):
    """A fused form."""
    monkeypatch.setenv("WSBCN_FUSED", request.param)
    return request.param


def used(y):
    """Whether an output comes from the fused form."""
    return type(y.grad_fn).__name__.startswith("_FusedBCN")


def make(channels, groups, **options):
    norm = BatchChannelNorm2d(channels, groups, update_rate=0.3, **options)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(-1, 2)
    return norm


class Reference:
    """BCN in float64 by the paper's steps, with estimates of its own."""

    def __init__(self, norm):
        self.p = {k: v.detach().double() for k, v in norm.state_dict().items()}
        self.p = {k: v.requires_grad_(not k.startswith("bn.r")) for k, v in self.p.items()}
        self.groups, self.eps, self.rate = norm.num_groups, norm.eps, norm.bn.momentum

    def __call__(self, x, train=True):
        p, column = self.p, (1, -1, 1, 1)
        if train:
            mean = x.detach().mean((0, 2, 3))
            first = p["bn.num_batches_tracked"] == 0
            around = mean if first else p["bn.running_mean"]
            var = (x.detach() - around.view(column)).square().mean((0, 2, 3))
            r = 1.0 if first else self.rate
            p["bn.running_mean"] = (1 - r) * p["bn.running_mean"] + r * mean
            p["bn.running_var"] = (1 - r) * p["bn.running_var"] + r * var
            p["bn.num_batches_tracked"] = p["bn.num_batches_tracked"].detach() + 1
        deviation = (p["bn.running_var"] + self.eps).sqrt().view(column)
        z = (x - p["bn.running_mean"].view(column)) / deviation
        z = z * p["bn.weight"].view(column) + p["bn.bias"].view(column)
        z = z.reshape(x.shape[0], self.groups, -1)
        z = z - z.mean(2, keepdim=True)
        z = z / (z.square().mean(2, keepdim=True) + self.eps).sqrt()
        return (z * p["weight"].view(1, -1, 1) + p["bias"].view(1, -1, 1)).view(x.shape)


CASES = [
    ("cpp", shape, groups, dtype, layout)
    for shape, groups in SHAPES
    for dtype in (torch.float32, torch.float64)
    for layout in FORMATS
]


@pytest.mark.parametrize("backend,shape,groups,dtype,layout", CASES, indirect=["backend"])
def test_values_gradients_and_estimates_over_steps(backend, shape, groups, dtype, layout):
    norm = make(shape[1], groups).to(dtype)
    reference = Reference(norm)
    tolerance = {"rtol": 2e-4, "atol": 2e-4} if dtype == torch.float32 else {}
    for step in range(3):
        x = torch.randn(shape, dtype=dtype) * (1 + step) + torch.arange(shape[1]).view(1, -1, 1, 1)
        x = x.to(dtype).contiguous(memory_format=layout).requires_grad_()
        dy = torch.randn(shape, dtype=dtype)
        x64 = x.detach().double().requires_grad_()
        y, expected = norm(x), reference(x64)
        assert used(y)
        assert y.is_contiguous(memory_format=layout)
        assert_close(y.double(), expected, **tolerance)
        names = [name for name, _ in norm.named_parameters()]
        found = torch.autograd.grad(y, [x, *norm.parameters()], dy)
        wanted = torch.autograd.grad(expected, [x64, *(reference.p[n] for n in names)], dy.double())
        for f, w in zip(found, wanted, strict=True):
            assert_close(f.double(), w, **tolerance)
        for key in ("running_mean", "running_var"):
            assert_close(getattr(norm.bn, key).double(), reference.p[f"bn.{key}"], **tolerance)
        assert norm.bn.num_batches_tracked == step + 1


@pytest.mark.parametrize("kind", ["estimated", "batch", "frozen", "no rate", "frozen affine"])
def test_constant_statistics_of_every_kind(backend, kind):
    norm = make(6, 3, statistics="batch" if kind == "batch" else "estimated")
    norm.bn.running_mean.normal_()
    norm.bn.running_var.uniform_(0.5, 2)
    reference = Reference(norm)
    if kind == "frozen":
        norm = FrozenBatchNorm2d.convert_frozen_batchnorm(norm)
        assert type(norm.bn) is FrozenBatchNorm2d
    elif kind == "no rate":
        norm.bn.momentum = 0.0
        norm.bn.num_batches_tracked.fill_(1)  # the first batch would set the estimates
    elif kind == "frozen affine":
        norm.bn.requires_grad_(False)
    else:
        norm.eval()
    x = torch.randn(2, 6, 4, 5, requires_grad=True)
    y = norm(x)
    assert used(y)
    before = copy.deepcopy(norm.state_dict())
    assert_close(y.double(), reference(x.double(), train=False), rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    assert all(torch.equal(before[k], v) for k, v in norm.state_dict().items())
    x64 = x.detach().double().requires_grad_()
    reference(x64, train=False).square().sum().backward()
    assert_close(x.grad.double(), x64.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layout", FORMATS, ids=["contiguous", "channels_last"])
def test_a_large_mean_costs_no_more_than_in_group_norm(backend, layout):
    norm = BatchChannelNorm2d(64)
    reference = Reference(norm)
    x = (torch.randn(1, 64, 40, 50) + 1e3).contiguous(memory_format=layout)
    expected = reference(x.double())
    error = (norm(x) - expected).abs().max()
    stock = F.group_norm(x.contiguous(), 32)
    stock_error = (stock - F.group_norm(x.double(), 32)).abs().max()
    assert error < 2 * stock_error


def test_a_layer_used_twice_in_a_step(backend):
    norm, x = make(6, 3), torch.randn(2, 2, 6, 4, 4, requires_grad=True)
    reference = Reference(norm)
    x64 = x.detach().double().requires_grad_()
    (norm(x[0]) * norm(x[1])).sum().backward()
    (reference(x64[0]) * reference(x64[1])).sum().backward()
    assert_close(x.grad.double(), x64.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_round_once(backend, dtype):
    norm = make(8, 2)
    wide = copy.deepcopy(norm)
    x = (torch.randn(2, 8, 6, 6) + 3).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = norm(x)
        stock = F.group_norm(x, 2)
    x32 = x.detach().float().requires_grad_()
    expected = wide(x32)
    assert used(y)
    assert y.dtype == stock.dtype
    assert torch.equal(y, expected.to(y.dtype))
    assert torch.equal(norm.bn.running_var, wide.bn.running_var)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy.float())
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad, x32.grad.to(dtype))


def test_second_derivatives():
    norm = make(4, 2).double().eval()
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert used(norm(x))
    assert gradgradcheck(norm, [x])


def test_other_ways_to_differentiate_get_the_readable_form(monkeypatch):
    norm, x = make(6, 3).double().eval(), torch.randn(2, 6, 3, 3, dtype=torch.float64)
    v = torch.randn_like(x)
    (expected,) = torch.autograd.grad(norm(x.requires_grad_()), x, v)
    _, pull = torch.func.vjp(norm, x)
    assert_close(pull(v)[0], expected)
    _, tangent = torch.func.jvp(norm, (x.detach(),), (v,))
    assert_close((tangent * v).sum(), (expected * v).sum())


def test_a_hook_on_the_batch_half_is_called():
    norm, seen = make(6, 3), []
    norm.bn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    assert not used(norm(torch.randn(2, 6, 3, 3)))
    assert len(seen) == 1


def test_off_and_unknown(monkeypatch):
    norm, x = make(6, 3).eval(), torch.randn(2, 6, 3, 3)
    fused = norm(x)
    monkeypatch.setenv("WSBCN_FUSED", "off")
    assert not used(norm(x))
    assert_close(norm(x), fused)
    assert "fused=off" in repr(norm)
    monkeypatch.delenv("WSBCN_FUSED")
    assert "fused=cpp" in repr(norm)
    assert "fused=off" in repr(copy.deepcopy(norm).half()) and "fused=" in repr(norm.to("meta"))
    monkeypatch.setenv("WSBCN_FUSED", "fast")
    with pytest.raises(ValueError, match="WSBCN_FUSED"):
        norm(x)


@pytest.mark.parametrize("module", ["norm", "conv"])
def test_scripts_and_traces(module):
    norm = make(6, 3).eval()
    model = norm if module == "norm" else nn.Sequential(nn.Conv2d(6, 6, 3), norm)
    x = torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        assert_close(torch.jit.script(model)(x), model(x))
        assert_close(torch.jit.trace(model, x)(x), model(x))


@pytest.mark.parametrize("frozen", ["weight", "bias", "bn.weight", "bn.bias", "x"])
@pytest.mark.parametrize("twice", [False, True], ids=["once", "create_graph"])
def test_whatever_is_frozen_the_others_have_their_gradients(frozen, twice, monkeypatch):
    norm, found = make(6, 3).double().eval(), []
    x = torch.randn(2, 6, 4, 5, dtype=torch.double)
    leaves = {"x": x.requires_grad_(), **dict(norm.named_parameters())}
    leaves.pop(frozen).requires_grad_(False)
    for name in ("cpp", "off"):
        monkeypatch.setenv("WSBCN_FUSED", name)
        y = norm(x).pow(3).sum()
        found.append(torch.autograd.grad(y, list(leaves.values()), create_graph=twice))
    assert len(found[0]) == 4
    assert_close(*found)


def test_an_input_of_another_width_is_no_kernels():
    """float64 numbers into a float32 layer: they are computed with as they are."""
    norm = make(6, 3).eval()
    x = torch.randn(2, 6, 3, 3, dtype=torch.double, requires_grad=True)
    with contextlib.suppress(RuntimeError):  # of a PyTorch whose group norm wants one type
        assert not used(norm(x))


def test_forward_mode_gets_the_readable_form():
    norm, x = make(6, 3).double().eval(), torch.randn(2, 6, 3, 3, dtype=torch.double)
    v = torch.randn_like(x)
    with torch.autograd.forward_ad.dual_level():
        tangent = torch.autograd.forward_ad.unpack_dual(
            norm(torch.autograd.forward_ad.make_dual(x, v))
        ).tangent
    (gradient,) = torch.autograd.grad(norm(x.requires_grad_()), x, v)
    assert_close((tangent * v).sum(), (gradient * v).sum())
