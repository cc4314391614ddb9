"""What must not happen behind the layers' backs: copies kept, host syncs, graph breaks."""

import pytest
import torch
from conftest import kept_for_backward
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from wsbcn_d2 import BatchChannelNorm2d, EstimatedBatchNorm2d, WSConv2d


def kept_bytes(module, x):
    """Bytes of the distinct tensors kept for backward."""
    return sum(kept_for_backward(lambda: module(x)).values())


# The smallest maps of R-50-FPN at 800x1216, where numbers per channel weigh most, and others.
@pytest.mark.parametrize("shape", [(1, 512, 25, 38), (2, 256, 25, 38), (1, 64, 50, 76)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bytes_kept_for_backward_are_group_norms(shape, layout):
    x = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
    ours = kept_bytes(BatchChannelNorm2d(shape[1]), x)
    assert ours <= 1.02 * kept_bytes(nn.GroupNorm(32, shape[1]), x)


def test_a_half_input_is_kept_as_half():
    x = torch.randn(1, 64, 40, 50).bfloat16().requires_grad_()
    assert kept_bytes(BatchChannelNorm2d(64), x) <= 1.02 * x.nbytes


class Syncs(TorchDispatchMode):
    """Counts operations whose result the host must wait for on a GPU."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.found, self.seen = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        name = func.__name__.split(".")[0]
        if name in self.NAMES:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_the_detector_of_syncs_detects():
    with Syncs() as syncs:
        torch.ones(1).item()
    assert syncs.found == ["_local_scalar_dense"]


@pytest.mark.parametrize("fused", ["cpp", "off"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("formula", ["unbiased", "unbiased_std"])
def test_no_host_sync(monkeypatch, fused, layout, formula):
    monkeypatch.setenv("WSBCN_FUSED", fused)
    model = nn.Sequential(
        WSConv2d(4, 8, 3, norm=BatchChannelNorm2d(8, 4), ws_formula=formula),
        WSConv2d(8, 8, 3, norm=EstimatedBatchNorm2d(8), ws_formula=formula),
    )
    x = torch.randn(2, 4, 8, 8).contiguous(memory_format=layout).requires_grad_()
    with Syncs() as syncs:
        for _ in range(2):
            model(x).sum().backward()
    assert syncs.seen > 50
    assert not syncs.found


@pytest.mark.parametrize("fused", ["cpp", "off"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_no_host_sync_in_a_recomputation(monkeypatch, fused, reentrant):
    monkeypatch.setenv("WSBCN_FUSED", fused)
    model = WSConv2d(8, 8, 3, padding=1, norm=BatchChannelNorm2d(8, 4))
    x = torch.randn(2, 8, 8, 8, requires_grad=True)

    def step():
        ys = [checkpoint(model, scale * x, use_reentrant=reentrant) for scale in (1, 2)]
        sum(y.sum() for y in ys).backward()

    def syncs():
        with Syncs() as found:
            step()
        assert found.seen > 50
        return found.found

    ours = syncs()
    model.norm = nn.GroupNorm(4, 8)
    assert ours == syncs()  # what checkpointing itself looks at


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("formula", ["unbiased", "unbiased_std"])
def test_a_compiled_model_has_no_graph_breaks(training, formula):
    model = nn.Sequential(
        WSConv2d(4, 8, 3, norm=BatchChannelNorm2d(8, 4), activation=nn.ReLU(), ws_formula=formula),
        WSConv2d(8, 8, 1, norm=BatchChannelNorm2d(8, 4), ws_formula=formula),
        WSConv2d(8, 8, 3, norm=EstimatedBatchNorm2d(8), ws_formula=formula),
    ).train(training)
    model(torch.randn(1, 4, 9, 9))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 4, 9, 9)
    twin = {k: v.clone() for k, v in model.state_dict().items()}
    y = compiled(x)
    y.sum().backward()
    after = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(twin)
    torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(after[key], value, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
