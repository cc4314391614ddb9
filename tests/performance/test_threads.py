"""One model evaluated from four threads at once gives the results of one thread, bit by bit."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model

from wsbcn_d2.modeling import WSRetinaNetHead

THREADS = 4


def in_threads(run, inputs):
    """``run`` of each input, one thread each, all begun at the same time, several times."""
    barrier = Barrier(len(inputs))

    def one(x):
        torch.set_num_threads(1)
        barrier.wait()
        return [run(x) for _ in range(5)]

    with ThreadPoolExecutor(len(inputs)) as pool:
        return list(pool.map(one, inputs))


def assert_same(run, inputs):
    expected = [run(x) for x in inputs]
    for once, several in zip(expected, in_threads(run, inputs), strict=True):
        for again in several:
            assert len(again) == len(once) > 0
            assert all(torch.equal(a, b) for a, b in zip(again, once, strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_a_retinanet_head(training, grad):
    shapes = [ShapeSpec(channels=32, stride=8)] * 3
    head = WSRetinaNetHead(
        norm="GN", input_shape=shapes, num_classes=3, num_anchors=1, conv_dims=[32, 32]
    ).train(training)
    inputs = [[torch.randn(1, 32, s, s) for s in (8, 4, 2)] for _ in range(THREADS)]

    def run(features):
        with torch.set_grad_enabled(grad):
            return [y for kind in head(features) for y in kind]

    assert_same(run, inputs)


def test_threads_that_differ_in_precision_and_gradients():
    """What one thread shares within its forward is not what another one needs."""
    shapes = [ShapeSpec(channels=32, stride=8)] * 3
    head = WSRetinaNetHead(
        norm="GN", input_shape=shapes, num_classes=3, num_anchors=1, conv_dims=[32, 32]
    )
    features = [torch.randn(1, 32, s, s) for s in (8, 4, 2)]

    def run(options):
        grad, dtype = options
        with (
            torch.set_grad_enabled(grad),
            torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32),
        ):
            outputs = [y for kind in head(features) for y in kind]
        assert all(y.requires_grad == grad for y in outputs)
        return outputs

    options = [(g, d) for g in (True, False) for d in (torch.float32, torch.bfloat16)]
    assert_same(run, options)


@pytest.mark.parametrize("norm", ["BCN", "GN"])
def test_mask_rcnn(tiny_cfg, norm):
    names = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
    model = build_model(tiny_cfg(*[v for n in names for v in (f"MODEL.{n}.NORM", norm)])).eval()
    inputs = [
        [{"image": torch.randint(0, 256, (3, 64, 64 + 16 * i)).to(torch.uint8)}]
        for i in range(THREADS)
    ]

    def run(batch):
        with torch.no_grad():
            found = model(batch)[0]["instances"].get_fields()
        return [getattr(value, "tensor", value) for value in found.values()]

    assert_same(run, inputs)
