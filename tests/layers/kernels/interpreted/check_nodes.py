"""The autograd nodes in C++ on a machine without a GPU: in place of the driver's function that
launches a kernel stands one that runs it in the interpreter, on the addresses that it is given."""

import ctypes
import itertools
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from wsbcn_d2 import BatchChannelNorm2d, EstimatedBatchNorm2d, WSConv2d
from wsbcn_d2.layers import reparametrized_conv
from wsbcn_d2.layers.kernels import cuda_nodes, triton_bcn, triton_ws
from wsbcn_d2.layers.kernels import triton_launch as launch

NODES = cuda_nodes.nodes()
DRIVER = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p,
)  # fmt: skip
NUMBERS = {float: ctypes.c_double, int: ctypes.c_int32}


def at(address: int, like: torch.Tensor) -> torch.Tensor:
    """A tensor of the size and type of another, in memory that starts at an address."""
    size = like.numel() * like.element_size()
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=like.dtype)


class Driver:
    """Launches by address what was launched by Python before."""

    def __init__(self):
        self.seen, self.launched, self.numbers = {}, [], itertools.count(1)
        self.function = DRIVER(self.launch)

    def compiled(self, form, args):
        if form.plain is None:
            form.plain = next(self.numbers), 32 * form.warps, 0
        self.seen[form.plain[0]] = form, args

    def launch(self, function, programs, y, z, threads, ty, tz, shared, stream, addresses, extra):
        form, like = self.seen[function]
        assert (y, z, ty, tz, shared, stream, extra) == (1, 1, 1, 1, 0, None, None)
        assert threads == 32 * form.warps
        args, count = [], 0
        for kind in like:
            if kind is None:  # is no argument of what Triton compiles
                args.append(None)
                continue
            if isinstance(kind, torch.Tensor):
                address = ctypes.cast(addresses[count], ctypes.POINTER(ctypes.c_void_p))[0]
                args.append(at(address, kind))
            else:
                number = NUMBERS[type(kind)]
                args.append(ctypes.cast(addresses[count], ctypes.POINTER(number))[0])
            count += 1
        for i in (count, count + 1):  # Triton's own two
            assert ctypes.cast(addresses[i], ctypes.POINTER(ctypes.c_void_p))[0] is None
        form.kernel[(programs,)](*args, **form.constants)
        self.launched.append(form.kernel.fn.__name__)
        return 0


@pytest.fixture
def driver(monkeypatch):
    assert launch.INTERPRETED
    driver, way = Driver(), launch._Code.launch

    def noted(form, programs, aligned, args):
        way(form, programs, aligned, args)
        driver.compiled(form, args)

    monkeypatch.setenv("WSBCN_FUSED", "triton")
    monkeypatch.setattr(launch, "on_gpu", lambda x: True)
    monkeypatch.setattr(launch, "_raw_stream", lambda device: 0)
    monkeypatch.setattr(launch._Code, "launch", noted)
    # On a GPU a standardized weight is kept until backward.
    monkeypatch.setattr(reparametrized_conv, "recomputes", lambda *args: False)
    caches = launch.code, triton_bcn._forward, triton_bcn._backward, triton_ws._plan
    for cache in caches:
        cache.cache_clear()
    NODES.forget()
    NODES.start(ctypes.cast(driver.function, ctypes.c_void_p).value, cuda_nodes._ask)
    yield driver
    NODES.start(0, cuda_nodes._ask)
    NODES.forget()
    for cache in caches:
        cache.cache_clear()


def random_norm(dtype=torch.float32, affine=True):
    norm = BatchChannelNorm2d(8, 2, update_rate=0.3).to(dtype)
    if not affine:
        norm.bn = EstimatedBatchNorm2d(8, momentum=0.3, affine=False).to(dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0, 0.3)
    norm(torch.randn(2, 8, 3, 2, dtype=dtype))
    return norm


def results(module, x, dy):
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = module(x)
    name = y.grad_fn.name()
    y.backward(dy)
    grads = [p.grad for p in module.parameters()]
    return name, [t.clone() for t in (y.detach(), x.grad, *grads, *module.buffers())]


FORWARD, BACKWARD = ["moments", "settle", "apply"], ["sums", "settle_backward", "combine"]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", ["train", "first batch", "eval", "no affine", "frozen", "half"])
def test_bcn_is_what_python_makes_of_the_same_kernels(driver, mode, layout):
    norm = random_norm(affine=mode != "no affine").train(mode != "eval")
    if mode == "first batch":
        norm.bn.num_batches_tracked.zero_()
    if mode == "frozen":
        norm.bn.requires_grad_(False)
    state = {name: t.clone() for name, t in norm.state_dict().items()}
    x = torch.randn(2, 8, 3, 4).add(1).contiguous(memory_format=layout)
    x = x.half() if mode == "half" else x
    dy = torch.randn_like(x)
    if mode == "frozen":
        norm.requires_grad_(False)

    def run():
        norm.load_state_dict(state)
        if mode == "frozen":
            leaf = x.clone().requires_grad_()
            y = norm(leaf)
            return y.grad_fn.name(), [y, *torch.autograd.grad(y, leaf, dy), *norm.buffers()]
        return results(norm, x, dy)

    name, wanted = run()
    assert name == "_FusedBCNBackward" and driver.launched == []
    wanted = [t.clone() for t in wanted]
    name, found = run()
    assert name == "FusedBCN" and driver.launched == FORWARD + BACKWARD
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    again = run()[1]
    assert all(map(torch.equal, again, wanted)) and len(driver.launched) == 12


@pytest.mark.parametrize("formula", ["biased", "unbiased", "unbiased_std"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_ws_is_what_python_makes_of_the_same_kernel(driver, formula, layout):
    conv = WSConv2d(4, 6, 3, bias=False, ws_formula=formula, ws_eps=1e-4)
    weight = conv.weight.detach().contiguous(memory_format=layout)
    conv.weight = nn.Parameter(weight)
    dy = torch.randn_like(weight)

    def run(dtype=torch.float32):
        out = conv.used_weight()
        return out.grad_fn.name(), [out, *torch.autograd.grad(out, conv.weight, dy.to(out.dtype))]

    for context in (torch.autocast("cpu", enabled=False), torch.autocast("cpu", torch.bfloat16)):
        driver.launched.clear()
        with context:
            (first, wanted), (second, found) = run(), run()
        assert (first, second) == ("_FusedWSBackward", "FusedWS")
        assert driver.launched == ["standardize"] * 2
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


def compiled_norm(driver, dtype=torch.float64):
    norm, x = random_norm(dtype), torch.randn(2, 8, 3, 4, dtype=dtype)
    results(norm, x, torch.randn_like(x))
    return norm, x.requires_grad_()


def test_gradients_can_be_differentiated_again(driver):
    norm, x = compiled_norm(driver)
    norm.eval()  # estimates that move would make of every call another function
    results(norm, x, torch.randn_like(x))
    params = (x, norm.weight, norm.bias, norm.bn.weight, norm.bn.bias)

    def run(x, *values):
        named = dict(zip(("weight", "bias", "bn.weight", "bn.bias"), values, strict=True))
        return torch.func.functional_call(norm, named, (x,))

    assert run(*params).grad_fn.name() == "FusedBCN"
    assert torch.autograd.gradcheck(run, params, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, params, fast_mode=True)
    conv = WSConv2d(2, 3, 3, bias=False).double()
    torch.autograd.grad(conv.used_weight().sum(), conv.weight)
    again = conv.used_weight()
    assert again.grad_fn.name() == "FusedWS"
    (dw,) = torch.autograd.grad(again.square().sum(), conv.weight, create_graph=True)
    (found,) = torch.autograd.grad(dw.square().sum(), conv.weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WSBCN_FUSED", "off")
        out = conv.used_weight()
        (dw,) = torch.autograd.grad(out.square().sum(), conv.weight, create_graph=True)
        (wanted,) = torch.autograd.grad(dw.square().sum(), conv.weight)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-12)


def test_gradients_in_another_layout_or_absent(driver):
    """An expanded gradient is no memory to read; one that nobody needs is not computed."""
    norm, x = compiled_norm(driver)
    norm.eval()
    params = (x, norm.weight, norm.bias, norm.bn.weight, norm.bn.bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WSBCN_FUSED", "off")
        wanted = torch.autograd.grad(norm(x).sum(), params)
    norm(x)
    assert norm(x).grad_fn.name() == "FusedBCN"
    for a, b in zip(torch.autograd.grad(norm(x).sum(), params), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for i, parameter in enumerate(params):
        dy = torch.ones(2, 8, 3, 4, dtype=torch.float64)
        for _ in range(2):
            y = norm(x)
            driver.launched.clear()
            (found,) = torch.autograd.grad(y, parameter, dy)
        torch.testing.assert_close(found, wanted[i], rtol=1e-10, atol=1e-12)
        assert driver.launched == (BACKWARD if i == 0 else BACKWARD[:2])
    norm.requires_grad_(False)
    assert norm(x.detach()).grad_fn is None
    (found,) = torch.autograd.grad(norm(x), x, dy)
    torch.testing.assert_close(found, wanted[0], rtol=1e-10, atol=1e-12)


def test_what_autograd_promises(driver):
    norm, x = compiled_norm(driver)
    versions = [t._version for t in norm.buffers()]
    y = norm(x)
    assert y.grad_fn.name() == "FusedBCN"
    assert [t._version for t in norm.buffers()] == [v + 1 for v in versions]
    y.backward(torch.ones_like(y))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward(torch.ones_like(y))
    y = norm(x)
    with torch.no_grad():
        norm.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with torch.no_grad():
        assert norm(x).grad_fn is None
    with torch.inference_mode():
        y = norm(x)
        assert y.is_inference() and y.grad_fn is None


def test_unusual_tensors_are_left_to_python(driver):
    norm, x = compiled_norm(driver, torch.float32)
    norm.eval()
    dy = torch.randn(2, 8, 3, 4)
    for case in (x.detach()[:, :, :, ::2], x.detach().expand(2, 2, 8, 3, 4)[0][:, :, :, :3]):
        for _ in range(2):
            leaf = case.requires_grad_()
            y = norm(leaf)
            assert y.grad_fn.name() == "_FusedBCNBackward"
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("WSBCN_FUSED", "off")
                torch.testing.assert_close(y, norm(leaf), rtol=1e-5, atol=1e-5)
    holder = torch.zeros(1 + x.numel())
    moved = holder[1:].view(2, 8, 3, 4).copy_(x.detach()).requires_grad_()  # not at 16 bytes
    assert norm(moved).grad_fn.name() == "_FusedBCNBackward"
    assert norm(x).grad_fn is not None and norm(x).grad_fn.name() == "FusedBCN"
    y = norm(x)
    y.backward(torch._neg_view(dy))
    found, x.grad = x.grad, None
    norm(x).backward(-dy)
    torch.testing.assert_close(found, x.grad)


def test_recomputation(driver):
    """Checkpointing packs what a node saves and runs the forward again, estimates held."""
    norm, x = compiled_norm(driver)
    dy = torch.randn_like(x)
    state = {name: t.clone() for name, t in norm.state_dict().items()}
    found = []
    for run in (norm, lambda x: checkpoint(norm, x, use_reentrant=False)):
        norm.load_state_dict(state)
        norm.zero_grad()
        x.grad = None
        run(x).backward(dy)
        found.append([x.grad, *[p.grad.clone() for p in norm.parameters()], *norm.buffers()])
        found[-1] = [t.clone() for t in found[-1]]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


CONVS = {
    "plain": {},
    "bias": {"bias": True},
    "stride, padding": {"stride": 2, "padding": (1, 0)},
    "dilation, groups": {"dilation": 2, "groups": 2, "padding": 2},
    "biased": {"ws_formula": "biased"},
    "unbiased_std": {"ws_formula": "unbiased_std"},
}


def conv_and_input(dtype=torch.float32, layout=torch.contiguous_format, **options):
    conv = WSConv2d(4, 6, 3, **{"bias": False, **options}).to(dtype, memory_format=layout)
    x = torch.randn(2, 4, 7, 6, dtype=dtype).contiguous(memory_format=layout)
    return conv, x.requires_grad_()


def conv_results(conv, x, amp=False):
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        y = conv(x)
    leaves = [t for t in (x, *conv.parameters()) if t.requires_grad]
    grads = torch.autograd.grad(y, leaves, torch.randn_like(y))
    return y.grad_fn.name(), [y.detach(), *grads]


@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("amp", [False, True], ids=["", "amp"])
def test_convolutions_are_what_two_nodes_make(driver, options, layout, amp):
    conv, x = conv_and_input(layout=layout, **options)
    for leaf in (x, x.detach()):  # of a first layer
        first, wanted = conv_results(conv, leaf, amp)
        second, found = conv_results(conv, leaf, amp)
        assert second == "FusedWSConv" and (leaf is not x or first == "ConvolutionBackward0")
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


def test_convolutions_can_be_differentiated_again(driver):
    conv, x = conv_and_input(torch.float64, bias=True, padding=1, stride=2)
    x = torch.randn(1, 4, 4, 3, dtype=torch.float64).requires_grad_()
    conv_results(conv, x)

    def run(x, *values):
        named = dict(zip(("weight", "bias"), values, strict=True))
        return torch.func.functional_call(conv, named, (x,))

    params = (x, conv.weight, conv.bias)
    assert run(*params).grad_fn.name() == "FusedWSConv"
    assert torch.autograd.gradcheck(run, params, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, params, fast_mode=True)


def test_what_autograd_promises_of_convolutions(driver):
    conv, x = conv_and_input(torch.float64)
    conv_results(conv, x)
    y = conv(x)
    y.backward(torch.ones_like(y))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward(torch.ones_like(y))
    y = conv(x)
    with torch.no_grad():
        conv.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with torch.no_grad():
        assert conv(x).grad_fn is None
    conv.weight.requires_grad_(False)  # constant: nothing to join
    assert conv(x).grad_fn.name() == "ConvolutionBackward0"
    conv.weight.requires_grad_(True)
    wanted = torch.autograd.grad(conv(x).square().sum(), conv.weight)
    for reentrant in (False, True):
        y = checkpoint(conv, x, use_reentrant=reentrant)
        conv.weight.grad = None
        y.square().sum().backward()
        torch.testing.assert_close(conv.weight.grad, wanted[0], rtol=1e-9, atol=1e-12)
    assert conv(x[:0]).shape == (0, 6, 5, 4)  # left to Python


def test_a_first_run_by_python_may_be_recomputed_by_a_node(driver):
    """Checkpointing counts what is saved: as much, in the same order, either way."""
    for amp in (False, True):
        conv, x = conv_and_input()
        conv_results(conv, x, amp)
        wanted = conv_results(conv, x, amp)[1][2]
        for cache in (triton_ws._plan, launch.code):
            cache.cache_clear()
        NODES.forget()
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            y = checkpoint(conv, x, use_reentrant=False)
        (found,) = torch.autograd.grad(y, conv.weight, torch.randn_like(y))
        assert torch.equal(found, wanted)


def test_a_gradient_left_to_python_leaves_nothing_behind(driver):
    norm, x = compiled_norm(driver, torch.float32)
    norm.eval()
    dy = torch._neg_view(torch.randn(2, 8, 3, 4))
    results(norm, x, dy.resolve_neg())
    held = []
    for _ in range(6):
        y = norm(x)
        assert y.grad_fn.name() == "FusedBCN"
        driver.launched.clear()
        y.backward(dy)
        assert driver.launched == []
        held.append((sys.getrefcount(x), sys.getrefcount(norm.weight)))
    assert held[1:] == held[:1] * 5


def test_what_goes_wrong_in_python_is_said(driver, monkeypatch):
    norm, x = compiled_norm(driver)
    y = norm(x)

    def fail(*args):
        raise ValueError("no kernel for that")

    monkeypatch.setitem(cuda_nodes._answers, "bcn_graph", fail)
    with pytest.raises(ValueError, match="no kernel for that"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
