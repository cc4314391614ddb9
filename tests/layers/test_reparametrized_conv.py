"""WS convolutions keep no standardized weight, and nobody can tell from their results."""

from types import SimpleNamespace

import pytest
import torch
from conftest import kept_for_backward
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from wsbcn_d2 import WSConv2d, standardize_weight
from wsbcn_d2.layers import CWNConv2d, WNConv2d, standardize_once
from wsbcn_d2.layers.recomputed_conv import recomputed_conv2d, recomputes

kinds = pytest.mark.parametrize("kind", [WSConv2d, WNConv2d, CWNConv2d])
OPTIONS = [
    {"padding": 1},
    {"stride": 2, "groups": 2},
    {"dilation": 2, "bias": False},
    {"padding": "same"},  # served by the plain form
]


def plain(conv, x):
    weight = conv.used_weight()
    return F.conv2d(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("needs_x", [True, False])
@kinds
def test_bits_are_those_of_the_plain_form(kind, options, layout, needs_x):
    conv = kind(4, 6, 3, **options).to(memory_format=layout)
    x = torch.randn(2, 4, 9, 11).to(memory_format=layout).requires_grad_(needs_x)
    results = []
    for run in (conv, lambda x: plain(conv, x)):
        y = run(x)
        (y * y.detach().cos()).sum().backward()
        results.append([y, *([x.grad] if needs_x else [])])
        results[-1] += [parameter.grad for parameter in conv.parameters()]
        conv.zero_grad()
        x.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@kinds
def test_no_copy_of_the_weight_is_kept(kind):
    conv = kind(32, 32, 3, bias=False)
    x = torch.randn(1, 32, 5, 5, requires_grad=True)
    own = {tensor.data_ptr() for tensor in (x, *conv.parameters())}
    assert set(kept_for_backward(lambda: conv(x))) == own
    with_copy = kept_for_backward(lambda: plain(conv, x))
    assert sum(n for at, n in with_copy.items() if at not in own) >= conv.weight.nbytes


@pytest.mark.parametrize("bias", [True, False])
def test_first_and_second_derivatives(bias):
    inputs = [torch.randn(2, 2, 4, 4), torch.randn(3, 2, 2, 2), torch.randn(3)][: 2 + bias]
    inputs = [tensor.double().requires_grad_() for tensor in inputs]

    def run(x, weight, bias=None):
        conv = SimpleNamespace(bias=bias, stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
        return recomputed_conv2d(conv, x, standardize_weight, weight)

    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)


def test_a_weight_changed_before_backward_is_an_error():
    conv = WSConv2d(2, 4, 3)
    y = conv(torch.randn(1, 2, 5, 5))
    with torch.no_grad():
        conv.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


NO_GAIN = {
    "frozen": lambda conv, x: conv.weight.requires_grad_(False),
    "empty": lambda conv, x: x.resize_(0, 2, 5, 5),
    "mixed": lambda conv, x: conv.double(),
    "half": lambda conv, x: (conv.half(), setattr(x, "data", x.half())),
    "same": lambda conv, x: setattr(conv, "padding", "same"),
    "subclass": None,
}


@pytest.mark.parametrize("case", NO_GAIN)
def test_what_is_recomputed_and_what_is_not(case, monkeypatch):
    monkeypatch.delenv("WSBCN_FUSED", raising=False)
    conv, x = WSConv2d(2, 4, 3), torch.randn(1, 2, 5, 5)
    assert recomputes(conv, x) and recomputes(conv.eval(), x)
    assert recomputes(WSConv2d(2, 4, 3).double(), x.double())
    with torch.no_grad():
        assert not recomputes(conv, x)
    with torch.autocast("cpu"):
        assert not recomputes(conv, x)
    with monkeypatch.context() as patch:
        patch.setenv("WSBCN_FUSED", "off")
        assert not recomputes(conv, x)
    assert not recomputes(WSConv2d(2, 4, 3, device="meta"), x.to("meta"))
    if case == "subclass":
        x = x.as_subclass(type("Other", (torch.Tensor,), {}))
    else:
        NO_GAIN[case](conv, x)
    assert not recomputes(conv, x)


@pytest.mark.parametrize("frozen", [True, False])
def test_evaluation_and_frozen_weights_take_the_plain_form(frozen):
    conv = WSConv2d(2, 4, 3, norm=nn.GroupNorm(2, 4))
    conv.weight.requires_grad_(not frozen)
    x = torch.randn(1, 2, 5, 5, requires_grad=frozen)
    with torch.set_grad_enabled(frozen):
        y = conv(x)
    expected = conv.norm(plain(conv, x))
    torch.testing.assert_close(y, expected)
    if frozen:
        y.sum().backward()
        assert conv.weight.grad is None and x.grad.abs().sum() > 0


@pytest.mark.parametrize("twice", [False, True], ids=["once", "create_graph"])
@kinds
def test_whatever_is_frozen_the_others_have_their_gradients(kind, twice):
    """A frozen bias, a frozen length, an input that needs none: as in the plain form."""
    conv = kind(4, 6, 3).double()
    x = torch.randn(2, 4, 7, 7, dtype=torch.double, requires_grad=True)
    leaves = {"x": x, **dict(conv.named_parameters())}
    for frozen in leaves.keys() - {"weight"}:
        leaves[frozen].requires_grad_(False)
        assert recomputes(conv, x)
        wanted = [leaf for name, leaf in leaves.items() if name != frozen]
        found = []
        for run in (conv, lambda x: plain(conv, x)):
            loss = run(x).square().sum()
            grads = torch.autograd.grad(loss, wanted, create_graph=twice)
            if twice:
                grads += torch.autograd.grad(
                    sum(g.square().sum() for g in grads), wanted, allow_unused=True
                )
            found.append(grads)
        torch.testing.assert_close(*found)
        leaves[frozen].requires_grad_(True)


@kinds
def test_a_shared_weight_is_of_the_precision_of_its_use(kind):
    """A head's forward that leaves autocast for some of its layers, and comes back."""
    conv, x = kind(2, 4, 3), torch.randn(1, 2, 5, 5)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        half = conv(x)
        with standardize_once(conv):
            assert torch.equal(conv(x), half)
            with torch.autocast("cpu", enabled=False):
                y = conv(x)
            assert torch.equal(conv(x), half)
    with torch.no_grad():
        torch.testing.assert_close(y, plain(conv, x))
