"""Tensors that are not what their addresses say, and compilers that change what numbers mean."""

import copy

import pytest
import reference
import torch
from torch import nn
from torch.testing import assert_close

from wsbcn_d2 import BatchChannelNorm2d, standardize_weight
from wsbcn_d2.layers.kernels import build, cpu


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    monkeypatch.setenv("WSBCN_FUSED", "cpp")


def lazily_negated(x):
    """A tensor equal to ``x`` whose memory holds -x."""
    out = torch._neg_view(-x.detach())
    assert out.is_neg()
    return out


def from_complex(x):
    """The imaginary part of a conjugate: a negated, strided view."""
    out = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert out.is_neg()
    return out


negated = pytest.mark.parametrize("negate", [lazily_negated, from_complex])


def outputs(norm, x, dy):
    """Output, gradients and buffers of one step."""
    x = x.detach().requires_grad_()
    y = norm(x)
    parameters = [p for p in norm.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y, [x, *parameters], dy), *norm.buffers()]


@negated
@pytest.mark.parametrize("what", ["x", "dy", "weight", "bias", "bn.weight", "bn.bias"])
def test_a_lazily_negated_tensor_has_its_sign(negate, what):
    norm = BatchChannelNorm2d(8, 4)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0, 0.3)
    x, dy = torch.randn(2, 8, 5, 4) + 1, torch.randn(2, 8, 5, 4)
    expected = outputs(copy.deepcopy(norm), x, dy)
    if what == "x":
        x = negate(x)
    elif what == "dy":
        dy = negate(dy)
    else:
        parent = norm.get_submodule(what.rpartition(".")[0])
        name = what.rpartition(".")[2]
        setattr(parent, name, nn.Parameter(negate(getattr(parent, name))))
        assert getattr(parent, name).is_neg()
    for found, wanted in zip(outputs(norm, x, dy), expected, strict=True):
        assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@negated
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("training", [True, False])
def test_lazily_negated_estimates_have_their_sign(negate, name, training):
    norm = BatchChannelNorm2d(8, 4, update_rate=0.3)
    norm(torch.randn(2, 8, 5, 4) + 1)
    norm.train(training)
    x, dy = torch.randn(2, 8, 5, 4) + 1, torch.randn(2, 8, 5, 4)
    expected = outputs(copy.deepcopy(norm), x, dy)
    setattr(norm.bn, name, negate(getattr(norm.bn, name)))
    for found, wanted in zip(outputs(norm, x, dy), expected, strict=True):
        assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@negated
@pytest.mark.parametrize("formula", ["biased", "unbiased", "unbiased_std"])
def test_a_lazily_negated_weight_has_its_sign(negate, formula):
    weight, dy = torch.randn(4, 3, 3, 3) + 0.5, torch.randn(4, 3, 3, 3)
    results = []
    for w, g in ((weight, dy), (negate(weight), dy), (weight, negate(dy))):
        w = w.requires_grad_() if w is weight else w.detach().requires_grad_()
        out = standardize_weight(w, formula=formula)
        results.append((out, *torch.autograd.grad(out, w, g)))
    assert_close(results[1], results[0])
    assert_close(results[2], results[0])
    exact = reference.standardize_weight(weight.detach().double(), formula, 1e-5)
    assert_close(results[1][0].double(), exact, rtol=1e-4, atol=1e-5)


def test_a_gradient_of_lazy_zeros():
    norm, x = BatchChannelNorm2d(8, 4), torch.randn(1, 8, 3, 3)
    zeros = torch._efficientzerotensor(1, 8, 3, 3)
    assert zeros.data_ptr() == 0
    _, *grads = outputs(norm, x, zeros)[:6]
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.float32])
def test_a_count_of_another_type_counts_and_harms_nothing(dtype):
    norm, twin = BatchChannelNorm2d(8, 4), BatchChannelNorm2d(8, 4)
    # In the middle of other numbers, which a count of eight bytes would overwrite.
    numbers = torch.arange(16).to(dtype)
    numbers[4] = 0
    norm.bn.num_batches_tracked = numbers[4]
    before = numbers.clone()
    for step in range(3):
        x = torch.randn(2, 8, 4, 4)
        assert_close(norm(x), twin(x), rtol=1e-4, atol=1e-5)
        before[4] = step + 1
        assert torch.equal(numbers, before)
    assert_close(norm.bn.running_var, twin.bn.running_var)


def test_buffers_that_are_views_of_one_tensor():
    norm, twin = BatchChannelNorm2d(8, 4), BatchChannelNorm2d(8, 4)
    flat = torch.cat([torch.full((3,), 7.0), torch.zeros(8), torch.ones(8), torch.full((3,), 7.0)])
    norm.bn.running_mean, norm.bn.running_var = flat[3:11], flat[11:19]
    for _ in range(2):
        x = torch.randn(2, 8, 4, 4)
        assert torch.equal(norm(x), twin(x))
    assert torch.equal(flat[3:11], twin.bn.running_mean)
    assert torch.equal(flat[11:19], twin.bn.running_var)
    assert (flat[[0, 1, 2, 19, 20, 21]] == 7).all()


@pytest.mark.parametrize("spoil", ["expanded", "float64", "half", "strided"])
def test_estimates_that_a_kernel_cannot_hold(spoil):
    norm, twin = (
        BatchChannelNorm2d(8, 4, update_rate=0.5),
        BatchChannelNorm2d(8, 4, update_rate=0.5),
    )
    make = {
        "expanded": lambda t: t[:1].expand(8),
        "float64": lambda t: t.double(),
        "half": lambda t: t.half(),
        "strided": lambda t: t.repeat_interleave(2)[::2],
    }[spoil]
    norm.bn.running_mean, norm.bn.running_var = (
        make(norm.bn.running_mean),
        make(norm.bn.running_var),
    )
    x = torch.randn(2, 8, 4, 4)
    if spoil == "expanded":  # PyTorch's own refusal to write where tensors overlap
        with pytest.raises(RuntimeError, match="single memory location"):
            norm(x)
        return
    assert_close(norm(x).float(), twin(x), rtol=1e-2, atol=1e-2)
    assert norm.bn.num_batches_tracked == 1


def test_estimates_made_in_inference_mode():
    norm, x = BatchChannelNorm2d(8, 4), torch.randn(2, 8, 4, 4)
    with torch.inference_mode():
        norm.bn.running_mean = norm.bn.running_mean.clone()
        norm(x)
    before = norm.bn.running_mean.clone()
    with pytest.raises(RuntimeError, match="made in inference mode cannot move"):
        norm(x)
    assert torch.equal(norm.bn.running_mean, before)
    norm.eval()
    assert norm(x).isfinite().all()


@pytest.mark.parametrize("needs", range(32))
def test_every_pattern_of_gradients(needs):
    norm = BatchChannelNorm2d(4, 2)
    leaves = [torch.randn(2, 4, 3, 3), norm.weight, norm.bias, norm.bn.weight, norm.bn.bias]
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(bool(needs >> i & 1))
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    y = norm(leaves[0])
    assert y.requires_grad == bool(wanted)
    if wanted:
        grads = torch.autograd.grad(y.square().sum(), wanted)
        assert [g.shape for g in grads] == [leaf.shape for leaf in wanted]


@pytest.mark.parametrize(
    "flags",
    ["-ffast-math", "-Ofast", "-ffinite-math-only", "-Ofast -ffast-math -ffinite-math-only"],
)
def test_a_compiler_told_of_fast_mathematics_keeps_the_guard(monkeypatch, tmp_path, flags):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", f"g++ {flags}")
    monkeypatch.setattr(cpu, "_libraries", {})
    norm = BatchChannelNorm2d(8, 4)
    norm(torch.randn(2, 8, 3, 3))
    assert cpu._libraries[torch.float32] is not None
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(2, 8, 3, 3)
        x[1, 3, 1, 1] = bad
        norm(x)
        for name, value in norm.state_dict().items():
            assert torch.equal(value, before[name]), (bad, name)
    # And small numbers are not flushed in the whole process.
    assert torch.tensor(1e-40) * 0.5 > 0


def test_printing_a_model_builds_nothing(monkeypatch):
    monkeypatch.setattr(cpu, "_libraries", {})
    monkeypatch.setattr(build, "load", lambda real: pytest.fail("a compiler was started"))
    norm = BatchChannelNorm2d(8, 4)
    monkeypatch.delenv("WSBCN_FUSED")
    assert "fused=cpp" in repr(norm) and "fused=cpp" in repr(norm.double())
    assert "fused=off" in repr(copy.deepcopy(norm).half())


def test_threads_that_need_the_kernels_at_once_build_them_once(monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    load, built = build.load, []
    monkeypatch.setattr(cpu, "_libraries", {})
    monkeypatch.setattr(build, "load", lambda real: built.append(real) or load(real))
    weight = torch.randn(4, 3, 3, 3)
    with ThreadPoolExecutor(4) as pool:
        outs = list(pool.map(standardize_weight, [weight] * 8))
    assert built == ["float"]
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_a_tensor_that_a_function_transform_left_behind():
    left, x = [], torch.randn(2, 8, 5, 4)
    torch.func.grad(lambda a: (left.append(a), a.sum())[1])(x)
    assert torch._C._functorch.is_dead_tensor_wrapper(left[0])
    norm, twin = BatchChannelNorm2d(8, 4), BatchChannelNorm2d(8, 4)
    y = norm(left[0])
    assert type(y.grad_fn).__name__.startswith("_FusedBCN")
    assert_close(y, twin(x))
    assert_close(standardize_weight(left[0]), standardize_weight(x))
