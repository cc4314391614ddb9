"""``standardize_weight``: the three formulas, their gradients, and their edges."""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from wsbcn_d2 import standardize_weight
from wsbcn_d2.layers import WS_FORMULAS

SHAPES = [(8, 4, 3, 3), (5, 3, 1, 1), (6, 1, 3, 3), (4, 2, 1, 1), (1, 7, 1, 5)]

formulas = pytest.mark.parametrize("formula", WS_FORMULAS)


@pytest.fixture(autouse=True, params=["cpp", "off"])
def backend(request, monkeypatch):
    """The fused form and the readable one."""
    monkeypatch.setenv("WSBCN_FUSED", request.param)


def test_the_formulas_are_the_three_of_the_design():
    assert set(WS_FORMULAS) == {"biased", "unbiased", "unbiased_std"}


@formulas
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [1e-5, 0.3])  # the large one tells where epsilon stands
def test_value(formula, shape, eps):
    weight = 0.2 * torch.randn(shape, dtype=torch.double) + 0.1
    expected = reference.standardize_weight(weight, formula, eps)
    before = weight.clone()
    assert_close(standardize_weight(weight, formula=formula, eps=eps), expected)
    assert_close(
        standardize_weight(weight.float(), formula=formula, eps=eps),
        expected.float(),
        atol=2e-5,
        rtol=1e-5,
    )
    assert torch.equal(weight, before)


def test_defaults():
    weight = torch.randn(4, 3, 3, 3)
    expected = standardize_weight(weight, formula="unbiased", eps=1e-5)
    assert torch.equal(standardize_weight(weight), expected)


@formulas
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_that_of_the_formula(formula, shape):
    weight = torch.randn(shape, dtype=torch.double, requires_grad=True)
    seed = torch.randn(shape, dtype=torch.double)
    (expected,) = torch.autograd.grad(
        reference.standardize_weight(weight, formula, 0.1), weight, seed
    )
    (actual,) = torch.autograd.grad(
        standardize_weight(weight, formula=formula, eps=0.1), weight, seed
    )
    assert_close(actual, expected)
    single = weight.detach().float().requires_grad_()
    (actual,) = torch.autograd.grad(
        standardize_weight(single, formula=formula, eps=0.1), single, seed.float()
    )
    assert_close(actual, expected.float(), atol=2e-5, rtol=2e-5)


@formulas
def test_gradcheck(formula):
    weight = torch.randn(3, 2, 2, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda w: standardize_weight(w, formula=formula, eps=1e-3), (weight,)
    )


@formulas
@settings(max_examples=30, deadline=None)
@given(scale=st.floats(0.01, 100), shift=st.floats(-10, 10), seed=st.integers(0, 2**31))
def test_invariant_to_scale_and_shift_of_a_filter(formula, scale, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 4, 3, 3, dtype=torch.double, generator=generator)
    other = weight.clone()
    other[1] = scale * other[1] + shift
    assert_close(
        standardize_weight(other, formula=formula, eps=1e-12),
        standardize_weight(weight, formula=formula, eps=1e-12),
        atol=1e-6,
        rtol=1e-6,
    )


@formulas
@pytest.mark.parametrize("constant", [0.0, 0.7, -1e4])
def test_constant_filters_have_finite_values_and_gradients(formula, constant):
    weight = torch.randn(4, 3, 3, 3)
    weight[1] = constant
    weight.requires_grad_()
    out = standardize_weight(weight, formula=formula)
    (gradient,) = torch.autograd.grad(out, weight, torch.randn_like(out))
    assert torch.isfinite(out).all() and torch.isfinite(gradient).all()
    # What is left of the filter is the rounding of its mean, divided by epsilon.
    assert out[1].abs().max() <= min(1.0, abs(constant) * 1.2e-7 / 1e-5)
    # The other filters are none the worse for it.
    expected = reference.standardize_weight(weight.detach().double()[[0, 2, 3]], formula, 1e-5)
    assert_close(out[[0, 2, 3]], expected.float(), atol=1e-5, rtol=1e-5)


@formulas
@pytest.mark.parametrize("shape", [(4, 1, 1, 1), (4, 0, 3, 3)])
def test_a_filter_of_one_element_is_refused(formula, shape):
    with pytest.raises(ValueError, match="nothing to standardize"):
        standardize_weight(torch.randn(shape), formula=formula)


def test_an_unknown_formula_is_refused_with_the_valid_names():
    with pytest.raises(ValueError, match="'timm'") as error:
        standardize_weight(torch.randn(2, 2, 1, 1), formula="timm")
    assert all(name in str(error.value) for name in WS_FORMULAS)


@formulas
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 3e-4])  # the square of the small one underflows float16
def test_half_precision_weights_have_float32_statistics(formula, dtype, scale):
    weight = (scale * torch.randn(6, 8, 3, 3)).to(dtype)
    out = standardize_weight(weight, formula=formula)
    assert out.dtype == dtype
    expected = reference.standardize_weight(weight.double(), formula, 1e-5)
    tolerance = 2e-3 if dtype == torch.float16 else 1e-2
    assert_close(out.double(), expected, atol=1e-6, rtol=tolerance)


@formulas
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_touch_the_statistics(formula, dtype):
    weight = 3e-4 * torch.randn(6, 8, 3, 3) + 1.0
    with torch.autocast("cpu", dtype=dtype):
        out = standardize_weight(weight, formula=formula).float()
    expected = reference.standardize_weight(weight.double(), formula, 1e-5)
    # Statistics in half precision would round 1 + 3e-4 to 1 and lose the filter altogether.
    assert_close(out.double(), expected, atol=5e-3, rtol=1e-2)


@formulas
def test_memory_format_does_not_matter(formula):
    weight = torch.randn(6, 4, 3, 3)
    expected = standardize_weight(weight, formula=formula)
    last = weight.to(memory_format=torch.channels_last)
    assert_close(standardize_weight(last, formula=formula), expected)
    strided = torch.randn(6, 4, 3, 6)[..., ::2].copy_(weight)
    assert_close(standardize_weight(strided, formula=formula), expected)
