"""A whole detector in TorchScript, its backbone in ``torch.export`` and ONNX."""

import io
import warnings

import pytest
import torch
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import Boxes
from torch import nn
from torch.testing import assert_close

from wsbcn_d2 import BatchChannelNorm2d, WSConv2d
from wsbcn_d2.folding import fold

FIELDS = {
    "proposal_boxes": Boxes,
    "objectness_logits": torch.Tensor,
    "pred_boxes": Boxes,
    "scores": torch.Tensor,
    "pred_classes": torch.Tensor,
    "pred_masks": torch.Tensor,
}


def settle(model):
    """Estimates and affines other than those of the initialisation, so that each matters."""
    for module in model.modules():
        if isinstance(module, BatchChannelNorm2d):
            for parameter in module.parameters():
                nn.init.normal_(parameter, 1.0, 0.1)
            module.bn.running_mean.normal_(0, 0.1)
            module.bn.running_var.uniform_(0.8, 1.2)
    return model.eval().requires_grad_(False)


@pytest.fixture
def detector(tiny_cfg):
    return settle(build_model(tiny_cfg()))


@pytest.fixture
def image(make_batch):
    return make_batch(64, 64)[0]["image"].float()


def detections(model, image):
    return model.inference([{"image": image}], do_postprocess=False)[0]


def check(actual, expected):
    assert len(expected) > 0 and len(actual) == len(expected)
    assert_close(actual.pred_boxes.tensor, expected.pred_boxes.tensor, atol=1e-2, rtol=0)
    assert_close(actual.scores, expected.scores, atol=1e-4, rtol=0)
    assert_close(actual.pred_masks, expected.pred_masks, atol=1e-3, rtol=0)
    assert torch.equal(actual.pred_classes, expected.pred_classes)


@pytest.mark.slow
@pytest.mark.parametrize("folded", [False, True])
def test_trace_a_detector(detector, image, folded):
    model = fold(detector) if folded else detector

    def inference(model, inputs):
        return [{"instances": model.inference(inputs, do_postprocess=False)[0]}]

    adapter = TracingAdapter(model, [{"image": image}], inference)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always", torch.jit.TracerWarning)
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    # Detectron2 has warnings of its own. Those of a float are of the size of a filter.
    own = [str(w.message) for w in caught if "wsbcn_d2" in w.filename]
    assert not [message for message in own if "Python float" not in message]
    other = image.flip(2)
    for x in (image, other):
        actual = adapter.outputs_schema(traced(x))[0]["instances"]
        check(actual, detections(detector, x))


@pytest.mark.slow
@pytest.mark.parametrize("folded", [False, True])
def test_script_a_detector(detector, image, folded):
    model = fold(detector) if folded else detector
    expected = [detections(detector, x) for x in (image, image.flip(2))]
    scripted = scripting_with_instances(model, FIELDS)
    for x, e in zip((image, image.flip(2)), expected, strict=True):
        check(scripted.inference([{"image": x}], do_postprocess=False)[0], e)


class Levels(nn.Module):
    """A backbone whose outputs are a tuple, finest level first."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        features = self.backbone(x)
        return tuple(features[name] for name in sorted(features))


@pytest.fixture
def backbone(tiny_cfg):
    return settle(build_backbone(tiny_cfg()))


def check_levels(actual, expected):
    assert len(actual) == len(expected) == 5
    for a, e in zip(actual, expected, strict=True):
        assert e.abs().max() > 0.1
        assert_close(torch.as_tensor(a), e, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("folded", [False, True])
def test_torch_export_of_the_backbone(backbone, folded):
    model = Levels(fold(backbone) if folded else backbone)
    program = torch.export.export(model, (torch.randn(1, 3, 64, 64),))
    x = torch.randn(1, 3, 64, 64)
    check_levels(program.module()(x), Levels(backbone)(x))


@pytest.mark.parametrize("folded", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_onnx_of_the_backbone(backbone, folded):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the dev extra")
    pytest.importorskip("onnx", reason="needs the dev extra")
    model = fold(backbone) if folded else backbone
    if folded:
        assert not [m for m in model.modules() if isinstance(m, (WSConv2d, BatchChannelNorm2d))]
    buffer = io.BytesIO()
    # PyTorch's exporter from traces: the one with dynamic sizes and few dependencies.
    torch.onnx.export(
        Levels(model),
        (torch.randn(1, 3, 64, 64),),
        buffer,
        input_names=["image"],
        dynamic_axes={"image": {2: "height", 3: "width"}},
        opset_version=17,
        dynamo=False,
    )
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    for shape in ((1, 3, 64, 64), (1, 3, 96, 64)):
        x = torch.randn(shape)
        check_levels(session.run(None, {"image": x.numpy()}), Levels(backbone)(x))


@pytest.mark.slow
def test_onnx_by_way_of_torch_export(backbone, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the dev extra")
    pytest.importorskip("onnxscript", reason="needs the dev extra")
    x = torch.randn(1, 3, 64, 64)
    program = torch.onnx.export(Levels(fold(backbone)), (x,), dynamo=True, verbose=False)
    program.save(str(tmp_path / "backbone.onnx"))
    session = onnxruntime.InferenceSession(
        str(tmp_path / "backbone.onnx"), providers=["CPUExecutionProvider"]
    )
    actual = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    check_levels(actual, Levels(backbone)(x))
