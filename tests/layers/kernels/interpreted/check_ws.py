"""Triton's WS kernel, in the interpreter, against the formulas in float64."""

import itertools

import pytest
import reference
import torch

from wsbcn_d2.layers.kernels import triton_ws

FORMULAS = ("biased", "unbiased", "unbiased_std")
# Odd, small and shared, two passes' worth, more than registers hold (read three times).
SHAPES = [(4, 3, 7, 7), (300, 16, 1, 1), (6, 64, 3, 3), (3, 2, 1, 1), (2, 1000, 3, 3)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
LIMITS = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def worst(found, wanted):
    assert found.isfinite().all()
    found, wanted = found.detach().double(), wanted.detach()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=0.1))


def exact(weight, formula, dy):
    wide = weight.detach().double().contiguous().requires_grad_()
    out = reference.standardize_weight(wide, formula, 1e-5)
    return out, torch.autograd.grad(out, wide, dy.double())[0]


CASES = [
    (formula, shape, torch.float64, None, LAYOUTS[0])
    for formula, shape in itertools.product(FORMULAS, SHAPES)
] + [
    (formula, shape, dtype, out, layout)
    for formula, (shape, dtype, out, layout) in zip(
        itertools.cycle(FORMULAS),
        [
            (SHAPES[0], torch.float32, None, LAYOUTS[1]),
            (SHAPES[2], torch.float32, torch.bfloat16, LAYOUTS[1]),
            (SHAPES[1], torch.float32, torch.float16, LAYOUTS[0]),
            (SHAPES[4], torch.float32, torch.float16, LAYOUTS[1]),
            (SHAPES[2], torch.float16, None, LAYOUTS[0]),
            (SHAPES[3], torch.bfloat16, None, LAYOUTS[0]),
        ],
        strict=False,
    )
]


@pytest.mark.parametrize("formula,shape,dtype,out,layout", CASES)
def test_values_and_gradients(formula, shape, dtype, out, layout):
    weight = (torch.randn(shape) * 0.1 + 0.02).to(dtype).contiguous(memory_format=layout)
    dy = torch.randn(shape).to(out or dtype).contiguous(memory_format=layout)
    wanted, gradient = exact(weight, formula, dy)
    assert triton_ws.takes_ws(weight)
    found, saved = triton_ws.ws_forward(weight, formula, 1e-5, out)
    assert found.dtype == (out or dtype) and found.stride() == weight.stride()
    assert saved == ()
    assert worst(found, wanted) < LIMITS[out or dtype]
    found = triton_ws.ws_backward(dy, weight, saved, formula, 1e-5)
    assert found.dtype == dtype and found.stride() == weight.stride()
    assert worst(found, gradient) < LIMITS[dtype]


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_a_constant_filter_has_finite_gradients(formula, value):
    weight, dy = torch.full((2, 3, 3, 3), value), torch.randn(2, 3, 3, 3)
    out, _ = triton_ws.ws_forward(weight, formula, 1e-5, None)
    dw = triton_ws.ws_backward(dy, weight, (), formula, 1e-5)
    assert out.isfinite().all() and dw.isfinite().all() and dw.abs().max() < 1e7


def test_a_gradient_of_another_layout_and_lazy_signs():
    weight = torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last)
    dy = torch.randn(4, 3, 3, 3)
    _, wanted = exact(weight, "unbiased", dy)
    assert worst(triton_ws.ws_backward(dy, weight, (), "unbiased", 1e-5), wanted) < 2e-5
    negated = torch._neg_view(-dy), torch._neg_view(-weight)
    assert all(tensor.is_neg() for tensor in negated)
    assert worst(triton_ws.ws_backward(*negated, (), "unbiased", 1e-5), wanted) < 2e-5
    strided = torch.randn(4, 3, 3, 6)[..., ::2]
    out, _ = triton_ws.ws_forward(strided, "biased", 1e-5, None)
    assert worst(out, exact(strided, "biased", dy)[0]) < 2e-5
