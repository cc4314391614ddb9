"""Triton's BCN kernels, in the interpreter, against autograd of the definition in float64."""

import pytest
import reference
import torch

from wsbcn_d2.layers.kernels import triton_bcn

CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last
LIMITS = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}

# shape, groups: odd rows, one pixel, one channel per group, several tiles a row, RoI maps (whole
# rows in a flat tile), more samples than a block, many channels a group and few, one group, a
# block of chunks and one more.
SHAPES = [
    ((1, 6, 5, 7), 3),
    ((5, 6, 1, 1), 2),
    ((2, 4, 3, 3), 4),
    ((2, 8, 40, 52), 4),
    ((5, 32, 7, 7), 4),
    ((130, 32, 1, 3), 1),
    ((3, 40, 2, 4), 8),
    ((2, 48, 3, 3), 1),
    ((1, 2, 150, 120), 1),
]


class Subclass(torch.Tensor):
    """A tensor that may be anything."""


def make(shape, groups, dtype=torch.float32, affine=True, count=3, offset=0.0):
    c = shape[1]
    p = {
        "weight": torch.randn(groups), "bias": torch.randn(groups),
        "bn_weight": torch.rand(c) + 0.5, "bn_bias": torch.randn(c),
        "bn_mean": torch.randn(c) + offset, "bn_var": torch.rand(c) + 0.5,
    }  # fmt: skip
    p = {name: tensor.to(dtype) for name, tensor in p.items()}
    if not affine:
        p["bn_weight"] = p["bn_bias"] = None
    return {**p, "bn_count": torch.tensor(count)}


def exact(x, p, groups, rate, dy, bn_eps=1e-5, eps=1e-5):
    """Output, gradients of x and the parameters, and the estimates afterwards, in float64."""
    q = {k: v if k == "bn_count" or v is None else v.double() for k, v in p.items()}
    mean, var, x = q["bn_mean"], q["bn_var"], x.detach().double().contiguous().requires_grad_()
    if rate is not None and x.isfinite().all():
        first = int(q["bn_count"]) == 0 or rate >= 1
        mean, var = reference.update(mean, var, x, rate, first)
    names = [n for n in ("weight", "bias", "bn_weight", "bn_bias") if q[n] is not None]
    leaves = [q[name].requires_grad_() for name in names]
    ones, zeros = torch.ones_like(mean), torch.zeros_like(mean)
    bn_weight, bn_bias = (q["bn_weight"], q["bn_bias"]) if len(leaves) == 4 else (ones, zeros)
    z = reference.batch_affine(x, mean, var, bn_weight, bn_bias, bn_eps)
    y = reference.channel_norm(z, groups, q["weight"], q["bias"], eps)
    return y, torch.autograd.grad(y, [x, *leaves], dy.double()), mean, var


def worst(found, wanted):
    found, wanted = found.detach().double(), wanted.detach()
    # A gradient that is 0 by symmetry (one channel per group) has no scale of its own.
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=0.1))


def forward(x, p, rate, dtype=None, bn_eps=1e-5, eps=1e-5):
    assert triton_bcn.takes_bcn(x, *p.values())
    return triton_bcn.bcn_forward(x, *p.values(), bn_eps, rate, eps, dtype)


def step(x, dy, groups, p, rate, limit, y_type=None, bn_eps=1e-5, eps=1e-5):
    """One forward and backward pass equal the exact ones."""
    y64, wanted, mean, var = exact(x, p, groups, rate, dy, bn_eps, eps)
    before = {name: None if t is None else t.clone() for name, t in p.items()}
    y, saved = forward(x, p, rate, y_type, bn_eps, eps)
    assert y.dtype == (y_type or x.dtype) and y.stride() == x.stride()
    affine = p["bn_weight"] is not None
    args = dy, x, p["weight"], p["bn_weight"], p["bn_bias"], saved
    found = triton_bcn.bcn_backward(*args, (True, affine))
    assert found[0].dtype == x.dtype and found[0].stride() == x.stride()
    assert worst(y, y64) < limit, "y"
    names = ("dx", "d_weight", "d_bias", "d_bn_weight", "d_bn_bias")
    for name, f, w in zip(names, found, wanted, strict=False):
        assert worst(f, w) < limit, name
    assert affine or found[3] is found[4] is None
    moved = {"bn_mean": mean, "bn_var": var}
    strict = min(limit, LIMITS[p["weight"].dtype])
    for name, tensor in p.items():
        if name in moved:
            assert worst(tensor, moved[name]) < strict, name
        elif name != "bn_count" and tensor is not None:
            assert torch.equal(tensor, before[name])
    assert int(p["bn_count"]) == int(before["bn_count"]) + (rate is not None)
    constants = triton_bcn.bcn_constants(saved)
    assert (
        worst(constants[0], mean) < strict and worst(constants[1], (var + bn_eps).rsqrt()) < strict
    )
    return saved


@pytest.mark.rotated(2)
@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST])
@pytest.mark.parametrize("shape,groups", SHAPES)
def test_values_gradients_and_estimates(shape, groups, layout):
    x = torch.randn(shape, dtype=torch.float64) * 2 + torch.arange(shape[1]).view(1, -1, 1, 1) * 0.1
    x = x.contiguous(memory_format=layout)
    dy = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=layout)
    settings = [(0.1, 3, True, 1e-5), (None, 3, False, 1e-3), (0.3, 0, True, 1e-2)]
    for rate, count, affine, eps in settings[: 1 if x.numel() > 10000 else 3]:
        p = make(shape, groups, torch.float64, affine, count)
        step(x, dy, groups, p, rate, 1e-11, bn_eps=10 * eps, eps=eps)


@pytest.mark.rotated(2)
@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST])
@pytest.mark.parametrize(
    "x_type,y_type",
    [
        (torch.float32, None),
        (torch.float16, None),
        (torch.bfloat16, None),
        (torch.float16, torch.float32),
    ],
)
@pytest.mark.parametrize("shape,groups", [((2, 8, 9, 8), 4), ((3, 16, 7, 7), 4)])
def test_types(shape, groups, x_type, y_type, layout):
    x = (torch.randn(shape) + 1).to(x_type).contiguous(memory_format=layout)
    dy = torch.randn(shape).to(y_type or x_type).contiguous(memory_format=layout)
    step(x, dy, groups, make(shape, groups), 1.0, LIMITS[x_type], y_type)


@pytest.mark.parametrize("count", [0, 3])
def test_at_rate_0_the_first_batch_sets_the_estimates_and_they_are_held(count):
    x, dy, p = torch.randn(2, 8, 4, 4) + 1, torch.randn(2, 8, 4, 4), make((2, 8), 4, count=count)
    before = p["bn_mean"].clone(), p["bn_var"].clone()
    step(x, dy, 4, p, 0, 1e-4)
    held = torch.equal(p["bn_mean"], before[0]) and torch.equal(p["bn_var"], before[1])
    assert held == (count > 0)


@pytest.mark.parametrize("shape", [(2, 8, 33, 36), (4, 16, 7, 7)])
def test_a_mean_that_is_large_beside_the_deviation(shape):
    x, dy = torch.randn(shape) + 1000, torch.randn(shape)
    for count in (0, 2):
        step(x, dy, 4, make(shape, 4, count=count, offset=1000.0), 0.1, 2e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "shape,at", [((2, 8, 60, 70), (1, 7, 59, 69)), ((2, 16, 7, 7), (0, 5, 3, 3))]
)
def test_a_batch_that_is_not_finite_moves_nothing(bad, shape, at):
    x = torch.randn(shape)
    x[at] = bad
    p = make(shape, 4, count=0)
    before = {name: tensor.clone() for name, tensor in p.items()}
    y, _ = forward(x, p, 0.1)
    assert all(torch.equal(p[name], before[name]) for name in p)
    per = shape[1] // 4
    group = slice(at[1] // per * per, at[1] // per * per + per)
    assert not y[at[0], group].isfinite().any()
    y[at[0], group] = 0
    assert y.isfinite().all()


def test_what_is_not_asked_for_is_not_computed():
    x, dy = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    p = make(x.shape, 4)
    _, saved = forward(x, p, None)
    args = dy, x, p["weight"], p["bn_weight"], p["bn_bias"], saved
    all_of_them = triton_bcn.bcn_backward(*args, (True, True))
    some = triton_bcn.bcn_backward(*args, (False, False))
    assert some[0] is some[3] is some[4] is None
    assert torch.equal(some[1], all_of_them[1]) and torch.equal(some[2], all_of_them[2])


def test_gradients_of_another_layout_with_gaps_and_lazy_signs():
    x, dy = torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 6)
    p = make(x.shape, 4)
    y, saved = forward(x, p, None)
    args = p["weight"], p["bn_weight"], p["bn_bias"]
    wanted = triton_bcn.bcn_backward(dy, x, *args, saved, (True, True))
    strange = torch.randn(2, 8, 6, 12)[..., ::2]
    strange.copy_(x)
    for other, gradient in [
        (x, dy.contiguous(memory_format=LAST)),
        (strange, dy),
        (torch._neg_view(-x), torch._neg_view(-dy)),
        (x, dy.transpose(2, 3).contiguous().transpose(2, 3)),
    ]:
        again, stats = forward(other, p, None)
        assert torch.allclose(again, y, atol=1e-6)
        found = triton_bcn.bcn_backward(gradient, other, *args, stats, (True, True))
        for f, w in zip(found, wanted, strict=True):
            assert torch.allclose(f, w, atol=1e-5)
    zeros = torch._efficientzerotensor(2, 8, 6, 6)
    found = triton_bcn.bcn_backward(zeros, x, *args, saved, (True, True))
    assert all(not f.any() for f in found)


def test_what_is_not_taken():
    x = torch.randn(2, 8, 6, 6)
    assert triton_bcn.takes_bcn(x, *make(x.shape, 4).values())
    for name, tensor in [
        ("weight", torch.ones(3)),
        ("bias", torch.ones(8)[::2]),
        ("bn_bias", torch.ones(4)),
        ("bn_weight", torch.ones(8, dtype=torch.float64)),
        ("bn_mean", torch._neg_view(torch.ones(8))),
        ("bn_var", torch.ones(8).as_subclass(Subclass)),
        ("bn_count", torch.tensor(0, dtype=torch.int32)),
        ("bn_count", torch.tensor([0, 0])),
    ]:
        assert not triton_bcn.takes_bcn(x, *{**make(x.shape, 4), name: tensor}.values()), name
    assert not triton_bcn.takes_bcn(x.double(), *make(x.shape, 4).values())
    wide = torch.empty(1, 4, 1, 1).expand(1, 4, 2**15, 2**15)
    assert not triton_bcn.takes_bcn(wide, *make(wide.shape, 4).values())
    many = torch.empty(1, 4096, 1, 1)
    assert not triton_bcn.takes_bcn(many, *make(many.shape, 1).values())
    assert triton_bcn.takes_bcn(many, *make(many.shape, 2).values())
