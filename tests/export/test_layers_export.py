"""The layers in TorchScript (traced and scripted) and in ``torch.export``."""

import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from wsbcn_d2 import BatchChannelNorm2d, EstimatedBatchNorm2d, WSConv2d, standardize_weight
from wsbcn_d2.layers import WS_FORMULAS, CWNConv2d, WNConv2d

CHANNELS, GROUPS = 8, 4


def bcn(statistics="estimated"):
    return BatchChannelNorm2d(CHANNELS, GROUPS, statistics=statistics)


def conv(kind=WSConv2d, **options):
    return kind(CHANNELS, CHANNELS, 3, padding=1, **options)


LAYERS = {
    "EstBN": lambda: EstimatedBatchNorm2d(CHANNELS),
    "EstBN, no affine": lambda: EstimatedBatchNorm2d(CHANNELS, affine=False),
    "BCN": bcn,
    "BatchBCN": lambda: bcn("batch"),
    "SyncBCN": lambda: bcn("sync"),
    "WN": lambda: conv(WNConv2d),
    "CWN": lambda: conv(CWNConv2d),
    "WS, BCN, ReLU": lambda: conv(norm=bcn(), activation=nn.ReLU()),
    **{f"WS {f}": lambda f=f: conv(ws_formula=f) for f in WS_FORMULAS},
    "WS half": lambda: conv().to(torch.bfloat16),
}

layers = pytest.mark.parametrize("name", LAYERS)


def trained(name):
    layer = LAYERS[name]()
    dtype = next((p.dtype for p in layer.parameters()), torch.float32)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 1.0, 0.4)
    for _ in range(3):
        layer(torch.randn(2, CHANNELS, 6, 7, dtype=dtype) + 1)
    return layer.eval().requires_grad_(False), dtype


def check(layer, exported, dtype):
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    # Another batch and size than the one of the export.
    for shape in ((2, CHANNELS, 6, 7), (3, CHANNELS, 9, 5)):
        x = torch.randn(shape, dtype=dtype)
        assert_close(exported(x), layer(x), atol=tolerance, rtol=tolerance)


@layers
def test_trace(name):
    layer, dtype = trained(name)
    with warnings.catch_warnings(record=True) as caught:
        # A warning of the tracer says that something of the input became a constant.
        warnings.simplefilter("always", torch.jit.TracerWarning)
        traced = torch.jit.trace(layer, torch.randn(2, CHANNELS, 6, 7, dtype=dtype))
    # F.group_norm has warnings of its own. Those of a float are of the size of a filter.
    own = [str(w.message) for w in caught if "wsbcn_d2" in w.filename]
    assert not [message for message in own if "Python float" not in message]
    check(layer, traced, dtype)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "SyncBCN"])
def test_script(name):
    layer, dtype = trained(name)
    check(layer, torch.jit.script(layer), dtype)


@layers
def test_export(name):
    layer, dtype = trained(name)
    example = torch.randn(2, CHANNELS, 6, 7, dtype=dtype)
    dynamic = {
        0: torch.export.Dim("n", min=1, max=8),
        2: torch.export.Dim("h", min=2, max=64),
        3: torch.export.Dim("w", min=2, max=64),
    }
    program = torch.export.export(layer, (example,), dynamic_shapes=(dynamic,))
    check(layer, program.module(), dtype)
    # Plain operations only, which other tools know.
    calls = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [call for call in calls if "wsbcn" in call.lower() or "autograd" in call.lower()]


@pytest.mark.parametrize("formula", WS_FORMULAS)
def test_a_script_standardizes_every_layout(formula):
    layer, _ = trained(f"WS {formula}")
    layer.weight = nn.Parameter(layer.weight.to(memory_format=torch.channels_last))
    check(layer, torch.jit.script(layer), torch.float32)
    no_outputs = torch.empty(0, 3, 2, 2)
    assert standardize_weight(no_outputs, formula=formula).shape == no_outputs.shape


# What is not supported says so.


@pytest.mark.parametrize("name", ["EstBN", "BCN"])
def test_scripts_do_not_train(name):
    # The update of the estimates is Python; a script that left it out would train another layer.
    layer = LAYERS[name]()
    scripted = torch.jit.script(layer.train())
    with pytest.raises(torch.jit.Error, match="script EstimatedBatchNorm2d in evaluation mode"):
        scripted(torch.randn(2, CHANNELS, 6, 7))


def test_synchronized_statistics_are_not_scripted():
    # Detectron2's NaiveSyncBatchNorm asks for the process group, which TorchScript cannot; fold
    # the model (the batch half is then gone) or trace it.
    with pytest.raises(RuntimeError, match="is_available"):
        torch.jit.script(trained("SyncBCN")[0])


def test_builtin_activations_are_not_scripted():
    # As with Detectron2's own convolution: an activation has to be a module or a Python function.
    layer = conv(activation=torch.relu_).eval()
    with pytest.raises(RuntimeError, match="builtin cannot be used as a value"):
        torch.jit.script(layer)
