"""Random shapes, types, layouts and options of the layers, against float64."""

import contextlib
import math
import os

import pytest
import reference
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from wsbcn_d2 import BatchChannelNorm2d, EstimatedBatchNorm2d, WSConv2d, standardize_weight
from wsbcn_d2.layers import WS_FORMULAS

# Examples are the same in every run; a quarter of the deeper ones has its turn.
COMMON = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
QUICK, DEEP = settings(max_examples=60, **COMMON), settings(max_examples=75, **COMMON)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "strided", "transposed", "offset", "expanded", "flipped")


@contextlib.contextmanager
def backend(name):
    before = os.environ.get("WSBCN_FUSED")
    os.environ["WSBCN_FUSED"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["WSBCN_FUSED"]
        else:
            os.environ["WSBCN_FUSED"] = before


def laid_out(x, layout):
    """A tensor of the shape of ``x``, and up to "expanded" of its values, in another layout."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "offset":
        wide = x.new_zeros(*x.shape[:1], x.shape[1] + 1, *x.shape[2:])
        wide[:, 1:] = x
        return wide[:, 1:]
    if layout == "expanded" and x.numel():
        return x[:1, :, :1].expand(x.shape)
    if layout == "flipped":
        return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    return x


def close(actual, expected, tolerance, what):
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    if actual.numel():
        error = (actual.double() - expected).abs().max().item()
        assert error <= tolerance, (what, error, tolerance)


norm_cases = st.fixed_dictionaries(
    {
        "n": st.integers(0, 3),
        "groups": st.integers(1, 3),
        "per_group": st.integers(1, 3),
        "height": st.integers(1, 5),
        "width": st.integers(1, 5),
        "layer": st.sampled_from(["estimated", "batch", "sync", "EstBN", "EstBN, no affine"]),
        "training": st.booleans(),
        "rate": st.sampled_from([0, 0.01, 0.5, 1]),
        "eps": st.sampled_from([1e-5, 1e-3]),
        "dtype": st.sampled_from(DTYPES),
        "layout": st.sampled_from(LAYOUTS),
        "grad_layout": st.sampled_from(LAYOUTS),
        "scale": st.sampled_from([1e-3, 1.0, 100.0]),
        "shift": st.sampled_from([0.0, 3.0]),
        "steps": st.integers(1, 3),
        "needs": st.tuples(*[st.booleans()] * 5),
        "fused": st.sampled_from(["cpp", "off"]),
        "seed": st.integers(0, 2**31),
    }
).filter(lambda case: not pytorchs_fault(case))


def pytorchs_fault(case):
    """Whether a case runs into a fault of PyTorch's own CPU kernels (torch 2.12).

    * The backward of a group norm, in channels_last (some of the odd layouts count as that),
      writes to the input's gradient even if none is asked for: ``nn.GroupNorm`` ends the process.
    * The backward of a batch norm in evaluation sums a gradient wrongly if its layout or the
      input's could be both contiguous and channels_last but for its strides: ``nn.BatchNorm2d``
      does it.
    """
    input_has_gradient = any(case["needs"][:3])  # of x, or through the affine of bn
    if case["layout"] != "contiguous" and not input_has_gradient:
        return True
    composed = case["fused"] == "off" or case["layer"] != "estimated"
    odd = not case["training"] and case["layout"] not in ("contiguous", "channels_last", "offset")
    return composed and (case["grad_layout"] != "contiguous" or odd)


def check_norm(case):
    torch.manual_seed(case["seed"])
    dtype, groups, eps = case["dtype"], case["groups"], case["eps"]
    channels = groups * case["per_group"]
    shape = (case["n"], channels, case["height"], case["width"])
    bcn = not case["layer"].startswith("EstBN")
    if bcn:
        norm = BatchChannelNorm2d(channels, groups, eps, case["layer"], case["rate"])
        bn = norm.bn
    else:
        affine = case["layer"] == "EstBN"
        norm = bn = EstimatedBatchNorm2d(channels, eps, case["rate"], affine)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0, 0.5)
    estimated = isinstance(bn, EstimatedBatchNorm2d)
    if dtype == torch.float64:
        norm.double()
    norm.train(case["training"])
    if not case["training"]:
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
    own = [bn.weight, bn.bias, *([norm.weight, norm.bias] if bcn else [])]
    own = [p for p in own if p is not None]
    for parameter, need in zip(own, case["needs"][1:], strict=False):
        parameter.requires_grad_(need)
    mean, var = bn.running_mean.double(), bn.running_var.double()
    seen = 0
    updates = case["training"] and (not estimated or bn.weight is None or bn.weight.requires_grad)
    for _ in range(case["steps"]):
        x = torch.randn(shape, dtype=torch.double) * case["scale"] + case["shift"]
        x = laid_out(x.to(dtype), case["layout"]).requires_grad_(case["needs"][0])
        if not estimated and case["training"] and x.numel() == channels:
            # PyTorch's own refusal.
            with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
                norm(x)
            return
        actual = norm(x)
        wide = x.detach().double().requires_grad_(case["needs"][0])
        if estimated and updates and x.numel():
            outright = seen == 0 or case["rate"] == 1
            mean, var = reference.update(mean, var, wide.detach(), case["rate"], outright)
            seen += 1
    assert actual.dtype == dtype and actual.shape == x.shape
    leaves = [p.detach().double().requires_grad_(p.requires_grad) for p in own]
    inputs, wide_inputs = [x, *own], [wide, *leaves]
    ones, zeros = torch.ones(channels).double(), torch.zeros(channels).double()
    weight, bias = leaves[:2] if bn.weight is not None else (ones, zeros)
    use_mean, use_var = mean, var
    if not estimated and case["training"] and x.numel():
        use_mean, use_var = reference.moments(wide)
    if x.numel():
        z = reference.batch_affine(wide, use_mean, use_var, weight, bias, eps)
        expected = reference.channel_norm(z, groups, *leaves[-2:], eps) if bcn else z
    else:
        z, expected = wide, wide
    # The rounding error that the steps allow for: of the input relative to its deviation, times
    # what the channel norm multiplies by.
    unit = torch.finfo(dtype).eps
    gain = (use_var.detach() + eps).rsqrt().max().item()
    size = 1 + (x.detach().abs().max().item() if x.numel() else 0)
    inner = 1 + gain * size
    amplitude = 1 + max([p.abs().max().item() for p in own], default=1)
    outer = 1.0
    if bcn and x.numel():
        deviations = z.detach().view(case["n"], groups, -1).var(dim=2, correction=0)
        outer = (deviations + eps).rsqrt().max().item()
    error = 16 * unit * amplitude**2 * inner * max(1, outer)
    if estimated:
        estimate_unit = torch.finfo(bn.running_mean.dtype).eps
        close(bn.running_mean, mean, 8 * estimate_unit * (size + 1), "running_mean")
        close(bn.running_var, var, 16 * estimate_unit * (size + 1) ** 2, "running_var")
        assert bn.num_batches_tracked == seen
    close(actual, expected.detach(), error, "output")
    wanted = [i for i, p in enumerate(inputs) if p is not None and p.requires_grad]
    assert actual.requires_grad == bool(wanted)
    if not wanted:
        return
    dy = torch.randn(shape, dtype=torch.double)
    dy = laid_out(dy.to(dtype), case["grad_layout"])
    found = torch.autograd.grad(actual, [inputs[i] for i in wanted], dy)
    if not x.numel():
        assert all((g == 0).all() for g in found)
        return
    exact = torch.autograd.grad(expected, [wide_inputs[i] for i in wanted], dy.double())
    elements = x.numel() if wanted else 1
    for i, f, e in zip(wanted, found, exact, strict=True):
        assert f.dtype == inputs[i].dtype
        # Error of the normalized values, once more multiplied on the way back.
        path = max(1, outer) * amplitude * (gain if i == 0 else elements)
        close(f, e, error * path * 4 * max(1, inner * outer), f"gradient {i}")


def deeply(cases, check, part):
    """Many cases, of which each part draws others."""

    @seed(part)
    @DEEP
    @given(cases)
    def run(case):
        with backend(case["fused"]):
            check(case)

    run()


@QUICK
@given(norm_cases)
def test_norms(case):
    with backend(case["fused"]):
        check_norm(case)


@pytest.mark.slow
@pytest.mark.rotated(4)
@pytest.mark.parametrize("part", range(4))
def test_norms_deep(part):
    deeply(norm_cases, check_norm, part)


conv_cases = st.fixed_dictionaries(
    {
        "n": st.integers(0, 2),
        "groups": st.integers(1, 3),
        "inputs": st.integers(1, 3),
        "outputs": st.integers(1, 3),
        "kernel": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "padding": st.integers(0, 2),
        "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
        "extra": st.tuples(st.integers(0, 4), st.integers(0, 4)),
        "bias": st.booleans(),
        "formula": st.sampled_from(WS_FORMULAS),
        "eps": st.sampled_from([1e-5, 1e-3]),
        "dtype": st.sampled_from(DTYPES),
        "layout": st.sampled_from(LAYOUTS),
        "weight_layout": st.sampled_from(LAYOUTS),
        "scale": st.sampled_from([1e-3, 1.0, 1e3]),
        "needs": st.tuples(*[st.booleans()] * 3),
        "fused": st.sampled_from(["cpp", "off"]),
        "seed": st.integers(0, 2**31),
    }
).filter(lambda case: not pytorchs_conv_fault(case))


def pytorchs_conv_fault(case):
    """Whether a case runs into a fault of PyTorch's own float16 convolution (torch 2.12).

    On a CPU with AVX512-FP16, ``F.conv2d`` of an input of width 1 ends the process if a kernel of
    width 1 has a horizontal dilation, stride and padding.
    """
    return (
        case["dtype"] == torch.float16
        and case["kernel"][1] == 1
        and min(case["dilation"][1], case["stride"][1]) > 1
        and case["padding"] > 0
    )


def check_conv(case):
    torch.manual_seed(case["seed"])
    dtype, groups = case["dtype"], case["groups"]
    kernel, dilation, padding = case["kernel"], case["dilation"], case["padding"]
    arguments = (groups * case["inputs"], groups * case["outputs"], kernel)
    options = {
        "stride": case["stride"],
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": case["bias"],
        "ws_formula": case["formula"],
        "ws_eps": case["eps"],
    }
    if case["inputs"] * math.prod(kernel) < 2:
        with pytest.raises(ValueError, match="one element per filter"):
            WSConv2d(*arguments, **options)
        return
    conv = WSConv2d(*arguments, **options)
    weight = torch.randn(conv.weight.shape) * case["scale"]
    if case["weight_layout"] == "expanded":  # filters are then equal, and a parameter is dense
        weight = weight[:1].expand(weight.shape)
    else:
        weight = laid_out(weight.to(dtype), case["weight_layout"])
    conv.weight = nn.Parameter(weight.to(dtype), requires_grad=case["needs"][1])
    if conv.bias is not None:
        nn.init.normal_(conv.bias)
        conv.bias.data = conv.bias.data.to(dtype)
        conv.bias.requires_grad_(case["needs"][2])
    # Just enough for one output pixel, and something more.
    sides = [
        max(1, d * (k - 1) + 1 - 2 * padding) + more
        for d, k, more in zip(dilation, kernel, case["extra"], strict=True)
    ]
    x = torch.randn(case["n"], arguments[0], *sides, dtype=torch.double)
    x = laid_out(x.to(dtype), case["layout"]).requires_grad_(case["needs"][0])
    actual = conv(x)

    wide = [t.detach().double() for t in (x, conv.weight)]
    leaves = [t.requires_grad_(need) for t, need in zip(wide, case["needs"], strict=False)]
    standard = reference.standardize_weight(leaves[1], case["formula"], case["eps"])
    bias = None
    if conv.bias is not None:
        bias = conv.bias.detach().double().requires_grad_(case["needs"][2])
    geometry = (case["stride"], padding, dilation, groups)
    expected = F.conv2d(leaves[0], standard, bias, *geometry)
    assert actual.dtype == dtype and actual.shape == expected.shape

    filters = leaves[1].detach().flatten(1)
    n = filters.shape[1]
    # Float32 statistics of half-precision weights; a filter's deviation is known to the
    # rounding error of its mean.
    unit, statistics = torch.finfo(dtype).eps, min(torch.finfo(dtype).eps, 2.0**-23)
    slope = (filters.var(dim=1, correction=0) + case["eps"]).rsqrt().max().item()
    if case["formula"] == "unbiased_std":
        slope = 1 / (filters.std(dim=1).min().item() + case["eps"])
    lost = slope * filters.abs().max().item()
    reach = 1 + (x.detach().abs().max().item() if x.numel() else 0)
    error = 8 * n * reach * (unit * (1 + n**0.5) + statistics * lost)
    close(actual, expected.detach(), error, "output")
    inputs = [x, conv.weight, *([conv.bias] if bias is not None else [])]
    exact_inputs = [*leaves, *([bias] if bias is not None else [])]
    wanted = [i for i, t in enumerate(inputs) if t.requires_grad]
    assert actual.requires_grad == bool(wanted)
    if not wanted:
        return
    dy = torch.randn(actual.shape, dtype=torch.double).to(dtype)
    found = torch.autograd.grad(actual, [inputs[i] for i in wanted], dy)
    exact = torch.autograd.grad(expected, [exact_inputs[i] for i in wanted], dy.double())
    pixels = max(1, actual.numel())
    for i, f, e in zip(wanted, found, exact, strict=True):
        assert f.dtype == dtype
        bound = {0: error * pixels, 1: error * pixels * slope * (1 + lost), 2: error * pixels}[i]
        close(f, e, bound, f"gradient {i}")


@QUICK
@given(conv_cases)
def test_convolutions(case):
    with backend(case["fused"]):
        check_conv(case)


@pytest.mark.slow
@pytest.mark.rotated(4)
@pytest.mark.parametrize("part", range(4))
def test_convolutions_deep(part):
    deeply(conv_cases, check_conv, part)


# Arguments and inputs that make no sense.


def number():
    return st.one_of(
        st.floats(allow_nan=True, allow_infinity=True),
        st.integers(-3, 3),
        st.sampled_from([None, "0.1", 0.0, 1.0]),
    )


@QUICK
@given(
    st.integers(-2, 9), st.integers(-2, 4), number(), st.sampled_from(["estimated", "batch", "x"])
)
def test_constructors_build_or_raise_value_error(channels, groups, rate, statistics):
    good_rate = isinstance(rate, (int, float)) and 0 <= rate <= 1
    good = groups >= 1 and channels >= 1 and channels % groups == 0 and statistics != "x"
    good = good and (good_rate or statistics == "batch")
    try:
        norm = BatchChannelNorm2d(channels, groups, 1e-5, statistics, rate)
    except ValueError:
        assert not good
    else:
        assert good
        assert norm(torch.randn(2, channels, 2, 2)).isfinite().all()


@QUICK
@given(
    st.lists(st.integers(0, 5), max_size=5),
    st.sampled_from(["BCN", "EstBN"]),
    st.booleans(),
    st.sampled_from(["cpp", "off"]),
)
def test_inputs_of_a_wrong_shape_are_refused_and_change_nothing(shape, layer, training, fused):
    norm = BatchChannelNorm2d(4, 2) if layer == "BCN" else EstimatedBatchNorm2d(4)
    norm.train(training)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    x = torch.randn(shape)
    with backend(fused):
        if len(shape) == 4 and shape[1] == 4:
            assert norm(x).shape == x.shape
            return
        with pytest.raises(ValueError, match="expect"):
            norm(x)
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name]), name


@QUICK
@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.text(max_size=8))
def test_standardize_weight_takes_or_refuses(shape, formula):
    weight = torch.randn(shape)
    for name in (formula, *WS_FORMULAS):
        good = name in WS_FORMULAS and math.prod(shape[1:]) >= 2
        try:
            out = standardize_weight(weight, formula=name)
        except ValueError:
            assert not good
        else:
            assert good and out.shape == weight.shape and out.isfinite().all()
