"""The fast path of WS is exact, and the weight that is used is always the current one."""

import copy

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from wsbcn_d2 import WSConv2d, standardize_weight
from wsbcn_d2.layers import WS_FORMULAS


def slow(weight, formula, eps=1e-5):
    """The formulas as they are written."""
    n = weight[0].numel()
    centred = weight - weight.mean((1, 2, 3), keepdim=True)
    squares = centred.square().sum((1, 2, 3), keepdim=True)
    if formula == "biased":
        return centred / (squares / n + eps).sqrt()
    if formula == "unbiased":
        return centred / (squares / (n - 1) + eps).sqrt()
    return centred / ((squares / (n - 1)).sqrt() + eps)


@pytest.mark.parametrize("formula", WS_FORMULAS)
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (4, 7, 1, 1), (1, 2, 1, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_exact_in_float64(formula, shape, layout):
    weight = torch.randn(shape, dtype=torch.float64) * 0.01 + 0.5
    weight = weight.contiguous(memory_format=layout).requires_grad_()
    out = standardize_weight(weight, formula=formula)
    assert "FusedWS" in _history(out)
    expected = slow(weight, formula)
    assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert out.is_contiguous(memory_format=layout)
    dy = torch.randn(shape, dtype=torch.float64)
    (found,) = torch.autograd.grad(out, weight, dy)
    (wanted,) = torch.autograd.grad(expected, weight, dy)
    assert_close(found, wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max().item())


def _history(tensor):
    names, node = [], tensor.grad_fn
    while node is not None:
        names.append(type(node).__name__)
        node = node.next_functions[0][0] if node.next_functions else None
    return " ".join(names)


@pytest.mark.parametrize("formula", WS_FORMULAS)
def test_first_and_second_derivatives(formula):
    weight = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda w: standardize_weight(w, formula=formula), [weight])
    assert gradgradcheck(lambda w: standardize_weight(w, formula=formula), [weight])


@pytest.mark.parametrize("formula", WS_FORMULAS)
@pytest.mark.parametrize("value", [0.0, 0.1, -3.0, 1e4])
def test_a_constant_filter_has_finite_gradients(formula, value):
    weight = torch.full((2, 3, 3, 3), value, requires_grad=True)
    dy = torch.randn(2, 3, 3, 3)
    standardize_weight(weight, formula=formula).backward(dy)
    assert weight.grad.isfinite().all()
    assert weight.grad.abs().max() < 1e7


@pytest.mark.parametrize("formula", WS_FORMULAS)
def test_off_equals_fused(formula, monkeypatch):
    weight = torch.randn(8, 4, 3, 3)
    fused = standardize_weight(weight, formula=formula)
    monkeypatch.setenv("WSBCN_FUSED", "off")
    assert_close(fused, standardize_weight(weight, formula=formula))


@pytest.fixture
def conv():
    return WSConv2d(3, 4, 3, bias=False, ws_formula="unbiased_std")


def assert_current(conv):
    x = torch.randn(1, 3, 6, 6)
    expected = torch.nn.functional.conv2d(x, slow(conv.weight, conv.ws_formula))
    assert_close(conv(x), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert_close(conv(x), expected, rtol=1e-4, atol=1e-5)


def test_after_optimizer_steps_and_evaluation_between(conv):
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        conv(torch.randn(1, 3, 6, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        conv.eval()
        assert_current(conv)
        conv.train()
        assert_current(conv)


def test_after_loading_and_edits_in_place(conv):
    assert_current(conv)
    conv.load_state_dict(WSConv2d(3, 4, 3, bias=False).state_dict())
    assert_current(conv)
    # Such an edit moves no version counter.
    conv.weight.data.mul_(torch.rand(4, 3, 3, 3))
    assert_current(conv)
    with torch.no_grad():
        conv.weight[0] += torch.rand(3, 3, 3)
    assert_current(conv)
    conv.weight = torch.nn.Parameter(torch.randn(4, 3, 3, 3))
    assert_current(conv)


def test_gradients_accumulate(conv):
    xs = torch.randn(2, 2, 3, 6, 6)
    weights = []
    for x in xs:
        conv(x).square().sum().backward()
        weight = conv.weight.detach().clone().requires_grad_()
        out = torch.nn.functional.conv2d(x, slow(weight, conv.ws_formula))
        out.square().sum().backward()
        weights.append(weight.grad)
    assert_close(conv.weight.grad, sum(weights), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_and_several_uses(conv, reentrant):
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    twin = copy.deepcopy(conv)
    out = checkpoint(conv, x, use_reentrant=reentrant) + conv(x * 2)
    out.square().sum().backward()
    (twin(x) + twin(x * 2)).square().sum().backward()
    assert_close(conv.weight.grad, twin.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spacings, constant", [(8, True), (16, False)])
def test_a_filter_is_constant_up_to_four_roundings_of_its_mean(spacings, constant, monkeypatch):
    """Two numbers near 100; then the deviation has no derivative, else it has its own."""
    monkeypatch.setenv("WSBCN_FUSED", "cpp")
    rounding, eps = 2.0**-17, 1e-5  # between neighbours of 100 in float32
    weight = torch.tensor([100.0, 100.0 + spacings * rounding]).view(1, 2, 1, 1).requires_grad_()
    out = standardize_weight(weight, formula="unbiased_std", eps=eps)
    (found,) = torch.autograd.grad(out, weight, torch.tensor([1.0, 0.0]).view(1, 2, 1, 1))
    inverse = 1 / (spacings * rounding / 2**0.5 + eps)
    expected = 0.5 * inverse * (1 if constant else eps * inverse)
    assert found.flatten().tolist() == pytest.approx([expected, -expected], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_weight_of_half_precision_rounds_once_each_way(dtype, layout, monkeypatch):
    monkeypatch.setenv("WSBCN_FUSED", "cpp")
    weight = torch.randn(4, 3, 3, 3).to(dtype).contiguous(memory_format=layout).requires_grad_()
    wide = weight.detach().float().requires_grad_()
    out, expected = standardize_weight(weight), standardize_weight(wide)
    assert "FusedWS" in _history(out) and out.is_contiguous(memory_format=layout)
    assert torch.equal(out, expected.to(dtype))
    dy = torch.randn(4, 3, 3, 3).to(dtype)
    (found,) = torch.autograd.grad(out, weight, dy)
    (wanted,) = torch.autograd.grad(expected, wide, dy.float())
    assert torch.equal(found, wanted.to(dtype))
