"""The convolutions that all levels share standardize their weights once in a forward."""

import contextlib
import logging

import pytest
import torch
from detectron2.layers import ShapeSpec

from wsbcn_d2.layers import reparametrized_conv, weight_standardization
from wsbcn_d2.modeling import retinanet
from wsbcn_d2.modeling.retinanet import WSRetinaNetHead

LEVELS = [(1, 32, 8, 8), (1, 32, 4, 4), (1, 32, 2, 2)]


@pytest.fixture
def head():
    shapes = [ShapeSpec(channels=32, stride=8)] * len(LEVELS)
    return WSRetinaNetHead(
        norm="GN", input_shape=shapes, num_classes=3, num_anchors=1, conv_dims=[32, 32]
    )


@pytest.fixture
def features():
    return [torch.randn(shape) for shape in LEVELS]


def run(head, features):
    """Outputs, then gradients."""
    head.zero_grad()
    outputs = [y for kind in head(features) for y in kind]
    sum(y.square().sum() for y in outputs).backward()
    return [*outputs, *(parameter.grad for parameter in head.parameters())]


@pytest.mark.parametrize("norm, levels", [("GN", 0), ("BN", 0), ("BCN", 1), ("EstBN", 1)])
def test_estimates_that_levels_share_are_warned_of(norm, levels, caplog):
    shapes = [ShapeSpec(channels=32, stride=8)] * len(LEVELS)
    with caplog.at_level(logging.WARNING, logger="wsbcn_d2"):
        WSRetinaNetHead(norm=norm, input_shape=shapes, num_classes=3, num_anchors=1, conv_dims=[32])
    said = [r.getMessage() for r in caplog.records if r.name.startswith("wsbcn_d2")]
    assert len(said) == levels and all(f"{norm!r} in the RetinaNet head mix" in s for s in said)


def test_once_each(head, features, monkeypatch):
    used = []
    standardize = weight_standardization._standardize_as

    def counted(weight, *options):
        used.append(id(weight))
        return standardize(weight, *options)

    monkeypatch.setattr(weight_standardization, "_standardize_as", counted)
    shared = run(head, features)
    assert len(used) == len(set(used)) == 4
    used.clear()
    monkeypatch.setattr(retinanet, "standardize_once", lambda module: contextlib.nullcontext())
    apart = run(head, features)
    assert len(used) == 2 * 4 * len(LEVELS)  # each again for backward
    for a, b in zip(shared, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_next_forward_sees_an_edit(head, features):
    before = run(head, features)[0]
    conv = head.cls_subnet[0]
    conv.weight.data[0] *= torch.rand(32, 3, 3)  # moves no version counter
    after = run(head, features)[0]
    assert not torch.allclose(before, after)
    head.load_state_dict(head.state_dict())
    torch.testing.assert_close(run(head, features)[0], after)


def test_a_forward_that_fails_leaves_nothing_behind(head, features):
    with pytest.raises(RuntimeError):
        head([features[0], torch.randn(1, 7, 4, 4), features[2]])
    assert reparametrized_conv._scope.get() is None


def test_it_can_be_scripted(head, features):
    head.eval()
    scripted = torch.jit.script(head)
    for a, b in zip(head(features), scripted(features), strict=True):
        torch.testing.assert_close(a, b)
