"""``WSConv2d``: what it computes, what it keeps of its parent, and the conversion in place."""

import copy
import pickle

import pytest
import reference
import torch
from detectron2.layers import Conv2d, DeformConv, ModulatedDeformConv
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from wsbcn_d2 import WSConv2d
from wsbcn_d2.layers import WS_FORMULAS

VARIANTS = [
    dict(in_channels=8, out_channels=6, kernel_size=3, padding=1),
    dict(in_channels=8, out_channels=6, kernel_size=3, stride=2, padding=2, dilation=2),
    dict(in_channels=8, out_channels=4, kernel_size=(1, 3), groups=4, bias=False),
    dict(in_channels=8, out_channels=6, kernel_size=1, bias=False),
]


@pytest.fixture(autouse=True, params=["cpp", "off"])
def backend(request, monkeypatch):
    """The fused form and the readable one."""
    monkeypatch.setenv("WSBCN_FUSED", request.param)


def pair(formula="unbiased", eps=1e-5, **kwargs):
    """A stock convolution and one with WS on the same weights."""
    stock = Conv2d(**kwargs)
    ws = WSConv2d(**kwargs, ws_formula=formula, ws_eps=eps)
    ws.load_state_dict(stock.state_dict())
    return stock, ws


@pytest.mark.parametrize("formula", WS_FORMULAS)
@pytest.mark.parametrize("kwargs", VARIANTS)
@pytest.mark.parametrize("eps", [1e-5, 0.2])
def test_forward_and_gradient(formula, kwargs, eps):
    _, conv = pair(formula, eps, **kwargs)
    conv.double()
    x = torch.randn(2, 8, 9, 7, dtype=torch.double, requires_grad=True)
    raw = conv.weight.detach().clone().requires_grad_()
    weight = reference.standardize_weight(raw, formula, eps)
    expected = F.conv2d(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    actual = conv(x)
    assert_close(actual, expected)
    seed = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, [x, raw], seed)
    assert_close(torch.autograd.grad(actual, [x, conv.weight], seed), expected_gradients)


def test_norm_and_activation_come_after_the_convolution():
    norm = nn.GroupNorm(2, 6)
    nn.init.normal_(norm.weight)
    conv = WSConv2d(8, 6, 3, norm=norm, activation=torch.tanh)
    x = torch.randn(2, 8, 7, 7)
    weight = reference.standardize_weight(conv.weight.detach().double(), "unbiased", 1e-5)
    expected = torch.tanh(norm(F.conv2d(x, weight.float(), conv.bias)))
    assert_close(conv(x), expected, atol=1e-5, rtol=1e-4)


def test_parameters_and_keys_are_the_parents():
    stock, conv = pair(**VARIANTS[0], norm=nn.BatchNorm2d(6))
    assert list(conv.state_dict()) == list(stock.state_dict())
    assert [n for n, _ in conv.named_parameters()] == [n for n, _ in stock.named_parameters()]
    before = conv.weight.clone()
    conv(torch.randn(1, 8, 5, 5))
    assert torch.equal(conv.weight, before)  # the raw weight is what is stored
    assert "ws_formula=unbiased" in repr(conv)


def test_construction_refuses_what_cannot_be_standardized():
    with pytest.raises(ValueError, match="nothing to standardize"):
        WSConv2d(4, 4, 1, groups=4)
    with pytest.raises(ValueError, match="unknown weight-standardization formula 'none'"):
        WSConv2d(4, 4, 3, ws_formula="none")


@pytest.mark.parametrize("training", [True, False])
def test_empty_input(training):
    _, conv = pair(**VARIANTS[0], norm=nn.GroupNorm(2, 6))
    conv.train(training)
    y = conv(torch.zeros(0, 8, 6, 5, requires_grad=True))
    assert y.shape == (0, 6, 6, 5)
    y.sum().backward()
    for name, parameter in conv.named_parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_empty_input_meets_sync_batch_norm_as_in_the_parent():
    for conv in pair(**VARIANTS[0], norm=nn.SyncBatchNorm(6)):
        with pytest.raises(AssertionError, match="SyncBatchNorm does not support empty inputs"):
            conv(torch.zeros(0, 8, 6, 6))


@pytest.mark.parametrize("formula", WS_FORMULAS)
def test_autocast(formula):
    _, conv = pair(formula, **VARIANTS[0])
    with torch.no_grad():  # such that statistics in bfloat16 would see a constant filter
        conv.weight.mul_(1e-3).add_(1.0)
    x = torch.randn(2, 8, 9, 9)
    expected = conv(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = conv(x)
    assert actual.dtype == torch.bfloat16
    assert_close(actual.float(), expected, atol=0.15, rtol=0.05)
    actual.float().square().mean().backward()
    assert conv.weight.grad.dtype == torch.float32
    assert torch.isfinite(conv.weight.grad).all()


def test_half_precision_module():
    _, conv = pair(**VARIANTS[0])
    x = torch.randn(2, 8, 9, 9)
    expected = conv(x)
    actual = conv.bfloat16()(x.bfloat16())
    assert actual.dtype == torch.bfloat16
    assert_close(actual.float(), expected, atol=0.15, rtol=0.05)


def test_channels_last():
    _, conv = pair(**VARIANTS[0])
    x = torch.randn(2, 8, 9, 9)
    expected = conv(x)
    conv.to(memory_format=torch.channels_last)
    actual = conv(x.to(memory_format=torch.channels_last))
    assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    assert actual.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("converted", [True, False])
def test_deepcopy_and_pickle(copied, converted):
    stock, conv = pair("biased", 0.1, **VARIANTS[0], norm=nn.GroupNorm(2, 6))
    if converted:
        conv = WSConv2d.convert(stock, formula="biased", eps=0.1)
    other = copied(conv)
    x = torch.randn(1, 8, 5, 5)
    assert type(other) is WSConv2d
    assert torch.equal(other(x), conv(x))
    with torch.no_grad():
        conv.weight.normal_()
    assert not torch.equal(other(x), conv(x))


# Conversion.


class OwnConv(Conv2d):
    pass


def zoo():
    """Convolutions of every kind."""
    return nn.ModuleDict(
        {
            "normed": Conv2d(4, 6, 3, bias=False, norm=nn.GroupNorm(2, 6), activation=F.relu),
            "plain": Conv2d(4, 6, 3),
            "torch": nn.Conv2d(4, 6, 3),
            "own": OwnConv(4, 6, 3, norm=nn.GroupNorm(2, 6)),
            "deconv": nn.ConvTranspose2d(4, 6, 2),
            "inner": nn.Sequential(Conv2d(4, 6, 3, norm=nn.BatchNorm2d(6))),
        }
    )


def standardized(module):
    return [name for name, child in module.named_modules() if isinstance(child, WSConv2d)]


def test_convert_takes_exactly_the_convolutions_with_a_norm():
    model = zoo()
    assert WSConv2d.convert(model) is model
    assert standardized(model) == ["normed", "inner.0"]
    assert type(model["own"]) is OwnConv


def test_convert_keeps_the_object_and_all_that_is_in_it():
    model = zoo()
    conv = model["normed"]
    calls = []
    conv.register_forward_hook(lambda *_: calls.append(1))
    before = {k: v.data_ptr() for k, v in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    aliases = [conv]
    WSConv2d.convert(model, formula="biased", eps=0.5)
    assert model["normed"] is conv and type(aliases[0]) is WSConv2d
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == before
    assert all(parameters[n] is p for n, p in model.named_parameters())
    x = torch.randn(2, 4, 6, 6)
    weight = reference.standardize_weight(conv.weight.detach().double(), "biased", 0.5).float()
    expected = F.relu(conv.norm(F.conv2d(x, weight)))
    assert_close(aliases[0](x), expected, atol=1e-5, rtol=1e-4)
    assert calls == [1]


def test_convert_takes_a_single_convolution_and_converts_once():
    conv = Conv2d(4, 6, 3, norm=nn.GroupNorm(2, 6))
    assert WSConv2d.convert(conv, formula="biased", eps=0.5) is conv
    WSConv2d.convert(conv, formula="unbiased")
    assert type(conv) is WSConv2d and conv.ws_formula == "biased" and conv.ws_eps == 0.5


@pytest.mark.parametrize("kind", [DeformConv, ModulatedDeformConv])
def test_a_deformable_convolution_stops_the_conversion_before_it_starts(kind):
    model = zoo()
    model["deformable"] = kind(4, 6, 3, norm=nn.GroupNorm(2, 6))
    with pytest.raises(ValueError, match="'deformable'.*DEFORM_ON_PER_STAGE"):
        WSConv2d.convert(model)
    assert standardized(model) == []


def test_other_refusals_convert_nothing_either():
    model = zoo()
    with pytest.raises(ValueError, match="unknown weight-standardization formula"):
        WSConv2d.convert(model, formula="none")
    model["depthwise"] = Conv2d(4, 4, 1, groups=4, norm=nn.GroupNorm(2, 4))
    with pytest.raises(ValueError, match="nothing to standardize"):
        WSConv2d.convert(model)
    assert standardized(model) == []
