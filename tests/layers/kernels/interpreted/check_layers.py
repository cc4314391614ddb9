"""The layers on Triton's kernels, in the interpreter: every option equals the readable forms."""

import copy

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from wsbcn_d2 import BatchChannelNorm2d, WSConv2d
from wsbcn_d2.layers.kernels import triton_bcn, triton_ws
from wsbcn_d2.layers.kernels.dispatch import backend_name, bcn_backend, ws_backend


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    monkeypatch.setenv("WSBCN_FUSED", "triton")


@pytest.fixture
def used(monkeypatch):
    """Names of the passes that ran in Triton."""
    names = []
    for module in (triton_bcn, triton_ws):
        for name in [n for n in module.__all__ if n.endswith(("forward", "backward"))]:
            monkeypatch.setattr(module, name, noted(names, name, getattr(module, name)))
    return names


def noted(names, name, run):
    def call(*args):
        names.append(name)
        return run(*args)

    return call


def make():
    conv = WSConv2d(
        4, 8, 3, padding=1, norm=BatchChannelNorm2d(8, 4, update_rate=0.3), ws_formula="biased"
    )
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return conv


def readable(monkeypatch, run):
    with monkeypatch.context() as patch:
        patch.setenv("WSBCN_FUSED", "off")
        return run()


def step(model, x, autocast=None):
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = model(x)
    y.float().pow(3).sum().backward()
    return [y, x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def equal(found, wanted, limit=1e-4):
    for f, w in zip(found, wanted, strict=True):
        if w is None:
            assert f is None
        else:
            assert f.dtype == w.dtype
            scale = w.detach().double().abs().max().clamp(min=1)
            assert (f.detach().double() - w.detach()).abs().max() < limit * scale


STEP = ["ws_forward", "bcn_forward", "bcn_backward", "ws_backward"]


def without_recomputation(monkeypatch):
    # Of the standardized weight, which is for tensors on a CPU.
    monkeypatch.setattr("wsbcn_d2.layers.reparametrized_conv.recomputes", lambda *args: False)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_steps(used, monkeypatch, layout, autocast):
    without_recomputation(monkeypatch)
    model = make().to(memory_format=layout)
    twin = copy.deepcopy(model)
    for _ in range(2):
        x = torch.randn(2, 4, 5, 6).contiguous(memory_format=layout)
        wanted = readable(monkeypatch, lambda x=x: step(twin, x, autocast))
        equal(step(model, x, autocast), wanted, 0.05 if autocast else 1e-4)
    assert used == STEP * 2
    assert int(model.norm.bn.num_batches_tracked) == 2


def test_under_autocast_the_weight_is_written_in_half_precision_at_once(used, monkeypatch):
    kinds = []
    forward = triton_ws.ws_forward
    monkeypatch.setattr(
        triton_ws, "ws_forward", lambda *args: kinds.append(forward(*args)) or kinds[-1]
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = make()(torch.randn(1, 4, 5, 5))
    assert [out.dtype for out, _ in kinds] == [torch.bfloat16]
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["eval", "frozen", "affine frozen", "rate 0", "batch"])
def test_settings_of_the_batch_half(used, monkeypatch, kind):
    without_recomputation(monkeypatch)
    model = make()
    step(model, torch.randn(2, 4, 5, 6))
    model.zero_grad()
    if kind == "eval":
        model.eval()
    elif kind == "frozen":
        FrozenBatchNorm2d.convert_frozen_batchnorm(model)
    elif kind == "affine frozen":
        for parameter in model.norm.bn.parameters():
            parameter.requires_grad_(False)
    elif kind == "rate 0":
        model.norm.bn.momentum = 0.0
    else:
        model.norm = BatchChannelNorm2d(8, 4, statistics="batch")
    used.clear()
    twin, x = copy.deepcopy(model), torch.randn(2, 4, 5, 6)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    equal(step(model, x), readable(monkeypatch, lambda: step(twin, x)))
    assert used == (STEP if kind != "batch" else ["ws_forward", "ws_backward"])
    after = dict(model.named_buffers())
    count = after.pop("norm.bn.num_batches_tracked", None)
    moved = any(not torch.equal(before[name], b) for name, b in after.items())
    assert moved == (kind == "batch")
    if kind == "rate 0":
        assert count == before["norm.bn.num_batches_tracked"] + 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_use_the_first_runs_estimates(used, monkeypatch, reentrant):
    without_recomputation(monkeypatch)
    model = make()
    step(model, torch.randn(2, 4, 5, 6))
    model.zero_grad()
    twin, x = copy.deepcopy(model), torch.randn(2, 4, 5, 6)
    wanted = step(twin, x)
    used.clear()
    found = step(lambda_of(model, reentrant), x)
    equal(found, wanted)
    assert used == ["ws_forward", "bcn_forward", *STEP]


def lambda_of(model, reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    return Checkpointed()


def test_double_backward_is_that_of_the_readable_form(used, monkeypatch):
    without_recomputation(monkeypatch)
    model = make()
    twin, x = copy.deepcopy(model), torch.randn(2, 4, 3, 3)

    def penalty(model):
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(model(leaf).pow(3).sum(), leaf, create_graph=True)
        dx.square().mean().backward()
        return [leaf.grad, *(p.grad for p in model.parameters())]

    wanted = readable(monkeypatch, lambda: penalty(twin))
    equal(penalty(model), wanted, 1e-3)
    assert used[:2] == ["ws_forward", "bcn_forward"]


def test_empty_batches_and_inference(used, monkeypatch):
    model = make()
    y = model(torch.randn(0, 4, 5, 6, requires_grad=True))
    y.sum().backward()
    assert y.shape == (0, 8, 5, 6) and "bcn_forward" not in used
    assert int(model.norm.bn.num_batches_tracked) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.norm.parameters())
    twin, x = copy.deepcopy(model).eval(), torch.randn(2, 4, 5, 6)
    model.eval()
    wanted = readable(monkeypatch, lambda: twin(x))
    used.clear()
    with torch.inference_mode():
        assert_close(model(x), wanted, rtol=1e-3, atol=1e-4)
        model.train()(x)  # moves the estimates, which are no inference tensors
    assert used == ["ws_forward", "bcn_forward"] * 2
    assert int(model.norm.bn.num_batches_tracked) == 1


def test_autograd_sees_the_estimates_move():
    norm, x = BatchChannelNorm2d(8, 4), torch.randn(1, 8, 3, 3)
    y = torch.ones(8, requires_grad=True) * norm.bn.running_mean  # keeps the mean
    norm(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_is_kept_for_backward():
    norm, kept = BatchChannelNorm2d(64), {}
    x = torch.randn(1, 64, 20, 24, requires_grad=True)

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        norm(x)
    assert sum(kept.values()) < 1.03 * x.nbytes


def test_graphs_of_others_hold_plain_operations(used, monkeypatch):
    model, x = make().eval(), torch.randn(2, 4, 5, 6)
    wanted = readable(monkeypatch, lambda: model(x))
    exported = torch.export.export(model, (x,))
    assert all("triton" not in str(node.target) for node in exported.graph.nodes)
    for form in (
        exported.module(),
        torch.jit.trace(model, x, check_trace=False),
        torch.jit.script(model),
        torch.compile(model, backend="aot_eager", fullgraph=True),
    ):
        assert_close(form(x), wanted, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model).train(), backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()
    assert used == []
    torch._dynamo.reset()


def test_what_serves_is_said(monkeypatch):
    norm = BatchChannelNorm2d(8, 4)
    assert "fused=triton" in repr(norm)
    x = torch.randn(1, 8, 2, 2)
    tensors = (norm.weight, norm.bias, norm.bn.weight, norm.bn.bias)
    estimates = (norm.bn.running_mean, norm.bn.running_var, norm.bn.num_batches_tracked)
    assert bcn_backend(x, *tensors, *estimates) is triton_bcn
    assert ws_backend(x) is triton_ws
    monkeypatch.setenv("WSBCN_FUSED", "auto")
    assert backend_name(x) == "cpp"
