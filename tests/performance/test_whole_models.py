"""A whole Mask R-CNN with WS and BCN: mixed precision, memory layouts, compilation."""

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from wsbcn_d2 import BatchChannelNorm2d
from wsbcn_d2.layers.kernels.autograd import _FusedBCN


@pytest.fixture
def model(tiny_cfg):
    return build_model(tiny_cfg())


def train(model, batch, steps, dtype=torch.float32):
    """Losses of the first step, after a few."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    first = None
    for _ in range(steps):
        optimizer.zero_grad()
        torch.manual_seed(0)  # proposals are sampled
        with (
            EventStorage(),
            torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32),
        ):
            losses = model(batch)
        first = first or {name: loss.item() for name, loss in losses.items()}
        sum(losses.values()).float().backward()
        optimizer.step()
    return first


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_trains_in_every_precision_and_layout(model, make_batch, dtype, layout):
    batch = make_batch()
    exact = train(copy.deepcopy(model), batch, 1)
    model.to(memory_format=layout)
    seen = set()
    for module in model.modules():
        if isinstance(module, BatchChannelNorm2d):
            module.register_forward_hook(
                lambda module, inputs, y: seen.add(type(y.grad_fn).__name__)
            )
    found = train(model, batch, 3, dtype)
    assert seen == {_FusedBCN.__name__ + "Backward"}
    rtol = 1e-4 if dtype == torch.float32 else 0.1
    assert found == pytest.approx(exact, rel=rtol, abs=rtol)
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), name
        assert tensor.dtype in (torch.float32, torch.int64)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert model.backbone.bottom_up.stem.conv1.norm.bn.num_batches_tracked == 3


def test_the_backbone_compiles_without_graph_breaks(model):
    """Detectron2's FPN has one of its own on some versions; in our layers there is none."""
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    model.double()
    state = copy.deepcopy(model.state_dict())
    expected = model.backbone(x)
    moved = copy.deepcopy(model.backbone.state_dict())
    model.load_state_dict(state)
    try:
        explained = torch._dynamo.explain(model.backbone)(x)
        for reason in explained.break_reasons:
            frames = [frame.filename for frame in reason.user_stack]
            assert not any("wsbcn_d2" in name for name in frames), reason
        model.load_state_dict(state)
        torch._dynamo.reset()
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(model.backbone, backend=backend)
        actual = compiled(x)
        assert graphs
    finally:
        torch._dynamo.reset()
    for level, feature in expected.items():
        torch.testing.assert_close(actual[level], feature, rtol=1e-3, atol=1e-4)
    for key, value in model.backbone.state_dict().items():
        torch.testing.assert_close(value, moved[key], rtol=1e-3, atol=1e-4)
